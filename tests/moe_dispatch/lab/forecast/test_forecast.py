"""What ``plan`` predicts is what runs: the bytes of every collective, to every rank, forward and backward."""

import dataclasses
import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch import (
    Partition,
    TokenSharding,
    combine,
    dispatch,
    plan_dispatch,
    plan_hierarchical,
)
from moe_dispatch.lab import cli
from moe_dispatch.lab.bench.contenders.textbook import TextbookDispatch
from moe_dispatch.lab.forecast.chances import uniform_chances, zipf_chances
from moe_dispatch.lab.forecast.config import load_plan_config
from moe_dispatch.lab.forecast.demand import counted_demand, expected_demand
from moe_dispatch.lab.forecast.predict import Crossing, crossing, link_sums, predict
from moe_dispatch.lab.forecast.traffic import Traffic, Widths, row_per_choice, row_per_node, row_per_rank
from moe_dispatch.testing import RankPool
from tests.support.dense import make_case
from tests.support.layouts import Layout
from tests.support.plans import node_groups

PLANS = Path(__file__).parents[4] / "configs" / "plan"
Sent = list[list[int]]  # of each collective, bytes to each rank of its group


class Recorder(TorchDispatchMode):
    """Bytes to each rank of every all-to-all."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            assert func.name() == "c10d::alltoall_base_"
            rows, splits = args[1], args[4]
            row_bytes = rows.numel() * rows.itemsize // max(len(rows), 1)
            self.sent.append([count * row_bytes for count in splits])
        return func(*args, **kwargs or {})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    layout: Layout
    experts: tuple[int, ...]
    num_nodes: int
    expert_BLK: Tensor
    dim: int
    x_dtype: torch.dtype

    @property
    def widths(self) -> Widths:
        itemsize = self.x_dtype.itemsize
        return Widths(dim=self.dim, num_choices=self.expert_BLK.shape[2], row_bytes=itemsize, weight_bytes=4)

    def traffic(self, scheme: Callable[..., Traffic]) -> Traffic:
        ids = [ids_BlK.flatten(0, 1) for ids_BlK in self.layout.cut(self.expert_BLK)]
        return scheme(counted_demand(ids, Partition(self.experts), self.num_nodes), self.widths)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def run_inputs(rank: int, run: Run) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    expert_BlK = run.layout.cut(run.expert_BLK)[rank]
    x_BlD = torch.ones(*expert_BlK.shape[:2], run.dim, dtype=run.x_dtype, requires_grad=True)
    weight_BlK = torch.ones(expert_BlK.shape, requires_grad=True)
    sharding = TokenSharding(batch=Partition(run.layout.batch), seq=Partition(run.layout.seq))
    return expert_BlK, x_BlD, weight_BlK, {"dim": run.dim, "sharding": sharding, "experts": Partition(run.experts)}


def run_flat(rank: int, run: Run) -> Sent:
    expert_BlK, x_BlD, weight_BlK, given = run_inputs(rank, run)
    with Recorder() as recorder:
        plan = plan_dispatch(expert_BlK, group=dist.group.WORLD, **given)  # type: ignore[arg-type]
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        combine(x_MD, plan, weight_M).sum().backward()
    return recorder.sent


def run_nodes(rank: int, run: Run) -> Sent:
    expert_BlK, x_BlD, weight_BlK, given = run_inputs(rank, run)
    with node_groups(rank, run.num_nodes, len(run.experts) // run.num_nodes) as nodes, Recorder() as recorder:
        plan = plan_hierarchical(expert_BlK, nodes=nodes, **given)
        x_MD, weight_M = dispatch(x_BlD, weight_BlK, plan)
        combine(x_MD, plan, weight_M).sum().backward()
        return list(recorder.sent)


def run_textbook(rank: int, run: Run) -> Sent:
    expert_BlK, x_BlD, weight_BlK, _ = run_inputs(rank, run)
    layer = TextbookDispatch(SimpleNamespace(experts=Partition(run.experts)), dist.group.WORLD)  # type: ignore[arg-type]
    with Recorder() as recorder:
        y_tD = layer.forward(*(t.flatten(0, 1) for t in (x_BlD, expert_BlK, weight_BlK)))
        y_tD.sum().backward()
    return recorder.sent


# ---- bytes of real runs ----------------------------------------------------------------------------------


def runs(ranks: int, num_nodes: int, routings: tuple[str, ...]) -> list[Run]:
    """Uneven shards of 2 rows, an empty one among them; uneven experts; one and two bytes per id."""
    torch.manual_seed(ranks)
    layout = Layout(batch=(2,), seq={2: (5, 2), 4: (4, 0, 1, 3)}[ranks])
    found = []
    for i, routing in enumerate(routings):
        experts = [{2: (3, 2), 4: (2, 1, 0, 3)}, {2: (150, 120), 4: (100, 0, 20, 180)}][i % 2][ranks]
        case = make_case(layout, routing, experts=experts, num_choices=(3, 6)[i % 2], dim=1, width=1)
        dtype = (torch.float32, torch.bfloat16)[i % 2]
        found.append(
            Run(
                layout=layout,
                experts=experts,
                num_nodes=num_nodes,
                expert_BLK=case.expert_BLK,
                dim=(7, 16)[i % 2],
                x_dtype=dtype,
            )
        )
    return found


def of_rank(legs: tuple[Tensor, ...], rank: int, peers: list[range]) -> Sent:
    """What the legs say a rank sends to the ranks of each collective's group, and that it sends to no others."""
    found = []
    for leg_PP, ranks in zip(legs, peers, strict=True):
        sent = leg_PP[rank].tolist()
        assert sum(sent) == sum(sent[to] for to in ranks)
        found.append([sent[to] for to in ranks])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("scheme", "function", "routings"),
    [(row_per_rank, run_flat, ("uniform", "holes", "duplicates", "none")),
     (row_per_choice, run_textbook, ("uniform", "one_expert", "duplicates", "one_rank"))],
)  # fmt: skip
def test_one_step_sends_what_is_predicted_to_every_rank(
    rank_pool: RankPool, ranks: int, scheme: Any, function: Any, routings: tuple[str, ...]
) -> None:
    for run in runs(ranks, 1, routings):
        traffic = run.traffic(scheme)
        legs = (*traffic.plan, *traffic.dispatch, *traffic.combine, *traffic.backward)
        for rank, sent in enumerate(rank_pool.run(function, ranks, run)):
            assert sent == of_rank(legs, rank, [range(ranks)] * 5), f"rank {rank} of {run}"


