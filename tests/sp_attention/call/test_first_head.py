"""An ``attend`` with numbers of its own per head is told which heads it has, whatever kind of callable it is."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention import UlyssesAttention, scaled_dot_product
from sp_attention.reference import reference_attention
from tests.support.attention.case import Attend
from tests.support.compile import untraced
from tests.support.ranks import refusal, world
from tests.support.tensors import TOLERANCE, difference, leaf

SEQ, LENGTH, HEADS = (3, 4), 7, 5


def place_LL() -> Tensor:
    return torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]


class Slopes(nn.Module):
    """A learned slope per head (ALiBi)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope_N = nn.Parameter(torch.arange(HEADS, dtype=torch.float64) / 10)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, first_head: int = 0) -> Tensor:
        slope_n = self.slope_N[first_head : first_head + q.shape[2], None, None]
        return scaled_dot_product(q, k, v, is_causal=is_causal, attn_mask=(slope_n * place_LL())[None])


class Plain(nn.Module):
    """The default, which knows no heads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
        return scaled_dot_product(q, k, v, is_causal=is_causal)


class Called:
    def __init__(self, attend: Attend) -> None:
        self.attend = attend

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.attend(*tensors, **options)


def through(attend: Attend) -> Attend:
    return lambda *tensors, **options: attend(*tensors, **options)


def with_its_name(attend: Attend) -> Attend:
    @wraps(attend)
    def wrapper(*tensors: Tensor, **options: Any) -> Tensor:
        return attend(*tensors, **options)

    return wrapper


WRAPPED: dict[str, Callable[[nn.Module], Attend]] = {
    "a method": lambda module: module.forward,
    "a module": lambda module: module,
    "a partial": lambda module: partial(module.forward),
    "a partial of a module": lambda module: partial(module),
    "a partial of a partial": lambda module: partial(partial(module), is_causal=True),
    "all options": through,
    "wraps": lambda module: with_its_name(module.forward),
    "an object": Called,
    "a compiled module": lambda module: torch.compile(module, backend="eager"),  # type: ignore[return-value]
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def answers(rank: int, attend: Attend, module: nn.Module, compiled: bool) -> list[float]:
    """How far output and gradients of this rank are from attention on one rank."""
    sharding = TokenSharding(batch=1, seq=Partition(SEQ))
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(1, LENGTH, HEADS, 6, generator=draw, dtype=torch.float64) for _ in "qkv"]
    slopes = [leaf(x) for x in module.parameters()]
    bias_NLL = slopes[0][:, None, None] * place_LL() if slopes else None
    leaves = [leaf(x) for x in wholes]
    wanted_BLNH = reference_attention(*leaves, is_causal=True, attn_mask=bias_NLL)
    wanted = [sharding.shard(x, rank) for x in torch.autograd.grad(wanted_BLNH.square().sum(), leaves)]

    attention: Callable[..., Tensor] = UlyssesAttention(group=world(), is_causal=True, attend=attend)
    if compiled:
        torch._dynamo.reset()
        attention = torch.compile(attention, fullgraph=True, backend="aot_eager")
    mine = [leaf(sharding.shard(x, rank)) for x in wholes]
    out_BlNH = attention(*mine, sharding=sharding)
    got = torch.autograd.grad(out_BlNH.square().sum(), mine)
    pairs = zip((out_BlNH.detach(), *got), (sharding.shard(wanted_BLNH.detach(), rank), *wanted), strict=True)
    return [difference(*pair) for pair in pairs]


@untraced()
def slopes_of(rank: int, name: str, compiled: bool = False) -> list[float]:
    module = Slopes()
    return answers(rank, WRAPPED[name](module), module, compiled)


@untraced()
def without_an_argument(rank: int, name: str) -> list[float]:
    module = Plain()
    return answers(rank, WRAPPED[name](module), module, False)


def through_the_default(rank: int) -> list[float]:
    return answers(rank, through(scaled_dot_product), Plain(), False)


def refused(rank: int, name: str) -> str:
    attention = UlyssesAttention(group=world(), window=(2, 0), attend=WRAPPED[name](Plain()))
    x_BlNH = torch.zeros(1, SEQ[rank], HEADS, 6)
    return refusal(lambda: attention(x_BlNH, x_BlNH, x_BlNH, sharding=TokenSharding(batch=1, seq=Partition(SEQ))))


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in WRAPPED if name != "a compiled module"])
def test_every_kind_of_attend_is_told_its_first_head(rank_threads: RankThreads, name: str) -> None:
    for differences in rank_threads.run(slopes_of, 2, name):
        assert max(differences) < TOLERANCE


SLOW = [pytest.param(name, marks=pytest.mark.sweep) for name in ("a partial of a module", "all options")]


@pytest.mark.parametrize("name", ["a module", *SLOW])
def test_in_one_graph_too(rank_pool: RankPool, name: str) -> None:
    for differences in rank_pool.run(slopes_of, 2, name, True, timeout=120):
        assert max(differences) < TOLERANCE


def test_a_module_that_is_compiled_by_itself(rank_pool: RankPool) -> None:
    for case in (slopes_of, without_an_argument):
        for differences in rank_pool.run(case, 2, "a compiled module", timeout=120):
            assert max(differences) < TOLERANCE


@pytest.mark.parametrize("name", ["a module", "a partial of a module"])
def test_a_module_without_such_an_argument_is_not_told(rank_threads: RankThreads, name: str) -> None:
    for differences in rank_threads.run(without_an_argument, 2, name):
        assert max(differences) < TOLERANCE


@pytest.mark.parametrize("name", ["a module", "a partial of a module"])
def test_what_forward_does_not_take_is_refused(rank_threads: RankThreads, name: str) -> None:
    """A call of a module takes any argument; its ``forward`` does not."""
    for text in rank_threads.run(refused, 2, name):
        assert " takes no window; give it arguments of these names, or leave the options out" in text


def test_the_default_may_be_told_all_options(rank_threads: RankThreads) -> None:
    for differences in rank_threads.run(through_the_default, 2):
        assert max(differences) < TOLERANCE
