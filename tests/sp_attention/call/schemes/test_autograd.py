"""Attention over ranks as part of any graph, in every scheme: the same bits as in a plain forward and backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from moe_dispatch import TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, attention_over_ranks, scaled_dot_product
from tests.support.ranks import refusal, world
from tests.support.schemes import takes_attend
from tests.support.tensors import grad_of, leaf

pytestmark = pytest.mark.usefixtures("uncovered")

# Rank 2 has no token; the pieces of the others lie in any order.
SHARDING = TokenSharding.of_runs(batch=2, length=13, runs=[[(8, 13)], [(0, 2), (4, 6)], [], [(2, 4), (6, 8)]])
RANKS, SHAPES = 4, ((4, 6), (2, 6), (2, 4), (4, 4))  # of q, k, v and the gradient of the output
Call = Callable[..., Tensor]
SCHEMES = [
    Scheme.gather(),
    Scheme.ring(keep=True, chunk=4),
    Scheme.two_dimensional(head_ranks=2),
    Scheme.two_dimensional(head_ranks=2, keys="ring", keep=True, offload=True, chunk=4),
    Scheme.ulysses(offload=True, chunk=7),
]


def parts(rank: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(2, 13, *shape, generator=draw, dtype=torch.float64).to(dtype) for shape in SHAPES]
    return [SHARDING.shard(whole, rank).clone() for whole in wholes]


def call_of(scheme: Scheme, **options: Any) -> Call:
    def call(*qkv: Tensor) -> Tensor:
        return attention_over_ranks(*qkv, sharding=SHARDING, group=world(), scheme=scheme, is_causal=True, **options)

    return call


def plainly(call: Call, q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor, grad_BlNH: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    leaves = [leaf(x) for x in (q_BlNH, k_BlGH, v_BlGH)]
    out_BlNH = call(*leaves)
    out_BlNH.backward(grad_BlNH)
    return [out_BlNH.detach(), *map(grad_of, leaves)]


# ---- ways: what gives the same as `plainly` --------------------------------------------------------------


def twice(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Backward again, of a graph that was retained."""
    leaves = [leaf(x) for x in tensors[:3]]
    out_BlNH = call(*leaves)
    torch.autograd.grad(out_BlNH, leaves, tensors[3] * 2, retain_graph=True)
    return [out_BlNH.detach(), *torch.autograd.grad(out_BlNH, leaves, tensors[3])]


