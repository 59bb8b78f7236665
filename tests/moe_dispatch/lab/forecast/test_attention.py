"""The attention part of a plan: what choose_scheme says, where schemes cross, wrong input."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.lab import cli
from moe_dispatch.lab.forecast.attention import forecast_attention
from moe_dispatch.lab.forecast.config import AttentionDims, PlanConfig, load_plan_config
from sp_attention import Machine, balance, choose_scheme
from tests.support.lab.configs import CONFIGS

pytestmark = pytest.mark.usefixtures("uncovered")

PLAN = CONFIGS / "plan" / "deepseek_v3.toml"
SMALL = AttentionDims(heads=16, kv_heads=4, width=8, value_width=8, length=4096, ranks=4, tflop_s=1.0)


def small_config() -> PlanConfig:
    config = load_plan_config(PLAN, {})
    return replace(config, cluster=replace(config.cluster, latency_us=0.0))


def machine_of(config: PlanConfig, tflop_s: float) -> Machine:
    cluster = config.cluster
    return Machine(
        ranks_per_node=cluster.ranks_per_node,
        intra_gb_s=cluster.intra_gb_s,
        inter_gb_s=cluster.inter_gb_s,
        latency_us=cluster.latency_us,
        tflop_s=tflop_s,
    )


@pytest.mark.parametrize("window", [0, 100])
def test_it_is_what_choose_scheme_says(window: int) -> None:
    config = small_config()
    attention = replace(SMALL, window=window, documents=(3000, 700))
    forecast = forecast_attention(config, attention)
    cu_seqlens = torch.tensor([0, 3000, 3700])
    orders = {
        "contiguous": TokenSharding(batch=1, seq=Partition.balanced(4096, 4)),
        "zigzag": TokenSharding.zigzag(batch=1, length=4096, ranks=4),
        "balance": balance(cu_seqlens, 4, length=4096, cu_seqlens_padded=cu_seqlens),
    }
    choices = {
        name: choose_scheme(
            order,
            num_heads=(16, 4),
            widths=(8, 8),
            dtype=torch.bfloat16,
            machine=machine_of(config, 1.0),
            is_causal=True,
            window=(window, -1) if window else None,
            cu_seqlens=cu_seqlens,
            cu_seqlens_padded=cu_seqlens,
        )
        for name, order in orders.items()
    }
    by_order = {name: [row.cost for row in forecast.rows if row.order == name] for name in orders}
    first = forecast.rows[0].order
    assert by_order[first] == list(choices[first].costs)
    assert all(by_order[name] == [choices[name].costs[0]] for name in orders if name != first)
    assert forecast.rows[0].cost.milliseconds == min(each.costs[0].milliseconds for each in choices.values())


def test_where_schemes_cross() -> None:
    """On one link and without work, below 2 (N + G) / G = 10 ranks gathered keys are least; beyond it U = G."""
    config = small_config()
    even = replace(config, cluster=replace(config.cluster, ranks_per_node=1, inter_gb_s=1.0))
    forecast = forecast_attention(even, replace(SMALL, tflop_s=1e9))
    assert [row.ranks for row in forecast.by_ranks] == [2, 4, 8, 16, 32, 64]
    assert forecast.by_ranks[1] == forecast.rows[0]  # of all schemes, over the 4 ranks that were asked for
    names = [row.name for row in forecast.by_ranks]
    assert names[0] == "gather, kept"
    assert names[-1] == "4 head ranks, gather, kept"
    assert names == sorted(names, key=lambda name: name != "gather, kept")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "mixtral_8x7b", "--length", "640", "--sequence-ranks", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (
        "Attention: 32 heads, 8 of keys and values, of 128 and 128 x bfloat16; causal, 640 tokens over 2" in printed
    )
    assert "Cheapest by the number of ranks: " in printed
    found = json.loads(out.read_text())["attention"]
    assert {row["ranks"] for row in found["schemes"]} == {2}
    assert {"order", "scheme", "milliseconds", "intra_bytes", "balance"} <= found["schemes"][0].keys()
    assert [row["ranks"] for row in found["by_ranks"]] == [2, 4, 8, 16, 32, 64]


def test_without_the_table_there_is_no_such_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "mine.toml", tmp_path / "plan.json"
    path.write_text(PLAN.read_text().split("[attention]")[0])
    assert cli.main(["plan", str(path), "--json", str(out)]) == 0
    assert "Attention" not in capsys.readouterr().out
    assert "attention" not in json.loads(out.read_text())
    assert cli.main(["plan", str(path), "--length", "9"]) == 2
    assert "attention.heads is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kv_heads": 3}, "attention.kv_heads is 3, but there are 128 query heads; it has to divide them"),
        ({"documents": [100000, 40000]}, "attention.documents are 140000 tokens"),
        ({"documents": [0, 5]}, "the shortest of 0; each has at least 1"),
        ({"ranks": 128}, "attention.ranks is 128"),
    ],
)
def test_wrong_input(change: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load_plan_config(PLAN, {"attention": change})


def test_windows_and_documents_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    numbers = asdict(replace(SMALL, window=9, ranks=2)) | {"documents": [30, 20]}
    table = "\n".join(f"{key} = {value}" for key, value in numbers.items())
    path.write_text(f"{PLAN.read_text().split('[attention]')[0]}[attention]\n{table}\n")
    assert cli.main(["plan", str(path)]) == 0
    assert "causal, window 9, 2 documents, 4096 tokens over 2 ranks, 1 TFLOP/s" in capsys.readouterr().out
