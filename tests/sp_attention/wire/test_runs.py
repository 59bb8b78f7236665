"""Ranks in a row that are served by one copy: the bits of one copy per piece, and as many launches at any number of
ranks.
"""

import random
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import Statement
from sp_attention import Scheme, attention_over_ranks, ulysses_attention
from sp_attention.wire.boxes import Box, Boxes, Joins, Parts, to_add, to_fill, to_read
from sp_attention.wire.tensors import Cut
from tests.support.tensors import leaf

pytestmark = pytest.mark.usefixtures("uncovered")

TOKENS, HEADS, WIDTH = 12, 16, 3


# ---- one copy per piece, written out --------------------------------------------------------------------


def piece(x: Tensor, dim: int, box: Box) -> Tensor:
    of_tokens = x[:, box.token : box.token + box.tokens] if dim else x[box.token : box.token + box.tokens]
    return of_tokens[:, :, box.head : box.head + box.heads]


def pieces_by_rank(cuts: "Cuts", tensors: list[Tensor], rank: int) -> list[Tensor]:
    """Of every other rank, tensor after tensor, box after box."""
    others = [r for r in range(cuts.ranks) if r != rank]
    return [
        piece(x, dim, box)
        for r in others
        for x, (dim, boxes) in zip(tensors, cuts.of, strict=True)
        for box in boxes[r]
    ]


# ---- boxes of any kind ---------------------------------------------------------------------------------

DISJOINT = ("heads", "tokens", "gaps", "stairs", "two runs, heads", "uneven")


class Cuts:
    """Two tensors, and boxes of them for each of some ranks: runs of ranks that have them side by side, in the same
    place, or somewhere; sometimes two of each rank; sometimes empty."""

    def __init__(self, seed: int, overlapping: bool) -> None:
        draw = random.Random(seed)
        self.ranks, self.overlapping = draw.randrange(2, 9), overlapping
        self.of = [(draw.randrange(2), self.boxes_of(draw)) for _ in range(2)]

    def boxes_of(self, draw: random.Random) -> list[Boxes]:
        kind = draw.choice([*DISJOINT, *["two runs, tokens", "anywhere"] * self.overlapping])
        step, boxes = draw.randrange(2), list[Boxes]()
        for rank in range(self.ranks):
            if kind == "heads":
                boxes.append([Box(step, 4, rank, 1)])
            elif kind == "tokens":
                boxes.append([Box(rank, 1, step, 3)])
            elif kind == "gaps":
                boxes.append([Box(step, 4, 2 * rank, 1)])
            elif kind == "stairs":
                boxes.append([Box(rank // 2, 1, rank - rank // 2, 1)])
            elif kind == "two runs, heads":
                boxes.append([Box(5, 4, rank, 1), Box(0, 2, rank, 1)])
            elif kind == "two runs, tokens":
                boxes.append([Box(rank, 1, 0, 3), Box(rank + 1, 1, 1, 3)])
            elif kind == "anywhere":
                boxes.append([Box(draw.randrange(4), 4, draw.randrange(3), draw.randrange(3))])
            else:
                boxes.append([Box(rank, draw.randrange(2), 0, HEADS)])
        return boxes

    def tensors(self, seed: int) -> list[Tensor]:
        draw = torch.Generator().manual_seed(seed)
        shapes = [(2, TOKENS, HEADS, WIDTH) if dim else (TOKENS, 2, HEADS, WIDTH) for dim, _ in self.of]
        return [torch.randn(shape, generator=draw) for shape in shapes]

    def cut(self, tensors: list[Tensor], rank: int, joins: Joins) -> Cut:
        dims, boxes = zip(*self.of, strict=True)
        return Cut(tensors, Parts.of(rank, dims, boxes, joins))


@pytest.mark.parametrize("seed", range(60))
def test_a_message_is_its_pieces_one_after_the_other(seed: int) -> None:
    cuts = Cuts(seed, overlapping=True)
    tensors = cuts.tensors(seed)
    for rank in range(cuts.ranks):
        wanted = [x.flatten() for x in pieces_by_rank(cuts, tensors, rank)]
        cut = cuts.cut(tensors, rank, to_read)
        message = torch.full((sum(cut.message_sizes()),), torch.nan)
        for part, x in cut.with_messages(message):
            part.copy_(x)
        assert torch.equal(message, torch.cat([*wanted, message[:0]]))


@pytest.mark.parametrize(("joins", "overlapping"), [(to_fill, False), (to_add, True)])
@pytest.mark.parametrize("seed", range(60))
def test_what_came_is_written_or_added_in_the_order_of_the_ranks(seed: int, joins: Joins, overlapping: bool) -> None:
    """In float32, so that sums in another order are other bits."""
    cuts = Cuts(seed, overlapping)
    write: Callable[[Tensor, Tensor], Any] = Tensor.add_ if overlapping else Tensor.copy_
    for rank in range(cuts.ranks):
        wanted, got = cuts.tensors(seed), cuts.tensors(seed)
        outs = pieces_by_rank(cuts, wanted, rank)
        message = torch.randn(sum(out.numel() for out in outs), generator=torch.Generator().manual_seed(rank))
        for part, out in zip(message.split([out.numel() for out in outs]), outs, strict=True):
            write(out, part.view(out.shape))
        for part, out in cuts.cut(got, rank, joins).with_messages(message):
            write(out, part)
        assert all(map(torch.equal, got, wanted))


# ---- launches ------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts operations that compute or copy: no views, no collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        is_view = not schema.is_mutable and any(x.alias_info is not None for x in schema.returns)
        self.number += not is_view and "c10d" not in func.namespace
        return func(*args, **(kwargs or {}))


class Arrived:
    def wait(self) -> None: ...


class Alone(dist.ProcessGroup):
    """One rank of many, whose peers send zeros."""

    def __init__(self, rank: int, ranks: int) -> None:
        init: Any = super().__init__  # torch's stub knows only the form that takes a store
        init(rank, ranks)


def zeros_come(out: Tensor, rows: Tensor, *_: object, group: object, async_op: bool) -> Arrived:
    out.detach().zero_()
    return Arrived()


def launches(ranks: int, scheme: Scheme | None) -> tuple[int, int]:
    """Of one attention on a rank in the middle, forward and backward; its peers send zeros."""
    sharding, group = TokenSharding(batch=1, seq=Partition.even(2 * ranks, ranks)), Alone(3, ranks)
    call = ulysses_attention if scheme is None else partial(attention_over_ranks, scheme=scheme)
    leaves = [leaf(torch.randn(1, 2, ranks, 4)) for _ in "qkv"]
    with mock.patch.object(dist, "all_to_all_single", zeros_come), mock.patch.object(Statement, "check"):
        with Kernels() as forward:
            out_BlNH = call(*leaves, sharding=sharding, group=group, is_causal=True)
        with Kernels() as backward:
            out_BlNH.sum().backward()
    return forward.number, backward.number


@pytest.mark.parametrize("scheme", [None, Scheme.ulysses(), Scheme.gather()])
def test_launches_do_not_grow_with_the_ranks(scheme: Scheme | None) -> None:
    """Of 8 ranks and more, a rank that is neither the first nor the last has two runs of peers. Where keys were
    gathered, backward adds what each peer sends by itself, in the order of the ranks."""
    found = [launches(ranks, scheme) for ranks in (8, 16, 64)]
    assert len({forward for forward, _ in found}) == 1
    assert len({backward for _, backward in found}) == (3 if scheme == Scheme.gather() else 1)
    assert scheme is not None or found[0] <= (67, 43)