def in_one_backward(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Two calls before one backward; the other is of other tensors."""
    leaves, others = [leaf(x) for x in tensors[:3]], [leaf(x * 2) for x in tensors[:3]]
    outs = [call(*leaves), call(*others)]
    torch.autograd.backward(outs, [tensors[3], tensors[3]])
    return [outs[0].detach(), *map(grad_of, leaves)]


def first_call_first(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Two calls, whose backwards are in the order of the calls."""
    leaves, others = [leaf(x) for x in tensors[:3]], [leaf(x * 2) for x in tensors[:3]]
    outs = [call(*leaves), call(*others)]
    for out_BlNH in outs:
        out_BlNH.backward(tensors[3])
    return [outs[0].detach(), *map(grad_of, leaves)]


def one_at_a_time(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Only one of q, k and v learns."""
    found = []
    for learning in range(3):
        mine = [leaf(x) if i == learning else x for i, x in enumerate(tensors[:3])]
        out_BlNH = call(*mine)
        out_BlNH.backward(tensors[3])
        found += [out_BlNH.detach()] * (not found) + [grad_of(mine[learning])]
    return found


def other_on_each_rank(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Some of them learn on each rank, not the same ones."""
    rank = world().rank()
    mine = [x if i == rank else leaf(x) for i, x in enumerate(tensors[:3])]
    out_BlNH = call(*mine)
    out_BlNH.backward(tensors[3])
    wanted = plainly(call, *tensors)
    return [out_BlNH.detach(), *(grad_of(x) if x.requires_grad else y for x, y in zip(mine, wanted[1:], strict=True))]


def of_any_strides(call: Call, *tensors: Tensor) -> list[Tensor]:
    """Views of tensors in other layouts, none of them dense."""
    leaves = [leaf(x.permute(3, 1, 2, 0).contiguous()) for x in tensors[:3]]
    out_BlNH = call(*(x.permute(3, 1, 2, 0) for x in leaves))
    out_BlNH.backward(tensors[3].repeat_interleave(2, dim=3)[..., ::2])
    return [out_BlNH.detach(), *(grad_of(x).permute(3, 1, 2, 0) for x in leaves)]


def saved_on_cpu(call: Call, *tensors: Tensor) -> list[Tensor]:
    with save_on_cpu():
        return plainly(call, *tensors)


def checkpointed(call: Call, *tensors: Tensor) -> list[Tensor]:
    return plainly(lambda *qkv: checkpoint(call, *qkv, use_reentrant=False), *tensors)  # type: ignore[arg-type,return-value]


def after_no_grad(call: Call, *tensors: Tensor) -> list[Tensor]:
    with torch.no_grad():
        out_BlNH = call(*map(leaf, tensors[:3]))
    with torch.inference_mode():
        assert torch.equal(call(*tensors[:3]), out_BlNH)
    found = plainly(call, *tensors)
    assert not out_BlNH.requires_grad
    return [out_BlNH, *found[1:]]


WAYS: dict[str, Callable[..., list[Tensor]]] = {
    "retain_graph": twice,
    "two calls, one backward": in_one_backward,
    "the first call's backward first": first_call_first,
    "one learns": one_at_a_time,
    "other ones learn on each rank": other_on_each_rank,
    "any strides": of_any_strides,
    "save_on_cpu": saved_on_cpu,
    "checkpoint": checkpointed,
    "no_grad, inference_mode": after_no_grad,
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def calls() -> dict[str, Call]:
    """Every scheme, and those that take one by an ``attend``."""
    found = {f"{scheme}": call_of(scheme) for scheme in SCHEMES}
    return found | {
        f"attend, {scheme}": call_of(scheme, attend=scaled_dot_product) for scheme in SCHEMES if takes_attend(scheme)
    }


def not_as_plainly(rank: int, way: str) -> list[str]:
    tensors, failures = parts(rank), []
    for name, call in calls().items():
        wanted, got = plainly(call, *tensors), WAYS[way](call, *tensors)
        failures += [name] * (not all(map(torch.equal, got, wanted)))
    return failures


def expanded(rank: int) -> list[str]:
    """A head that is all heads, by a stride of 0; and of a sum the gradient, which is one number."""
    q_BlNH, k_BlGH, v_BlGH, _ = parts(rank)
    failures = []
    for name, call in calls().items():
        found = []
        for copy in (False, True):
            leaves = [leaf(x[:, :, :1]) for x in (q_BlNH, k_BlGH, v_BlGH)]
            wide = [x.expand(-1, -1, heads, -1) for x, heads in zip(leaves, (4, 2, 2), strict=True)]
            out_BlNH = call(*(x.contiguous() if copy else x for x in wide))
            (out_BlNH if not copy else out_BlNH * torch.ones_like(out_BlNH)).sum().backward()
            found.append([out_BlNH.detach(), *map(grad_of, leaves)])
        failures += [name] * (not all(map(torch.equal, *found)))
    return failures


def one_tensor_for_all(rank: int) -> list[str]:
    """q, k and v are one tensor."""
    x_BlNH = parts(rank)[0]
    failures = []
    for name, call in calls().items():
        x, qkv = leaf(x_BlNH), [leaf(x_BlNH) for _ in range(3)]
        call(x, x, x).backward(x_BlNH)
        call(*qkv).backward(x_BlNH)
        wanted = sum(map(grad_of, qkv), torch.zeros_like(x_BlNH))
        failures += [name] * (not torch.allclose(grad_of(x), wanted, rtol=0, atol=1e-12))
    return failures


def second_derivatives(rank: int) -> set[str]:
    """What is told of them. Ulysses in one exchange has those of its ``attend``."""
    tensors = parts(rank)
    found = set()
    for scheme in SCHEMES:
        leaves = [leaf(x) for x in tensors[:3]]
        grads = torch.autograd.grad(call_of(scheme)(*leaves).square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError) as error:
            grads[0].sum().backward()
        found.add(str(error.value))
    return found


WRITTEN = (
    "attend raised ValueError: q, k or v were written to, which further calls and the caller share; write to copies"
)


def writes(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, **options: Any) -> Tensor:
    return scaled_dot_product(q_BLnH, k_BLgH.mul_(0.5), v_BLgH, **options)


def writing_is_told(rank: int) -> list[str]:
    """What each rank is told where an ``attend`` writes to keys."""
    tensors, told = parts(rank), list[str]()
    for scheme in filter(takes_attend, SCHEMES):
        told.append(refusal(lambda scheme=scheme: call_of(scheme, attend=writes)(*tensors[:3])))
    return told


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits(rank_threads: RankThreads, way: str) -> None:
    assert rank_threads.run(not_as_plainly, RANKS, way) == [[]] * RANKS


@pytest.mark.parametrize("case", [expanded, one_tensor_for_all])
def test_tensors_that_share_memory(rank_threads: RankThreads, case: Callable[[int], list[str]]) -> None:
    """Inputs and gradients that are one number many times; one tensor thrice."""
    assert rank_threads.run(case, RANKS) == [[]] * RANKS


def test_an_attend_that_writes_to_its_tensors_is_refused(rank_threads: RankThreads) -> None:
    """Its next call would get what it wrote: parts of the queries share keys. Rank 2 has no queries in `gather`."""
    told = "; ".join(f"rank {rank}: {WRITTEN}" for rank in (0, 1, 3))
    of_all = "; ".join(f"rank {rank}: {WRITTEN}" for rank in range(RANKS))
    assert rank_threads.run(writing_is_told, RANKS) == [[told, of_all]] * RANKS


def test_a_second_derivative_is_refused(rank_threads: RankThreads) -> None:
    text = "trying to differentiate twice a function that was marked with @once_differentiable"
    assert rank_threads.run(second_derivatives, RANKS) == [{text}] * RANKS
