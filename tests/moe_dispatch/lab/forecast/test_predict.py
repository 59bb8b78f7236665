"""Predictions, compared with numbers worked out by hand."""

from typing import Any

import pytest

from moe_dispatch.lab.forecast.config import load_plan_config
from moe_dispatch.lab.forecast.plan_bytes import PlanBytes, plan_bytes
from moe_dispatch.lab.forecast.predict import predict, widths_of
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


def test_the_bytes_of_both_forms_of_a_plan() -> None:
    """K = 1 of 32 experts, 2 on each of 16 ranks: 15 of 16 tokens leave their rank, with a number and a step of ids.
    A row is 10 x 2 + 4 bytes, too narrow to be padded. 13 ranks are the first by counts."""
    model = {"dim": 10, "experts": 32, "top_k": 1, "groups": 1, "limited_groups": 1}
    configs = [
        config_with(model=model, load={"tokens_per_rank": 160}, cluster={"nodes": nodes, "ranks_per_node": 4})
        for nodes in (4, 3)
    ]
    of_12, of_16, *of_many = plan_bytes(configs)
    assert of_16 == PlanBytes(
        ranks=16,
        by_ids=15 * (4 + 640),
        counts=15 * 32,
        riding=150 * 8,
        by_ids_ms=12 * 644 / 50e6,  # 3 of 15 peers are on the node, whose links are faster than they need to be
        by_counts_ms=1680 * 12 / 15 / 50e6,
        form="by counts",
    )
    assert of_16.by_counts == 1680
    assert (of_12.ranks, of_12.by_ids, of_12.counts, of_12.form) == (12, 11 * 644, 11 * 32, "by ids")
    assert [each.ranks for each in of_many] == [64, 256, 1024]
    of_a_node, *_ = plan_bytes(
        [config_with(load={"tokens_per_rank": 160}, cluster={"ranks_per_node": 64, "nodes": 1})]
    )
    assert of_a_node.by_ids_ms == of_a_node.by_ids / 160e6


@pytest.mark.parametrize("nodes", [1, 4])
def test_the_rows_that_ids_ride_beside_are_those_of_the_prediction(nodes: int) -> None:
    config = config_with(cluster={"nodes": nodes, "ranks_per_node": 16})
    _, rank, *_ = predict(config)
    widths, (first, *_) = widths_of(config), plan_bytes([config])
    wider = widths.riding_row(config.model.experts) - widths.weighted_row
    assert first.riding == pytest.approx(rank.rows_sent * wider, rel=1e-12)


def test_ids_beside_rows_are_bytes_of_dispatch_and_not_of_backward() -> None:
    """As above, 16 nodes of a rank each: rows of 32 bytes forth, gradients of 24, results of 20."""
    model = {"dim": 10, "experts": 32, "top_k": 1, "groups": 1, "limited_groups": 1}
    cluster = {"nodes": 16, "ranks_per_node": 1, "inter_gb_s": 1.0, "latency_us": 0.0}
    config = config_with(model=model, load={"tokens_per_rank": 160, "zipf": 0.0}, cluster=cluster)
    _, rank, *_ = predict(config)
    assert (rank.rows_sent, rank.inter_bytes, rank.plan_inter_bytes) == (150, 150 * 52 / 160, 480)
    assert rank.milliseconds == pytest.approx((480 + 150 * (32 + 24 + 2 * 20)) * 1e-6)
