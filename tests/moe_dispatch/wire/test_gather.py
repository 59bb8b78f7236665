"""What every rank gets, by one all-gather, as on CUDA: the bits of the all-to-all, and mistakes told as there.

The rule is asked for CUDA here, and ranks are threads.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, combine, dispatch, gather_tokens
from moe_dispatch.testing import RankThreads
from moe_dispatch.wire import exchange, regions
from sp_attention.wire.order import batch_first
from tests.support.dispatch.dense import make_case
from tests.support.dispatch.layouts import Layout
from tests.support.dispatch.plan_calls import Call, good_call
from tests.support.dispatch.plans import KINDS, Kind, enough, planning, sharding_of
from tests.support.orders import cut_by_loops
from tests.support.ranks import refusal, world
from tests.support.tensors import leaf

pytestmark = pytest.mark.usefixtures("uncovered")

COLLECTIVES = ("all_gather_single", "all_to_all_single")


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often ranks called which collective; from here on by the rule for CUDA."""
    counts, rule = Counter[str](), exchange.is_one_message

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def count(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return call(*args, **kwargs)

        return count

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, counted(name))
    for module in (exchange, regions):
        monkeypatch.setattr(module, "is_one_message", lambda sizes, _: rule(sizes, "cuda"))
    return counts


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ((4, 4, 4, 4), (0, 4, 8, 12)),
        ((4, 3, 4, 3), (0, 4, 8, 12)),  # 16 instead of 14
        ((5, 5, 5, 1), (0, 5, 10, 15)),  # a quarter more
        ((6, 6, 6, 1), (0, 6, 12, 18)),  # more than that: as they are, and here that is the same
        ((1, 6, 6, 6), (0, 1, 7, 13)),
        ((0, 0), (0, 0)),
    ],
)
def test_messages_are_padded_where_that_is_at_most_a_quarter(sizes: tuple[int, ...], starts: tuple[int, ...]) -> None:
    padded = 0 < len(sizes) * max(sizes) <= 1.25 * sum(sizes)
    assert exchange.is_one_message(sizes, "cuda") == padded
    assert exchange.gathered_starts(sizes, "cuda") == starts
    assert not exchange.is_one_message(sizes, "cpu")
    assert exchange.gathered_starts(sizes, "cpu") == tuple(sum(sizes[:rank]) for rank in range(len(sizes)))


# ---- gather_tokens -------------------------------------------------------------------------------------

GATHERED = {
    "even": TokenSharding(batch=2, seq=Partition((3, 3, 3))),
    "uneven": TokenSharding(batch=2, seq=Partition((4, 3, 4)), order="LB"),
    "zigzag": TokenSharding.zigzag(batch=3, length=13, ranks=3),
    "rows cut": TokenSharding(batch=Partition((2, 2, 1)), seq=3),
    "one holds all": TokenSharding(batch=2, seq=Partition((0, 5, 0))),
    "no tokens": TokenSharding(batch=2, seq=Partition((0, 0, 0))),
}


def gathered(rank: int, name: str) -> list[Tensor]:
    """The whole, the gradient, and what the gradient's gradient says."""
    sharding = TokenSharding._of(*GATHERED[name]._value)  # its own: it keeps index tensors
    draw = torch.Generator().manual_seed(rank)
    x_BlD = torch.randn(*sharding.local_shape(rank), 5, generator=draw).requires_grad_()
    pull_BLD = torch.randn(*sharding.global_shape, 5, generator=draw).requires_grad_()
    x_BLD = gather_tokens(x_BlD, sharding=sharding, group=world())
    (grad_BlD,) = torch.autograd.grad(x_BLD, x_BlD, pull_BLD, create_graph=True)
    (again_BLD,) = torch.autograd.grad(grad_BlD, pull_BLD, x_BlD.detach())
    return [x_BLD.detach(), grad_BlD.detach(), again_BLD]


