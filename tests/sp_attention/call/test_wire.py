"""What crosses the wire: two collectives forward and two backward, on every rank in the same order, and no byte more
than the tokens, heads and header need. Also what has to survive around it: recomputation, interleaving.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from operator import add
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from moe_dispatch.testing.counting import counting
from sp_attention import UlyssesAttention, ulysses_attention
from tests.sp_attention.call.test_ulysses import (
    TOLERANCE,
    Case,
    Whole,
    difference,
    grad_of,
    leaf,
    named_case,
    share,
    shares_of,
    shares_of_ulysses,
    whole_answer,
    world,
)
from tests.sp_attention.call.test_ulysses import reference_attention as reference

HEADER_BYTES = (16, 8)  # of each pair of ranks, in the two exchanges forward; none in their gradients
ALL_TO_ALL = "c10d::alltoall_base_"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes of one collective, for each rank."""

    to: tuple[int, ...]
    back: tuple[int, ...]


@contextmanager
def counted(sums: int = 0) -> Iterator[list[Sent]]:
    """Record each all-to-all and hand it on. There may be no other collective, but for so many sums at the end."""
    sent: list[Sent] = []
    trade = dist.all_to_all_single

    def count(out: Tensor, rows: Tensor, received: list[int], given: list[int], **options: Any) -> Any:
        row_bytes = rows[:0].numel() or rows.element_size() * (rows.numel() // max(len(rows), 1) or 1)
        sent.append(Sent(tuple(n * row_bytes for n in given), tuple(n * row_bytes for n in received)))
        return trade(out, rows, received, given, **options)

    with mock.patch.object(dist, "all_to_all_single", count), counting() as counts:
        yield sent
    assert counts.collectives == [ALL_TO_ALL] * len(sent) + ["c10d::allreduce_"] * sums


# ---- cases: what the ranks run -------------------------------------------------------------------------


def kv_heads(case: Case, rank: int) -> int:
    """Key/value heads that the rank's query heads use."""
    start, per_group = sum(case.head_sizes[:rank]), case.num_heads[0] // case.num_heads[1]
    return len({head // per_group for head in range(start, start + case.head_sizes[rank])})


def planned(case: Case, rank: int, element_bytes: int) -> list[Sent]:
    """Both exchanges forward, with their headers, then both backward, from the definition: who needs what of whom.
    What a rank needs of itself is in none."""
    width, v_width = case.widths

    def spread(source: int, to: int) -> int:
        queries = case.seq[source] * case.head_sizes[to] * width
        keys_and_values = case.kv_seq[source] * kv_heads(case, to) * (width + v_width)
        return case.batch * (queries + keys_and_values) * element_bytes

    def collect(source: int, to: int) -> int:
        return case.batch * case.seq[to] * case.head_sizes[source] * v_width * element_bytes

    forward = []
    for crossing in (spread, collect):
        pairs = [
            (0, 0) if other == rank else (crossing(rank, other), crossing(other, rank)) for other in range(case.ranks)
        ]
        forward.append(Sent(tuple(to for to, _ in pairs), tuple(back for _, back in pairs)))
    backward = [Sent(sent.back, sent.to) for sent in reversed(forward)]
    with_headers = []
    for sent, header_bytes in zip(forward, HEADER_BYTES, strict=True):
        header = [header_bytes * (other != rank) for other in range(case.ranks)]
        with_headers.append(Sent(tuple(map(add, sent.to, header)), tuple(map(add, sent.back, header))))
    return [*with_headers, *backward]


def sent_and_planned(rank: int, case: Case, dtype: torch.dtype) -> tuple[list[Sent], list[Sent]]:
    whole = Whole.of(case, dtype)
    with counted(sums=len(whole.learned)) as sent:
        shares_of_ulysses(rank, case, whole)
    return sent, planned(case, rank, whole.q_BLNH.element_size())


def recomputed(rank: int, case: Case) -> tuple[list[Sent], list[Sent], list[str]]:
    """The collectives of a checkpointed call, those of a plain one, and what differs from it."""
    whole = Whole.of(case, torch.float64)
    sharding = TokenSharding(batch=case.batch, seq=Partition(case.seq))
    parts = [share(x, case.seq, "BL", rank) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    heads = Partition(case.head_sizes)
    grad_BlNH = share(whole.grad_BLNH, case.seq, "BL", rank)

    def attention(*qkv: Tensor) -> Tensor:
        q_BlNH, k_BlGH, v_BlGH = (x * 2 for x in qkv)
        return ulysses_attention(
            q_BlNH, k_BlGH, v_BlGH, sharding=sharding, group=world(), heads=heads, is_causal=True, dropout_p=0.3
        )

    def grads(run: Callable[..., Tensor]) -> tuple[list[Sent], list[Tensor]]:
        leaves = [leaf(x) for x in parts]
        torch.manual_seed(3)
        with counted() as sent:
            run(*leaves).backward(grad_BlNH)
        return sent, [grad_of(x) for x in leaves]

    plain, wanted = grads(attention)
    again, got = grads(lambda *qkv: checkpoint(attention, *qkv, use_reentrant=False))
    return again, plain, [name for name, a, b in zip("qkv", got, wanted, strict=True) if not torch.equal(a, b)]


def interleaved(rank: int, backward_order: tuple[int, ...]) -> list[str]:
    """Three modules of different heads and groups; every forward before any backward."""
    pairs = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    pair = pairs[rank % 2]
    assert isinstance(pair, dist.ProcessGroup)
    cases = [
        named_case(4, "causal", (2, 0, 3, 2), num_heads=(3, 3)),
        named_case(2, "causal", (4, 3), num_heads=(4, 2), widths=(4, 3)),
        named_case(4, "causal", (2, 1, 3, 1), num_heads=(12, 3)),
    ]
    kept, failures = [], []
    for case, group in zip(cases, (world(), pair, world()), strict=True):
        module, mine = UlyssesAttention(group=group, is_causal=True), group.rank()
        whole = Whole.of(case, torch.float64)
        leaves = [leaf(share(x, case.seq, "BL", mine)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
        out_BlNH = module(*leaves, sharding=TokenSharding(batch=2, seq=Partition(case.seq)))
        kept.append((out_BlNH, leaves, share(whole.grad_BLNH, case.seq, "BL", mine)))
    for i in backward_order:
        kept[i][0].backward(kept[i][2])
    for i, (case, group) in enumerate(zip(cases, (world(), pair, world()), strict=True)):
        wanted = shares_of(whole_answer(reference, Whole.of(case, torch.float64)), group.rank(), case)
        out_BlNH, leaves, _ = kept[i]
        got = dict(zip(("out", "dq", "dk", "dv"), (out_BlNH.detach(), *map(grad_of, leaves)), strict=True))
        failures += [f"{name} of {i}" for name in got if not difference(got[name], wanted[name]) <= TOLERANCE]
    dist.destroy_process_group(pair)
    return failures


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

WIRED = {
    "the shape table": named_case(2, "none", (3, 2), num_heads=(4, 2), widths=(6, 4)),
    "a rank without tokens": named_case(3, "causal", (3, 0, 4), num_heads=(6, 3), widths=(6, 4)),
    "ranks without heads": named_case(4, "causal", (3, 1, 0, 1), num_heads=(2, 1), widths=(6, 4)),
    "groups over ranks": named_case(4, "causal", (3, 1, 2, 1), num_heads=(12, 3), widths=(6, 4)),
    "fewer key/value heads than ranks": named_case(4, "none", (2, 2, 2, 1), num_heads=(8, 2), order="LB"),
    "cross-attention": named_case(3, "cross causal", (1, 1, 3), kv_seq=(4, 0, 3), num_heads=(4, 2), widths=(6, 4)),
    "documents": named_case(3, "padded", (6, 0, 10), batch=1, num_heads=(4, 2), widths=(6, 4)),
    "sinks": named_case(2, "sinks", (3, 2), num_heads=(3, 1), widths=(6, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", WIRED)
def test_two_collectives_each_way_and_no_padding(rank_pool: RankPool, name: str, dtype: torch.dtype) -> None:
    """Invariant 8: each query token-head, each key/value token-head for each other rank that needs it, each output,
    once."""
    case = WIRED[name]
    for sent, wanted in rank_pool.run(sent_and_planned, case.ranks, case, dtype):
        assert sent == wanted


def test_the_bytes_of_the_shape_table(rank_pool: RankPool) -> None:
    """B 2, L 5 = 3 + 2, 4 over 2 heads, widths 6 and 4: what rank 0 hands rank 1, in float64, by hand."""
    (sent, _), _ = rank_pool.run(sent_and_planned, 2, WIRED["the shape table"], torch.float64)
    q, k, v, out = 3 * 2 * 2 * 6, 3 * 2 * 1 * 6, 3 * 2 * 1 * 4, 2 * 2 * 2 * 4
    assert [sent[0].to[1], sent[1].to[1]] == [16 + 8 * (q + k + v), 8 + 8 * out]


@pytest.mark.parametrize("heads", [(2, 2), (4, 0), (1, 3)])
@pytest.mark.parametrize("seq", [(3, 2), (0, 5)])
def test_recomputation_repeats_the_forward(rank_pool: RankPool, seq: tuple[int, ...], heads: tuple[int, ...]) -> None:
    """Invariant 8, in one order on every rank: what one sends, the other expects. Dropout falls on the same
    weights."""
    case = Case(ranks=2, kind="none", batch=2, seq=seq, kv_seq=seq, num_heads=(4, 2), widths=(6, 4), heads=heads)
    results = rank_pool.run(recomputed, 2, case, timeout=20)
    assert [failures for _, _, failures in results] == [[], []]
    for again, plain in [(again, plain) for again, plain, _ in results]:
        assert len(plain) == 4
        assert again[:2] == plain[:2]
        assert sorted(again[2:], key=repr) == sorted(plain[: len(again) - 4] + plain[2:], key=repr)
    everywhere = [again for again, _, _ in results]
    for one, other in zip(*everywhere, strict=True):
        assert (one.to[1], one.back[1]) == (other.back[0], other.to[0])


@pytest.mark.parametrize("backward_order", list(permutations(range(3))))
def test_modules_of_different_heads_and_groups_interleave(
    rank_pool: RankPool, backward_order: tuple[int, ...]
) -> None:
    """Invariant 6, B3."""
    assert rank_pool.run(interleaved, 4, backward_order) == [[]] * 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_has_the_dtype_of_its_input(rank_pool: RankPool, dtype: torch.dtype) -> None:
    """Invariant 10, B15."""
    assert rank_pool.run(dtypes_of_gradients, 2, dtype) == [[dtype] * 4 + [torch.float32]] * 2


def test_gradients_are_those_of_small_differences(rank_pool: RankPool) -> None:
    """Invariant 10."""
    assert rank_pool.run(numeric_gradient, 2) == [True, True]
