"""Gradients: their dtypes, small differences, sums over ranks, and a rank without heads."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import ulysses_attention
from tests.support.attention.case import Case, Options, named_case
from tests.support.attention.whole import Whole
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf, share


def values_only(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    """Each query gets its own value."""
    return v_BLgH.repeat_interleave(q_BLnH.shape[2] // v_BLgH.shape[2], dim=2)


# ---- cases: what the ranks run -------------------------------------------------------------------------


def without_heads(rank: int, names: list[str]) -> list[str]:
    """Which learned options have no gradient, on a rank that has tokens and no head."""
    case = Case(
        ranks=2,
        kind="sinks and mask",
        batch=2,
        seq=(3, 4),
        kv_seq=(3, 4),
        num_heads=(2, 1),
        widths=(4, 4),
        heads=(2, 0),
    )
    whole = Whole.of(case, torch.float64)
    options: Options = {name: leaf(whole.options[name]) for name in names}
    parts = [leaf(share(x, case.seq, case.order, rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    sharding = TokenSharding(batch=2, seq=Partition(case.seq))
    out_BlNH = ulysses_attention(*parts, sharding=sharding, group=world(), heads=Partition((2, 0)), **options)
    out_BlNH.sum().backward()
    missing = [name for name, value in options.items() if value.grad is None]
    return missing + [
        name for name, value in options.items() if rank == 1 and value.grad is not None and value.grad.any()
    ]


def shared_head(rank: int, first: float, dtype: torch.dtype) -> list[float]:
    """The gradient of a value whose head three ranks use, from ``first``, 1 and 1."""
    sharding = TokenSharding(batch=1, seq=Partition((2, 0, 1)))
    q_BlNH = torch.zeros(1, (2, 0, 1)[rank], 3, 1, dtype=dtype)
    v_BlGH = leaf(q_BlNH[:, :, :1])
    out_BlNH = ulysses_attention(
        q_BlNH, q_BlNH[:, :, :1], v_BlGH, sharding=sharding, group=world(), attend=values_only
    )
    out_BlNH.backward(torch.tensor([first, 1, 1], dtype=dtype)[:, None].expand_as(out_BlNH))
    return grad_of(v_BlGH).flatten().tolist()


def dtypes_of_gradients(rank: int, dtype: torch.dtype) -> list[torch.dtype]:
    """Of the output and of every gradient; sinks are float32 parameters next to any dtype."""
    case = named_case(2, "sinks and mask", (3, 2), num_heads=(4, 2), widths=(6, 4))
    whole = Whole.of(case, dtype)
    leaves = [leaf(share(x, case.seq, "BL", rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    sinks_N = torch.ones(4, requires_grad=True)
    sharding = TokenSharding(batch=2, seq=Partition(case.seq))
    out_BlNH = ulysses_attention(*leaves, sharding=sharding, group=world(), sinks_N=sinks_N, window=(2, 0))
    out_BlNH.sum().backward()
    return [out_BlNH.dtype, *(grad_of(x).dtype for x in leaves), grad_of(sinks_N).dtype]


def numeric_gradient(rank: int) -> bool:
    """gradcheck of the whole group's function: every rank moves the same number of one rank's tokens at a time."""
    case = named_case(2, "causal", (1, 2), batch=1, num_heads=(2, 1), widths=(2, 1))
    whole = Whole.of(case, torch.float64)
    sharding = TokenSharding(batch=1, seq=Partition(case.seq))
    back_BlNH = share(whole.grad_BLNH, case.seq, "BL", rank)

    def loss(*qkv: Tensor) -> Tensor:
        """Of all ranks; the same number everywhere. Its gradient in a whole tensor is the sum of the ranks'."""
        mine = [share(x, case.seq, "BL", rank) for x in qkv]
        out_BlNH = ulysses_attention(*mine, sharding=sharding, group=world(), is_causal=True)
        return _SumOverRanks.apply((out_BlNH * back_BlNH).sum())  # type: ignore[return-value]

    wholes = [_CopyOfWhole.apply for _ in range(3)]

    def of_wholes(*qkv: Tensor) -> Tensor:
        return loss(*(copy(x) for copy, x in zip(wholes, qkv, strict=True)))  # type: ignore[arg-type]

    return torch.autograd.gradcheck(of_wholes, tuple(map(leaf, (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH))))


class _SumOverRanks(torch.autograd.Function):
    """forward   the sum of every rank's x
    backward  the gradient, which is the same on every rank
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _CopyOfWhole(torch.autograd.Function):
    """forward   x, the same on every rank
    backward  the sum of every rank's gradient
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_shared_head_are_added_in_float32(rank_threads: RankThreads, dtype: torch.dtype) -> None:
    """2048 + 1 + 1 and, in bfloat16, 256 + 1 + 1 stay where they are when every sum is rounded."""
    first = 2048.0 if dtype == torch.float16 else 256.0
    assert rank_threads.run(shared_head, 3, first, dtype) == [[first + 2] * n for n in (2, 0, 1)]


@pytest.mark.parametrize("name", ["sinks_N", "attn_mask"])
def test_a_rank_without_heads_has_a_zero_gradient_of_what_is_learned(rank_threads: RankThreads, name: str) -> None:
    assert rank_threads.run(without_heads, 2, [name]) == [[], []]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_has_the_dtype_of_its_input(rank_threads: RankThreads, dtype: torch.dtype) -> None:
    """Invariant 10, B15."""
    assert rank_threads.run(dtypes_of_gradients, 2, dtype) == [[dtype] * 4 + [torch.float32]] * 2


def test_gradients_are_those_of_small_differences(rank_threads: RankThreads) -> None:
    """Invariant 10."""
    assert rank_threads.run(numeric_gradient, 2) == [True, True]
