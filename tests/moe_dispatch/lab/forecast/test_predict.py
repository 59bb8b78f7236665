"""Predictions, compared with numbers worked out by hand."""

from typing import Any

import pytest

from moe_dispatch.lab.forecast.config import load_plan_config
from moe_dispatch.lab.forecast.crossing import Crossing, find_crossing
from moe_dispatch.lab.forecast.predict import predict
from tests.support.lab.configs import CONFIGS

PLANS = CONFIGS / "plan"


def config_with(**changes: dict[str, Any]) -> Any:
    return load_plan_config(PLANS / "deepseek_v3.toml", changes)


def test_a_prediction_by_hand() -> None:
    """2 experts on 2 ranks of 2 nodes, K = 1: half of the tokens leave, 10 x 2 bytes forth and home, and a weight."""
    config = config_with(
        model={"dim": 10, "experts": 2, "top_k": 1, "groups": 1, "limited_groups": 1},
        load={"tokens_per_rank": 100, "zipf": 0.0},
        cluster={"nodes": 2, "ranks_per_node": 1, "inter_gb_s": 1.0, "latency_us": 7.0},
    )
    choice, rank, node, *_ = predict(config)
    assert (choice.rows_sent, choice.intra_bytes, choice.inter_bytes, choice.plan_inter_bytes) == (50, 0, 20, 8)
    assert (rank.rows_sent, rank.intra_bytes, rank.inter_bytes, rank.plan_inter_bytes) == (50, 0, 22, 404)
    assert node.inter_bytes == 22
    assert (rank.mean_rows, rank.fullest_rows, rank.payload_bytes, rank.row_bytes) == (100, 100, 150 * 24, 2000)
    # Five collectives: 404 bytes, 1200 and 1000, and these again; 1 GB/s is 1e-6 ms for a byte.
    assert rank.milliseconds == pytest.approx(5 * 7e-3 + (404 + 2 * 1200 + 2 * 1000) * 1e-6)


def test_where_counts_first_cost_less() -> None:
    """K = 1, one expert per rank up to 512: a message has 4 + 100 * 4 bytes; counts first have 12 + 100 / P * 12."""
    model = {"experts": 250, "top_k": 1, "groups": 1, "limited_groups": 1}
    cluster = {"ranks_per_node": 1, "inter_gb_s": 1.0, "latency_us": 0.0}
    load = {"tokens_per_rank": 100}
    # 404 > 12 + 1200 / P from P = 4 on (3.06).
    assert find_crossing(config_with(model=model, load=load, cluster=cluster)) == Crossing(
        ranks_by_bytes=4, ranks_by_time=4
    )
    # (P - 1)(392 - 1200 / P) bytes in 10 us of 1 GB/s: more than 10000 from P = 29.5 on.
    found = find_crossing(config_with(model=model, load=load, cluster=cluster | {"latency_us": 10.0}))
    assert found == Crossing(ranks_by_bytes=4, ranks_by_time=30)
    far = cluster | {"latency_us": 1e9, "ranks_per_node": 8}  # 8 ranks more each time: up to the last in a second
    never = find_crossing(config_with(model=model, load={"tokens_per_rank": 1}, cluster=far))
    assert never.ranks_by_time is None