@pytest.mark.parametrize(("num_nodes", "in_node"), [(2, 2), (1, 2), (2, 1), (4, 1)])
def test_two_steps_send_what_is_predicted_to_every_rank(rank_pool: RankPool, num_nodes: int, in_node: int) -> None:
    ranks = num_nodes * in_node
    for run in runs(ranks, num_nodes, ("uniform", "holes", "duplicates", "one_rank")):
        traffic = run.traffic(row_per_node)
        legs = (*traffic.plan, *traffic.dispatch, *traffic.combine, *traffic.backward)
        for rank, sent in enumerate(rank_pool.run(run_nodes, ranks, run)):
            column = range(rank % in_node, ranks, in_node)
            node = range(rank - rank % in_node, rank - rank % in_node + in_node)
            peers = [column, node] * 2 + [node, column] + [column, node] + [node, column]
            wanted = of_rank(legs, rank, peers)
            # A group of one rank communicates nothing.
            assert sent == [to for to, group in zip(wanted, peers, strict=True) if len(group) > 1], f"{rank} of {run}"


def test_ids_of_the_wrong_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="ids of 1 ranks, experts on 2 and 1 nodes; give ids"):
        counted_demand([torch.zeros(1, 1, dtype=torch.int64)], Partition((1, 1)), 1)
    with pytest.raises(ValueError, match="as many ranks on every node"):
        counted_demand([torch.zeros(1, 1, dtype=torch.int64)] * 3, Partition((1, 1, 1)), 2)