@pytest.mark.parametrize("name", GATHERED)
def test_tokens_and_gradients_are_those_of_the_all_to_all(
    rank_threads: RankThreads, name: str, request: pytest.FixtureRequest
) -> None:
    """In float32, so that another order of the ranks in a gradient is another number. Cut by loops, too."""
    wanted = rank_threads.run(gathered, 3, name)
    called = request.getfixturevalue("called")
    got = rank_threads.run(gathered, 3, name)
    padded = name not in ("one holds all", "no tokens")
    assert [called[name] for name in COLLECTIVES] == [3 * padded, 3 * (3 - padded)]
    for rank, (tensors, others) in enumerate(zip(got, wanted, strict=True)):
        assert all(map(torch.equal, tensors, others))
        draw = torch.Generator().manual_seed(rank)
        mine_BlD = torch.randn(*GATHERED[name].local_shape(rank), 5, generator=draw)
        assert torch.equal(cut_by_loops(batch_first(tensors[0], GATHERED[name]), GATHERED[name], rank), mine_BlD)


# ---- plans ---------------------------------------------------------------------------------------------

LAYOUTS = {
    "uneven": Layout(batch=(2,), seq=(4, 3, 4, 4)),
    "one holds all": Layout(batch=(2,), seq=(0, 5, 0, 0), order="LB"),
}


def planned(rank: int, kind: Kind, name: str) -> list[Tensor]:
    """What a rank's experts get, and what they give back, by a plan."""
    torch.manual_seed(3)
    case = make_case(LAYOUTS[name], "holes", experts=(2, 1, 0, 3), num_choices=3, dim=4, width=4)
    x_BlD, expert_BlK = (leaf(case.layout.cut(x)[rank]) if x.is_floating_point() else case.layout.cut(x)[rank]
                         for x in (case.x_BLD, case.expert_BLK))  # fmt: skip
    with planning(kind, rank, enough(case)) as plan:
        metadata = plan(expert_BlK, dim=4, sharding=sharding_of(case.layout), experts=Partition(case.experts))
        rows, weight_M = dispatch(x_BlD, torch.ones(*expert_BlK.shape), metadata)
        out_BlD = combine(rows * (weight_M[:, None] + rank), metadata)
        (grad_BlD,) = torch.autograd.grad(out_BlD.square().sum(), x_BlD)
    return [rows.detach(), out_BlD.detach(), grad_BlD]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_plans_are_those_of_the_all_to_all(
    rank_threads: RankThreads, kind: Kind, name: str, request: pytest.FixtureRequest
) -> None:
    wanted = rank_threads.run(planned, 4, kind, name)
    called = request.getfixturevalue("called")
    for got, others in zip(rank_threads.run(planned, 4, kind, name), wanted, strict=True):
        assert all(map(torch.equal, got, others))
    if name == "uneven" or kind != "hierarchical":
        assert called["all_gather_single"] == 4 * (name == "uneven") * (2 if kind == "hierarchical" else 1)


def spoiled(rank: int, what: str) -> str:
    call = good_call(rank)
    sharding = TokenSharding(batch=2, seq=Partition((3, 3, 3)))
    ids_BlK = torch.zeros(2, 3, 2, dtype=torch.int64)
    if rank == 1 and what == "value":
        ids_BlK[1, 0, 1] = 77
    if rank == 1 and what == "choices":
        ids_BlK = torch.zeros(2, 3, 3, dtype=torch.int64)  # of one step, as two are
    if rank == 1 and what == "type":
        ids_BlK = ids_BlK.double()
    return refusal(Call(ids_BlK, torch.ones_like(ids_BlK, dtype=torch.float32), 4, sharding, call.experts).plan)


@pytest.mark.usefixtures("called")
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("value", "rank 1: expert id 77 at local token 3, choice 1"),
        ("choices", "the ranks disagree about one call"),
        ("type", "rank 1: expert ids are torch.float64"),
    ],
)
def test_a_mistake_is_everyones_error(rank_threads: RankThreads, what: str, text: str) -> None:
    texts = rank_threads.run(spoiled, 3, what)
    assert len(set(texts)) == 1
    assert texts[0].startswith(text)
