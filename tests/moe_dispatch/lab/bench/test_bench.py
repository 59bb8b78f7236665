"""The benchmark: it counts what is there, refuses wrong contenders, and tells and writes what it measured."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from moe_dispatch.lab import cli
from moe_dispatch.lab.bench import command, memory
from moe_dispatch.lab.bench.config import DispatchConfig, UlyssesConfig, WorkloadConfig, load_bench
from moe_dispatch.lab.bench.contenders.contender import contenders_of
from moe_dispatch.lab.bench.contenders.floor import floors_of, rows_between
from moe_dispatch.lab.bench.contenders.ours import OurDispatch
from moe_dispatch.lab.bench.contenders.textbook import TextbookDispatch
from moe_dispatch.lab.bench.measure import Run, account, measure, problem_of, time_in_turns
from moe_dispatch.lab.bench.memory import ALLOCATOR, bytes_kept, peak_bytes
from moe_dispatch.lab.bench.phases import phases_of
from moe_dispatch.lab.bench.plot import write_plot
from moe_dispatch.lab.bench.report import Setting, print_bench
from moe_dispatch.lab.bench.results import Line, Traffic, WorkloadResult, largest
from moe_dispatch.lab.bench.workload import DispatchWorkload, NotApplicable, UlyssesWorkload
from moe_dispatch.lab.validate.report import output_console
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import Counts, counting, run_backward

CONFIGS = Path(__file__).parents[4] / "configs"
HERE = __name__
TINY = load_bench(CONFIGS / "bench_tiny.toml")
ROUTED = DispatchConfig(name="r", ranks=2, tokens=(5, 3), dim=7, experts=4, top_k=2, dtype="float32")
PNG = b"\x89PNG"


# ---- adapters ------------------------------------------------------------------------------------------


class Careful(OurDispatch):
    """A good one, of another name."""


class CarefulUlysses:
    kind = "ulysses"

    def __init__(self, workload: UlyssesWorkload, group: dist.ProcessGroup) -> None:
        raise NotApplicable("does nothing at all")

    def forward(self) -> None: ...


class Unweighted(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, torch.ones_like(weight_tK) + 0 * weight_tK)


class WithoutGradientOfWeights(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, weight_tK.detach() + 0 * weight_tK)


class WrongOnTheLastRank(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, weight_tK) * (1 + 0.5 * self.group.rank())


class OfAnotherShape(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        return super().forward(x_tD, expert_tK, weight_tK).unsqueeze(0)


class Raises(OurDispatch):
    def forward(self, x_tD: Tensor, expert_tK: Tensor, weight_tK: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")


class Odd:
    kind = "attention"

    def forward(self) -> None: ...


# ---- counting ------------------------------------------------------------------------------------------


def counts_of_layer(name: str, config: WorkloadConfig) -> tuple[Counts, Counts]:
    """What the forward and the backward of one contender do on this rank."""
    group = dist.group.WORLD
    assert group is not None
    workload = DispatchWorkload.of(config) if isinstance(config, DispatchConfig) else UlyssesWorkload.of(config)
    case = workload.case(group.rank())
    contender = contenders_of(workload.kind, "")[name](workload, group)
    with counting() as forward:
        out = contender.forward(*case.inputs)
    with counting() as backward:
        run_backward(out, case.grad_out)
    torch.testing.assert_close(case.leaves[0].grad, case.grads[0].to(out.dtype))
    return forward, backward


@pytest.mark.parametrize("name", ["ours", "textbook"])
def test_three_collectives_and_one_host_sync_forward_and_two_collectives_backward(
    rank_pool: RankPool, name: str
) -> None:
    for forward, backward in rank_pool.run(counts_of_layer, 2, name, ROUTED):
        assert forward.collectives == ["c10d::alltoall_base_"] * 3
        assert backward.collectives == ["c10d::alltoall_base_"] * 2
        assert len(forward.host_syncs) == 1, forward.host_syncs
        assert backward.host_syncs == []


def test_bytes_to_oneself_are_not_on_the_wire(rank_pool: RankPool) -> None:
    once, per_choice = (rows_between(DispatchWorkload.of(ROUTED), once=once) for once in (True, False))
    results = rank_pool.run(counts_of_layer, 2, "textbook", ROUTED)
    for rank, (forward, backward) in enumerate(results):
        there, home = per_choice[rank][1 - rank], per_choice[1 - rank][rank]
        assert forward.wire_bytes == 2 * 8 + 4 * 7 * (there + home)  # the counts of 2 experts, int64
        assert backward.wire_bytes == 4 * 7 * (there + home)
    for rank, (_, backward) in enumerate(rank_pool.run(counts_of_layer, 2, "ours", ROUTED)):
        there, home = once[rank][1 - rank], once[1 - rank][rank]
        assert backward.wire_bytes == 4 * 7 * (there + home) + 4 * 2 * home  # K gradients of weights come along


@pytest.mark.parametrize(("name", "collectives"), [("ours", 2), ("textbook", 4)])
def test_attention_takes_two_collectives_each_way_and_the_textbook_four(
    rank_pool: RankPool, name: str, collectives: int
) -> None:
    for counts in rank_pool.run(counts_of_layer, 2, name, TINY.ulysses[0]):
        assert [len(passed.collectives) for passed in counts] == [collectives] * 2


def reads_item(x: Tensor) -> Any:
    return x.sum().item()


def reads_bool(x: Tensor) -> Any:
    return 1 if x.sum() > 0 else 0


def reads_list(x: Tensor) -> Any:
    return x.tolist()


def reads_copied_list(x: Tensor) -> Any:
    on_host = torch.cat([x, x]).cpu().split(2)
    return [part.tolist() for part in on_host], int(on_host[0][1]), bool(on_host[1].sum() > 0)


def reads_what_was_copied_before(x: Tensor) -> Any:
    return x.cpu().tolist(), x.tolist()


def reads_mask(x: Tensor) -> Any:
    return x[x > 0]


def reads_where(x: Tensor) -> Any:
    return torch.where(x > 0), x.unique()


def reads_to_cpu(x: Tensor) -> Any:
    return x.to("cpu").numpy(), x.to(torch.float64), x.to(x.device)


def reads_repeats(x: Tensor) -> Any:
    number = x.long()
    return x.repeat_interleave(number), x.repeat_interleave(number, output_size=3)


def reads_nothing(x: Tensor) -> Any:
    return torch.nonzero_static(x, size=1), x.argsort(), x[torch.tensor([1, 0])], x.shape[0]


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (reads_item, ["aten::_local_scalar_dense"]),
        (reads_bool, ["aten::_local_scalar_dense"]),
        (reads_list, ["tolist"]),
        (reads_copied_list, ["cpu"]),
        (reads_what_was_copied_before, ["cpu", "tolist"]),
        (reads_mask, ["aten::index.Tensor"]),
        (reads_where, ["aten::nonzero", "aten::_unique2"]),
        (reads_to_cpu, ["to"]),
        (reads_repeats, ["aten::repeat_interleave.Tensor"]),
        (reads_nothing, []),
    ],
)
def test_host_syncs_are_counted_where_cuda_would_wait(read: Callable[[Tensor], Any], found: list[str]) -> None:
    with counting() as counts:
        read(torch.tensor([1.0, 2.0]))
    assert counts.host_syncs == found


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grads[0].cpu().tolist()
        grads[0].sum().item()
        return 2 * grads[0]


def test_host_syncs_inside_a_backward_are_counted() -> None:
    x = torch.ones(2, requires_grad=True)
    out = ReadsInBackward.apply(x)
    assert isinstance(out, Tensor)
    with counting() as counts:
        run_backward(out, torch.ones(2))
    assert counts.host_syncs == ["cpu", "aten::_local_scalar_dense"]
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0]


def other_collectives() -> list[int]:
    """Wire bytes of each, on this rank."""
    found, whole, group = [], torch.ones(6), dist.group.WORLD  # 24 bytes
    assert group is not None
    for call in (
        lambda: dist.all_reduce(whole),
        lambda: dist.all_gather([torch.empty(6) for _ in range(3)], whole),
        lambda: dist.all_gather_single(torch.empty(18), whole),
        lambda: dist.reduce_scatter_single(torch.empty(2), whole),
        lambda: dist.all_to_all_single(torch.empty(6), whole),
        lambda: dist.broadcast(whole, src=0),
        lambda: functional.all_to_all_single(whole, [2, 2, 2], [2, 2, 2], group).sum(),
    ):
        with counting() as counts:
            call()
        assert len(counts.collectives) == 1, counts.collectives
        found.append(counts.wire_bytes)
    return found


def test_other_collectives_count_what_a_ring_moves(rank_pool: RankPool) -> None:
    assert rank_pool.run(other_collectives, 3) == [[32, 48, 48, 16, 16, 24, 16]] * 3


# ---- memory --------------------------------------------------------------------------------------------


class KeepsOnTheContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mine = (torch.zeros(100), x)  # not through save_for_backward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize(
    ("forward", "kept"),
    [
        (lambda x: x * 2, 0),
        (lambda x: x.exp(), 0),  # it keeps its output, which the caller has
        (lambda x: x.exp() * 2, 40),
        (lambda x: (y := x.exp())[:5] * y[5:], 40),  # one storage, kept three times
        (lambda x: KeepsOnTheContext.apply(x), 400),
    ],
)
def test_bytes_kept_are_unique_storages_of_nodes_and_contexts(forward: Callable[[Tensor], Tensor], kept: int) -> None:
    x = torch.ones(10, requires_grad=True)
    assert bytes_kept(lambda: forward(x), lambda: [x]) == kept


def test_bytes_that_are_held_for_a_moment_only_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []  # as gloo's thread holds the buffers of its last collective
    monkeypatch.setattr(memory.time, "sleep", lambda _: held.clear())

    def forward() -> Tensor:
        held.append(torch.zeros(100))
        return torch.ones(1)

    assert bytes_kept(forward, list) == 0


def test_the_peak_is_what_a_call_needs_at_once() -> None:
    size = 64 * 2**20
    peak = peak_bytes(lambda: torch.zeros(size, dtype=torch.uint8).fill_(1))
    assert peak is not None
    assert 0.9 * size < peak < 1.5 * size
    assert (peak_bytes(lambda: None) or 0) < 0.1 * size  # what was freed is no longer there


def test_pages_that_were_freed_before_a_call_count_when_it_takes_them_again() -> None:
    size, number = 64 * 2**10, 512  # small enough to come from the heap

    def blocks() -> list[Tensor]:
        return [torch.zeros(size, dtype=torch.uint8).fill_(1) for _ in range(number)]

    freed, above = blocks(), torch.ones(size, dtype=torch.uint8)  # the heap cannot shrink below this one
    del freed
    assert (peak_bytes(blocks) or 0) > 0.8 * size * number
    assert len(above) == size


# ---- workloads and floors ------------------------------------------------------------------------------


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


def floor_bytes(config: WorkloadConfig) -> dict[str, int]:
    group = dist.group.WORLD
    assert group is not None
    workload = DispatchWorkload.of(config) if isinstance(config, DispatchConfig) else UlyssesWorkload.of(config)
    found = {}
    for name, floor in floors_of(workload, group).items():
        with counting() as counts:
            floor.forward()
        with counting() as backward:
            floor.backward()
        assert len(counts.collectives) == len(backward.collectives) == 2
        assert backward.wire_bytes == counts.wire_bytes
        found[name] = counts.wire_bytes
    return found


def test_the_floors_move_the_rows_and_nothing_else(rank_pool: RankPool) -> None:
    rows = {
        name: rows_between(DispatchWorkload.of(ROUTED), once="rank" in name)
        for name in ("rank floor", "choice floor")
    }
    for rank, found in enumerate(rank_pool.run(floor_bytes, 2, ROUTED)):
        wanted = {name: 4 * 7 * (n[rank][1 - rank] + n[1 - rank][rank]) for name, n in rows.items()}
        assert found == wanted


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


# ---- a run ---------------------------------------------------------------------------------------------


def test_the_textbook_refuses_uneven_shards(rank_pool: RankPool) -> None:
    lines = {line.name: line for line in rank_pool.run(measure, 2, TINY.ulysses[1], "", 1, False)[0][0]}
    assert lines["textbook"].absent == "needs even shards; tokens per rank are (9, 4)"
    assert not lines["textbook"].wrong
    assert len(lines["ours"].both_ms) == 1


def test_turns_multiply_repetitions(rank_pool: RankPool) -> None:
    config = replace(ROUTED, turns=3)
    assert config.shape.endswith("float32, 3 turns a repetition")
    for lines, _ in rank_pool.run(measure, 2, config, "", 2, False):
        assert {len(line.both_ms) for line in lines} == {6}


def kept_for_backward(rank: int, dim: int) -> int | None:
    group, workload = dist.group.WORLD, DispatchWorkload.of(replace(ROUTED, dim=dim, tokens=(50, 30)))
    assert group is not None
    case, contender = workload.case(rank), contenders_of("dispatch", "")["experts weigh"](workload, group)
    contender.forward(*case.inputs)  # what a sharding keeps is made once
    return account("experts weigh", Run(contender, case)).kept_bytes


def test_dispatch_and_combine_keep_indices_only(rank_pool: RankPool) -> None:
    """However wide the rows are. M 80, S and R about 80, t 50 or 30: at most 8 numbers of 8 bytes for each."""
    narrow, wide = (rank_pool.run(kept_for_backward, 2, dim) for dim in (1, 256))
    assert narrow == wide
    assert all(kept is not None and 0 < kept < 8 * 8 * 100 for kept in narrow)


def turns() -> list[str]:
    called: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self) -> Tensor:
            called.append(self.name)
            return torch.ones(1)

        def backward(self, out: Tensor) -> None: ...

    times = time_in_turns({name: Noted(name) for name in "abc"}, 3)  # type: ignore[dict-item]
    assert all(len(of_name) == 3 and min(both for _, both in of_name) >= 0 for of_name in times.values())
    return called


def test_contenders_take_turns_and_each_goes_first(rank_pool: RankPool) -> None:
    assert rank_pool.run(turns, 2) == [list("cab") + list("abc") + list("bca") + list("cab")] * 2


def profile_layer(rank: int) -> dict[str, float]:
    group, workload = dist.group.WORLD, DispatchWorkload.of(ROUTED)
    assert group is not None
    return phases_of(Run(TextbookDispatch(workload, group), workload.case(rank)))


def test_a_profile_tells_the_exchange_from_the_rest(rank_pool: RankPool) -> None:
    for phases in rank_pool.run(profile_layer, 2):
        assert {"exchange", "gather rows", "sum rows", "sort", "Python and the rest"} < set(phases)
        assert min(phases["exchange"], phases["gather rows"], phases["sum rows"], phases["sort"]) > 0


def test_a_line_is_the_largest_of_all_ranks() -> None:
    def line(forward: tuple[float, ...], moved: int, kept: int) -> Line:
        traffic = Traffic(collectives=3, wire_bytes=moved, host_syncs=1)
        return Line(name="x", forward_ms=forward, both_ms=forward, forward=traffic, backward=traffic, kept_bytes=kept)

    merged = largest([line((1.0, 5.0), 10, 7), line((2.0, 3.0), 20, 6)])
    assert merged.forward_ms == (2.0, 5.0)
    assert merged.forward == Traffic(collectives=3, wire_bytes=20, host_syncs=1)
    assert (merged.kept_bytes, merged.peak_bytes) == (7, None)


def test_the_table_prints_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    def line(name: str, forward_ms: tuple[float, ...], both_ms: tuple[float, ...], **given: Any) -> Line:
        return Line(name=name, forward_ms=forward_ms, both_ms=both_ms, **given)

    ours = line(
        "ours",
        (5.0, 4.0, 9.0),
        (12.0, 11.0, 20.0),
        forward=Traffic(collectives=3, wire_bytes=23_700_000, host_syncs=1),
        backward=Traffic(collectives=2, wire_bytes=23_600_000, host_syncs=0),
        kept_bytes=857_000,
        peak_bytes=143_000_000,
    )
    lines = (ours, line("rank floor", (2.0, 1.0, 3.0), (4.0, 3.0, 5.0)), line("choice floor", (4.0,), (8.0,)))
    result = WorkloadResult(name="w", kind="dispatch", shape="any", allocator=("A=1",), lines=lines)
    setting = Setting(torch="9.9", cores=7, load_average=0.25, repeat=3)
    print_bench(output_console(), setting, [result])
    printed = [" ".join(row.split()) for row in capsys.readouterr().out.splitlines()]
    assert (
        "torch 9.9, 7 cores, load average 0.2 at the start; one thread per rank; median (minimum) of 3 repetitions"
        in (printed[0])
    )
    assert printed[1] == "allocator of every rank: A=1"
    assert "w ours 5.0 (4.0) 2.5 12.0 (11.0) 3.0 23.7 + 23.6 3 + 2 1 + 0 0.857 143" in printed
    assert "rank floor 2.0 (1.0) 1.0 4.0 (3.0) 1.0" in printed
    assert "choice floor 4.0 (4.0) 2.0 8.0 (8.0) 2.0" in printed


# ---- the command ---------------------------------------------------------------------------------------


def test_a_run_prints_a_table_and_writes_json_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, plot_path = tmp_path / "out.json", tmp_path / "out.png"
    before = dict(os.environ)
    argv = ["bench", "bench_tiny", "--repeat", "2", "--workloads", "uneven, Zipf", "--adapter", f"{HERE}:Careful"]
    assert cli.main([*argv, "--json", str(json_path), "--plot", str(plot_path), "--profile"]) == 0
    assert dict(os.environ) == before
    out = capsys.readouterr().out
    for row in ("ours", "textbook", "Careful", "rank floor", "choice floor"):
        assert re.search(rf"{row} +\d+\.\d \(\d+\.\d\) +\d", out), (row, out)
    assert "uneven, Zipf: 2 ranks, tokens 48+0, D 16, E 5, K 3, bfloat16, Zipf 1" in out
    assert all(f"{name}={value}" in out for name, value in ALLOCATOR)
    assert f"torch {torch.__version__}" in out
    assert re.search(r"exchange +\d+\.\d ms +\d+%", out)
    assert plot_path.read_bytes().startswith(PNG)
    document = json.loads(json_path.read_text())
    assert document["passed"] is True
    (workload,) = document["workloads"]
    ours, weighing, textbook, careful, *floors = workload["lines"]
    assert weighing["name"] == "experts weigh"
    assert [floor["name"] for floor in floors] == ["rank floor", "choice floor"]
    assert ours["forward"] == careful["forward"]
    assert (ours["forward"]["collectives"], ours["forward"]["host_syncs"]) == (3, 1)
    assert (ours["backward"]["collectives"], ours["backward"]["host_syncs"]) == (2, 0)
    assert len(textbook["both_ms"]) == 2
    assert all(both > forward > 0 for both, forward in zip(ours["both_ms"], ours["forward_ms"], strict=True))


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("WithoutGradientOfWeights", r"rank 0: the gradient of input 2 is off by "),
        ("WrongOnTheLastRank", r"rank 1: the output is off by "),
        ("OfAnotherShape", r"rank 0: the output is \(1, 32, 16\), but it has to be \(32, 16\)"),
    ],
)
def test_wrong_results_on_any_rank_are_told_on_every_rank(rank_pool: RankPool, adapter: str, told: str) -> None:
    for lines, _ in rank_pool.run(measure, 2, TINY.dispatch[0], f"{HERE}:{adapter}", 1, False):
        (refused,) = [line for line in lines if line.name == adapter]
        assert refused.wrong
        assert re.match(told, refused.absent)
        assert not refused.both_ms


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ("Unweighted", r"\n  Unweighted was refused: rank 0: the output is off by "),
        ("Raises", r"\n  broke off: measure failed on \d of 2 ranks[\s\S]*no such kernel"),
    ],
)
def test_a_wrong_contender_fails_the_run(adapter: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "bench_tiny", "--repeat", "1", "--workloads", "even", "--adapter", f"{HERE}:{adapter}"]
    assert cli.main(argv) == 1
    assert re.search(told, capsys.readouterr().out)


DISPATCH = '[[dispatch]]\nname = "x"\nranks = 2\ntokens = 4\ndim = 3\nexperts = 4\ntop_k = 2\ndtype = "float32"\n'
ULYSSES = """[[ulysses]]
name = "u"
ranks = 2
batch = 1
seq = 4
heads = 4
kv_heads = 2
head_dim = 3
dtype = "float32"
"""


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["none"], r"config none does not exist; name a TOML file, or a packaged config: 'bench', 'bench_tiny'\n$"),
        (["bench_tiny", "--adapter", "none"], r"adapter 'none' is not of the form package.module:Name"),
        (
            ["bench_tiny", "--adapter", "no_such.module:Name"],
            r"adapter .* cannot be imported \(No module named 'no_such'",
        ),
        (["bench_tiny", "--adapter", f"{HERE}:Missing"], r"Missing does not exist; see"),
        (["bench_tiny", "--adapter", f"{HERE}:HERE"], r"HERE is no class with a method forward"),
        (
            ["bench_tiny", "--adapter", f"{HERE}:Odd"],
            r'has kind = \'attention\'; it has to be "dispatch" or "ulysses"',
        ),
        (["bench_tiny", "--workloads", "evn"], r"no workload of the config is named 'evn'; .*did you mean 'even'"),
        (["bench_tiny", "--plot", "out.doc"], r"out.doc is no file type for a plot"),
        (["bench_tiny", "--json", "none/out.json"], r"none/out.json cannot be written: the folder"),
    ],
)
def test_wrong_input_is_told_before_anything_runs(
    argv: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(command, "run_workload")
    assert cli.main(["bench", *argv]) == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", r"it has no workload; add a \[\[dispatch\]\]"),
        ("a b", r"cannot be read \(Expected '='"),
        (DISPATCH * 2, r'two workloads are named "x"; name each once'),
        (DISPATCH.replace("tokens = 4", "tokens = [4]"), r'"x": tokens has 1 numbers for 2 ranks'),
        (
            DISPATCH.replace("tokens = 4", "tokens = [4, -1]"),
            r'"x": tokens is \(4, -1\); numbers have to be at least 0',
        ),
        (DISPATCH.replace("top_k = 2", "top_k = 5"), r'"x": top_k is 5, of 4 experts'),
        (DISPATCH.replace("dim = 3", ""), r'dispatch\[0\].dim \("x"\) is missing'),
        (
            DISPATCH.replace("dim = 3", 'dim = "3"'),
            r'dispatch\[0\].dim \("x"\) is \'3\': input should be a valid int',
        ),
        (DISPATCH.replace("dim", "dims"), r'dispatch\[0\].dims \("x"\) is not a known key'),
        (DISPATCH.replace('"float32"', '"int8"'), r"is 'int8': input should be 'bfloat16'"),
        (ULYSSES.replace("kv_heads = 2", "kv_heads = 3"), r'"u": kv_heads is 3; it has to divide heads, which is 4'),
        (ULYSSES.replace("seq = 4", "seq = [0, 0]"), r'"u": seq is \(0, 0\); numbers have to be'),
    ],
)
def test_a_config_that_cannot_be_used_is_told_with_its_key(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        load_bench(path)


def test_the_configs_of_the_project_load() -> None:
    names = [workload.name for workload in load_bench(CONFIGS / "bench.toml").workloads]
    assert names == ["a", "b", "c", "a, Zipf", "a, uneven", "d", "e", "d, uneven"]


def test_an_adapter_of_attention_is_timed_with_attention_only() -> None:
    adapter = f"{HERE}:CarefulUlysses"
    assert list(contenders_of("ulysses", adapter)) == ["ours", "textbook", "CarefulUlysses"]
    assert list(contenders_of("dispatch", adapter)) == ["ours", "experts weigh", "textbook"]


def test_a_plot_without_a_finished_workload_says_so(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    write_plot(path, [WorkloadResult(name="x", kind="dispatch", shape="", error="it broke")])
    assert "no workload ran to its end" in path.read_text()


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5"])
def test_repetitions_have_to_be_a_number_above_0(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--repeat", text])
    assert f"{text!r} is not a whole number above 0" in capsys.readouterr().err


def adapter_of_page(config: DispatchConfig) -> str:
    """What is wrong with the adapter that docs/bench.md shows."""
    group = dist.group.WORLD
    assert group is not None
    names: dict[str, Any] = {}
    page = (Path(__file__).parents[4] / "docs/bench.md").read_text()
    exec("from moe_dispatch import combine, dispatch, plan_dispatch", names)
    exec(next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Name" in block), names)
    workload = DispatchWorkload.of(config)
    return problem_of(Run(names["Name"](workload, group), workload.case(group.rank())), workload.dtype)


def test_the_adapter_of_the_documentation_is_right(rank_pool: RankPool) -> None:
    assert rank_pool.run(adapter_of_page, 2, ROUTED) == ["", ""]