def test_what_a_rank_sends_over_each_link() -> None:
    """2 nodes of 2: [0][1] and [1][0] stay in the node, [0][2] does not, [3][3] stays on the rank."""
    leg_PP = torch.tensor([[1, 2, 4, 8], [16, 0, 0, 0], [0, 32, 0, 64], [0, 0, 128, 256]])
    sums = [sum_P.tolist() for sum_P in link_sums(leg_PP, 2)]
    assert sums == [[2, 16, 64, 128], [12, 0, 32, 0], [16, 2, 128, 64], [0, 32, 4, 8]]


# ---- expectations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "num_choices", "groups", "limited_groups"),
    [((2, 1, 0, 3), 2, 1, 1), ((3, 3), 3, 3, 2), ((1, 2, 1, 2), 2, 3, 1), ((0, 4, 1, 1), 4, 2, 2)],
)
def test_uniform_chances_are_those_of_every_choice_listed(
    sizes: tuple[int, ...], num_choices: int, groups: int, limited_groups: int
) -> None:
    experts, size = Partition(sizes), sum(sizes) // groups
    listed = [
        torch.tensor([chosen])
        for in_reach in combinations(range(groups), limited_groups)
        for chosen in combinations([g * size + i for g in in_reach for i in range(size)], num_choices)
    ]
    demands = [counted_demand([one] + [one[:0]] * (len(sizes) - 1), experts, 2) for one in listed]
    found = uniform_chances(experts, 2, num_choices=num_choices, groups=groups, limited_groups=limited_groups)
    for name, field in (("choices_PP", "choices_P"), ("tokens_PP", "ranks_P"), ("tokens_PN", "nodes_N")):
        wanted = torch.stack([getattr(demand, name)[0] for demand in demands]).double().mean(0)
        torch.testing.assert_close(getattr(found, field), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("groups", "limited_groups"), [(1, 1), (4, 2)])
def test_zipf_of_exponent_0_is_uniform(groups: int, limited_groups: int) -> None:
    experts, given = Partition.balanced(32, 8), {"num_choices": 4, "groups": groups, "limited_groups": limited_groups}
    zipf, uniform = zipf_chances(experts, 2, exponent=0.0, seed=0, **given), uniform_chances(experts, 2, **given)
    torch.testing.assert_close(zipf.choices_P, uniform.choices_P, rtol=0.1, atol=0)  # 8192 samples
    if groups == 1:  # which experts of the groups in reach are taken is another law otherwise
        torch.testing.assert_close(zipf.ranks_P, uniform.ranks_P, rtol=0.1, atol=0)
        torch.testing.assert_close(zipf.nodes_N, uniform.nodes_N, rtol=0.1, atol=0)


def test_zipf_of_one_choice_has_the_weights_of_the_law() -> None:
    found = zipf_chances(Partition((1,) * 4), 2, num_choices=1, exponent=1.0, seed=3)
    wanted = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4], dtype=torch.float64)
    sorted_P = found.choices_P.sort(descending=True).values
    torch.testing.assert_close(sorted_P, wanted / wanted.sum(), rtol=0, atol=0.02)
    assert torch.equal(found.choices_P, found.ranks_P)
    again = zipf_chances(Partition((1,) * 4), 2, num_choices=1, exponent=1.0, seed=3)
    assert torch.equal(again.choices_P, found.choices_P)


