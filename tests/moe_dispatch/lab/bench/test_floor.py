"""The floors move the rows of a workload and nothing else."""

import torch
import torch.distributed as dist

from moe_dispatch.lab.bench.config import DispatchConfig, ExchangeConfig, UlyssesConfig
from moe_dispatch.lab.bench.contenders.floor import floors_of, rows_between
from moe_dispatch.lab.bench.workloads.dispatch import DispatchWorkload
from moe_dispatch.lab.bench.workloads.of_config import workload_of
from moe_dispatch.lab.bench.workloads.ulysses import UlyssesWorkload
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting
from tests.support.lab.bench_workloads import ROUTED


def test_zipf_fills_the_first_experts() -> None:
    config = DispatchConfig(name="z", ranks=1, tokens=2000, dim=1, experts=8, top_k=2, dtype="float32", zipf=1.0)
    choice_tK = DispatchWorkload.of(config).choices(0)
    assert (choice_tK.flatten().bincount().diff() < 0).all()
    odds_E = 1 / torch.arange(1.0, 9.0)
    wanted_E = 2000 * odds_E / odds_E.sum()  # of the first of two choices without replacement
    assert ((choice_tK[:, 0].bincount() - wanted_E).abs() < 4 * wanted_E.sqrt()).all()
    even = DispatchConfig(name="u", ranks=1, tokens=2000, dim=1, experts=8, top_k=2, dtype="float32")
    choice_tK = DispatchWorkload.of(even).choices(0)
    assert (choice_tK[:, 0] != choice_tK[:, 1]).all()
    assert choice_tK.flatten().bincount().min() > 400


def test_floor_rows_are_those_that_the_choices_name() -> None:
    workload = DispatchWorkload.of(ROUTED)  # experts 0, 1 on rank 0
    for source, (once, each) in enumerate(
        zip(rows_between(workload, once=True), rows_between(workload, once=False), strict=True)
    ):
        tokens = workload.choices(source).tolist()
        assert each == [sum(e // 2 == rank for token in tokens for e in token) for rank in range(2)]
        assert once == [sum(any(e // 2 == rank for e in token) for token in tokens) for rank in range(2)]


def floor_bytes(config: ExchangeConfig) -> dict[str, int]:
    group = dist.group.WORLD
    assert group is not None
    workload = workload_of(config)
    found = {}
    for name, floor in floors_of(workload, group).items():
        with counting() as counts:
            floor.forward()
        with counting() as backward:
            floor.backward(None)
        planned = name == "planned floor"
        assert (len(counts.collectives), len(backward.collectives)) == (2 + planned, 2)
        assert backward.wire_bytes == counts.wire_bytes or planned
        found[name] = counts.wire_bytes
    return found


def test_the_floors_move_the_rows_and_nothing_else(rank_pool: RankPool) -> None:
    rows = {
        name: rows_between(DispatchWorkload.of(ROUTED), once="rank" in name)
        for name in ("rank floor", "choice floor")
    }
    for rank, found in enumerate(rank_pool.run(floor_bytes, 2, ROUTED)):
        wanted = {name: 4 * 7 * (n[rank][1 - rank] + n[1 - rank][rank]) for name, n in rows.items()}
        ids = 4 * (1 + ROUTED.tokens_per_rank[rank])  # a word, and for each token up to 4 ids of a byte
        assert found == {**wanted, "planned floor": wanted["rank floor"] + ids}


def test_the_attention_floor_moves_each_key_head_to_every_rank_that_needs_it(rank_pool: RankPool) -> None:
    config = UlyssesConfig(name="u", ranks=2, batch=2, seq=(5, 2), heads=6, kv_heads=2, head_dim=3, dtype="float32")
    straddling = UlyssesConfig(
        name="s", ranks=2, batch=2, seq=(5, 2), heads=3, kv_heads=1, head_dim=3, dtype="float32"
    )
    assert UlyssesWorkload.of(config).kv_needed == (1, 1)
    assert UlyssesWorkload.of(straddling).kv_needed == (1, 1)
    # rank 0 sends 2 x 5 tokens of 3 + 2 heads, and 2 x 2 tokens of 3 heads back
    assert rank_pool.run(floor_bytes, 2, config) == [
        {"floor": 4 * 3 * (10 * 5 + 4 * 3)},
        {"floor": 4 * 3 * (4 * 5 + 10 * 3)},
    ]
    assert rank_pool.run(floor_bytes, 2, straddling)[0] == {"floor": 4 * 3 * (10 * 3 + 4 * 2)}
    # 3 query heads share a key head: ranks of 4, 4, 4 and 3 heads need 2, 2, 2 and 1 of 5
    several = UlyssesConfig(name="k", ranks=4, batch=1, seq=4, heads=15, kv_heads=5, head_dim=1, dtype="float32")
    assert UlyssesWorkload.of(several).kv_needed == (2, 2, 2, 1)
    assert rank_pool.run(floor_bytes, 4, several)[3] == {"floor": 4 * (3 * (4 + 2 * 2) + 3 * 3)}