def test_expected_bytes_are_the_mean_of_counted_ones() -> None:
    """400 draws of 4 tokens per rank: means are within 4 standard errors of what is expected."""
    experts, generator = Partition((3, 1, 2, 2)), torch.Generator().manual_seed(0)
    widths = Widths(dim=5, num_choices=3, row_bytes=2, weight_bytes=4)
    expected = expected_demand(uniform_chances(experts, 2, num_choices=3), experts, 4)
    draws = [
        counted_demand([torch.rand(4, 8, generator=generator).topk(3).indices for _ in range(4)], experts, 2)
        for _ in range(400)
    ]
    for scheme in (row_per_choice, row_per_rank, row_per_node):
        wanted, counted = scheme(expected, widths), [scheme(draw, widths) for draw in draws]
        for i, leg_PP in enumerate((*wanted.dispatch, *wanted.combine, *wanted.backward)):
            drawn = torch.stack([(*each.dispatch, *each.combine, *each.backward)[i] for each in counted]).double()
            error_PP = drawn.std(0) / len(draws) ** 0.5
            assert ((drawn.mean(0) - leg_PP).abs() <= 4 * error_PP + 1e-9).all()
        assert all(a.equal(b) for a, b in zip(wanted.plan, counted[0].plan, strict=True))


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
    assert crossing(config_with(model=model, load=load, cluster=cluster)) == Crossing(
        ranks_by_bytes=4, ranks_by_time=4
    )
    # (P - 1)(392 - 1200 / P) bytes in 10 us of 1 GB/s: more than 10000 from P = 29.5 on.
    found = crossing(config_with(model=model, load=load, cluster=cluster | {"latency_us": 10.0}))
    assert found == Crossing(ranks_by_bytes=4, ranks_by_time=30)
    far = cluster | {"latency_us": 1e9, "ranks_per_node": 8}  # 8 ranks more each time: up to the last in a second
    never = crossing(config_with(model=model, load={"tokens_per_rank": 1}, cluster=far))
    assert never.ranks_by_time is None


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_from_8_to_2048_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert cli.main(["plan", "deepseek_v3", "--nodes", "1", "256", "--zipf", "1", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(out.read_text())
    assert [each["ranks"] for each in document["predictions"]] == [8] * 6 + [2048] * 6
    assert [each["scheme"] for each in document["predictions"]] == [
        "row per choice",
        "row per rank",
        "row per node",
    ] * 4
    assert {each["routing"] for each in document["predictions"]} == {"uniform", "zipf 1"}
    assert [config["cluster"]["nodes"] for config in document["configs"]] == [1, 256]
    assert "2048 ranks for 256 experts: 1792 of them hold none." in printed
    assert "Uniform routing draws a token's groups at random" in printed
    assert "256 x 8" in printed
    assert f"from {document['counts_first']['ranks_by_time']} ranks on" in printed


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_packaged_plans(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", path.stem]) == 0
    assert "row per node" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("dim = 7168", "dim = 0", "model.dim is 0; it has to be greater than or equal to 1"),
        ("dim = 7168", "", "model.dim is missing; give it a value, e.g. as in configs/plan/deepseek_v3.toml"),
        ("top_k = 8", "topk = 8", "model.topk is not a known key; remove it"),
        ("top_k = 8", "top_k = 200", "model.top_k is 200, but a token reaches 128 experts; choose at most as many"),
        ("groups = 8  ", "groups = 7  ", "model.groups is 7, but there are 256 experts; it has to divide them"),
        ("limited_groups = 4", "limited_groups = 9", "model.limited_groups is 9 of 8 groups"),
        ("nodes = 8", "nodes = 1024", "is 8192 ranks; plan for at most 4096"),
        ('"bfloat16"', '"int8"', "model.dtype is 'int8'; it has to be 'float64', 'float32', 'bfloat16' or 'float16'"),
        ("[load]", "[load", "is not valid TOML"),
    ],
)
def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, told: str) -> None:
    text = (PLANS / "deepseek_v3.toml").read_text()
    assert old in text
    path = tmp_path / "my.toml"
    path.write_text(text.replace(old, new, 1))
    assert cli.main(["plan", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_a_plan_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "nothing"]) == 2
    assert "config nothing does not exist; name a TOML file, or a packaged plan: 'deepseek_v2_lite'" in (
        capsys.readouterr().err
    )
    assert cli.main(["plan", "mixtral_8x7"]) == 2
    assert "(did you mean 'mixtral_8x7b'?)" in capsys.readouterr().err
    assert cli.main(["plan", "deepseek_v3", "--tokens", "99999999999999999999"]) == 2
    assert "load.tokens_per_rank is 99999999999999999999; it has to be" in capsys.readouterr().err
    assert cli.main(["plan", "--json", str(tmp_path / "none" / "out.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_a_packaged_plan_by_any_of_its_names_and_a_full_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("mixtral_8x7b", "mixtral_8x7b.toml", "configs/plan/mixtral_8x7b"):
        assert cli.main(["plan", name]) == 0

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["plan", "mixtral_8x7b", "--json", "out.json"]) == 2
    assert "was not written (No space left on device)" in capsys.readouterr().err
