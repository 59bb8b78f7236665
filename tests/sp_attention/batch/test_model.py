"""A small model whose loss and gradients equal those of one process."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Batch, mean_cross_entropy, mean_loss, shard_batch, shift_labels, ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.batches import NONE, Order
from tests.support.ranks import world
from tests.support.tensors import scattered

pytestmark = pytest.mark.usefixtures("uncovered")

VOCAB, WIDTH, HEADS, GROUPS = 11, 12, 3, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A batch, what its places are by hand, and how it is cut."""

    seq: tuple[int, ...]
    batch: int = 2
    kind: str = "plain"
    targets: str = "all"
    axes: int = 0
    order: Order = "BL"
    chunk: int = 0

    @property
    def sharding(self) -> TokenSharding:
        return TokenSharding(batch=self.batch, seq=Partition(self.seq), order=self.order)

    @property
    def length(self) -> int:
        return sum(self.seq)

    def documents(self) -> list[list[int]]:
        """Of each place, -1 for padding."""
        length = self.length
        if self.kind == "right":
            return [[0] * (length - 2 * row) + [-1] * 2 * row for row in range(self.batch)]
        if self.kind in ("left", "pairs", "lowest"):
            return [[-1] * (row + 1) + [0] * (length - row - 1) for row in range(self.batch)]
        if self.kind == "packed":
            return [[0] * 4 + [1] + [2] * (length - 5)]
        if self.kind == "padded":
            return [[0] * 3 + [-1] * 2 + [1] * 4 + [-1] + [3] * (length - 12) + [-1] * 2]
        return [[0] * length for _ in range(self.batch)]

    def attention(self) -> dict[str, Any]:
        """The masks and documents of the Batch."""
        length, real_BL = self.length, torch.tensor(self.documents()) >= 0
        closed_BL = torch.zeros(real_BL.shape, dtype=torch.float64).masked_fill(~real_BL, -math.inf)
        pairs_BLL = real_BL[:, None] & real_BL[:, :, None] & torch.ones(length, length).tril().bool()
        lowest = torch.finfo(torch.float64).min
        return {
            "plain": {},
            "right": {"attention_mask": real_BL.long()},
            "left": {"attention_mask": closed_BL[:, None, None]},
            "pairs": {"attention_mask": pairs_BLL[:, None]},
            "lowest": {
                "attention_mask": torch.zeros(pairs_BLL.shape).double().masked_fill(~pairs_BLL, lowest)[:, None]
            },
            "packed": {"cu_seqlens": torch.tensor([0, 4, 5, length])},
            "padded": {
                "cu_seqlens": torch.tensor([0, 3, 7, 7, length - 5]),
                "cu_seqlens_padded": torch.tensor([0, 5, 10, 10, length]),
            },
        }[self.kind]

    def labels(self) -> Tensor:
        """(B, L), at their own tokens."""
        label_BL, length = self.tokens().clone(), self.length
        ends = torch.tensor(self.seq).cumsum(0).tolist()
        if self.targets == "unequal":
            label_BL[:, 1 : length - 2 : 2] = NONE
        elif self.targets == "none on rank 0":  # the target of its last token is the first label of the next rank
            label_BL[:, : ends[0] + 1] = NONE
        elif self.targets == "none":
            label_BL[:] = NONE
        elif self.targets == "one":  # that of token 2 in row 0
            label_BL = torch.full_like(label_BL, NONE).index_put((torch.tensor(0), torch.tensor(3)), label_BL[0, 3])
        return label_BL

    def tokens(self) -> Tensor:
        draw = torch.Generator().manual_seed(self.length)
        return torch.randint(0, VOCAB, (self.batch, self.length), generator=draw)

    def positions(self) -> Tensor:
        """(axes, B, L), given or by hand."""
        if self.axes:
            draw = torch.Generator().manual_seed(1)
            return torch.randint(0, 30, (self.axes, self.batch, self.length), generator=draw)
        rows = []
        for documents in self.documents():
            places = list(range(self.length))
            if self.kind in ("packed", "padded"):
                places = [documents[:i].count(d) if d >= 0 else 0 for i, d in enumerate(documents)]
            rows.append(places)
        return torch.tensor(rows)[None]


CASES = [
    Case(seq=(4, 3)),
    Case(seq=(9,)),
    Case(seq=(3, 0, 4), order="LB"),
    Case(seq=(1, 0, 1, 0)),
    Case(seq=(0, 7), targets="unequal", order="LB"),
    Case(seq=(4, 2, 5), targets="unequal", batch=3),
    Case(seq=(4, 2, 5), targets="none on rank 0"),
    Case(seq=(4, 2, 5), targets="none on rank 0", order="LB", chunk=2),
    Case(seq=(4, 3), targets="one"),  # B21: gradients of 1/2 and 1/4 elsewhere
    Case(seq=(2, 1, 3, 1), targets="one", order="LB"),
    Case(seq=(4, 3), targets="none"),
    Case(seq=(4, 0, 3), targets="none", order="LB", chunk=3),
    Case(seq=(4, 3), kind="right"),
    Case(seq=(2, 5, 1), kind="left", order="LB", batch=3),
    Case(seq=(5, 2), kind="pairs"),
    Case(seq=(2, 0, 6), kind="lowest", order="LB", targets="unequal"),
    Case(seq=(3, 6), batch=1, kind="packed"),
    Case(seq=(5, 1, 4), batch=1, kind="packed", order="LB", targets="unequal"),
    Case(seq=(6, 0, 3, 8), batch=1, kind="padded"),
    Case(seq=(4, 13), batch=1, kind="padded", order="LB", targets="none on rank 0", chunk=4),
    Case(seq=(4, 3), axes=1),
    Case(seq=(3, 0, 4), axes=3),
    Case(seq=(1, 5, 1), axes=3, order="LB", chunk=1),
    Case(seq=(6, 11), batch=1, kind="padded", axes=3, chunk=100),
]


def parameters() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    head = WIDTH // HEADS
    shapes = {
        "embed": (VOCAB, WIDTH),
        "position": (3, 40, WIDTH),
        "qkv": (WIDTH, (HEADS + 2 * GROUPS) * head),
        "out": (HEADS * head, WIDTH),
        "logits": (WIDTH, VOCAB),
    }
    return {
        name: torch.randn(shape, generator=draw, dtype=torch.float64).div(2).requires_grad_()
        for name, shape in shapes.items()
    }


def hidden(weights: dict[str, Tensor], token: Tensor, position: Tensor, attention: Callable[..., Tensor]) -> Tensor:
    """(B, l) or (l, B) tokens and (axes, ...) positions -> (..., WIDTH)."""
    x = weights["embed"][token]
    for axis in range(len(position)):
        x = x + weights["position"][axis][position[axis]]
    q, k, v = (x @ weights["qkv"]).unflatten(-1, (-1, WIDTH // HEADS)).split([HEADS, GROUPS, GROUPS], dim=2)
    return x + attention(q, k, v).flatten(2) @ weights["out"]


# ---- cases: what the ranks run -------------------------------------------------------------------------


def of_ranks(rank: int, case: Case) -> tuple[float, float, dict[str, Tensor]]:
    """Share, whole and gradients of this rank."""
    weights = parameters()
    batch = Batch(
        token_BL=case.tokens(),
        target_BL=None if case.targets == "all" else shift_labels(case.labels(), **case.attention()),
        position_BL=case.positions()[0] if case.axes == 1 else case.positions() if case.axes else None,
        **case.attention(),
    )
    part = shard_batch(batch, sharding=case.sharding, group=world())
    position = part.position_Bl if part.position_Bl.ndim == 3 else part.position_Bl[None]
    x_BlD = hidden(
        weights,
        part.token_Bl,
        position,
        lambda q, k, v: ulysses_attention(q, k, v, group=world(), is_causal=True, **part.attention),
    )
    if case.chunk:  # logits of a few tokens at a time
        dim, at, terms, targets = (1 if case.order == "BL" else 0), 0, [], []
        for piece in part.chunks(case.chunk):
            count = piece.token_Bc.shape[dim]
            logits_cV = (x_BlD.narrow(dim, at, count) @ weights["logits"]).flatten(0, 1)
            terms.append(F.cross_entropy(logits_cV, piece.target_Bc.flatten(), reduction="none"))
            targets.append(piece.target_Bc.flatten())
            at += count
        mean = mean_loss(torch.cat(terms), torch.cat(targets), group=world())
    else:
        mean = mean_cross_entropy(x_BlD @ weights["logits"], part.target_Bl, group=world())
    mean.share.backward()
    grads = {name: x.grad for name, x in weights.items() if x.grad is not None}
    assert len(grads) == len(weights)
    return mean.share.item(), mean.whole.item(), grads


def of_one(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process, from the tables of the case."""
    weights = parameters()
    documents, labels = case.documents(), case.labels().tolist()
    same_BLL = torch.tensor([[[a == b >= 0 for b in row] for a in row] for row in documents])
    x_BLD = hidden(
        weights,
        case.tokens(),
        case.positions(),
        lambda q, k, v: reference_attention(q, k, v, attn_mask=same_BLL[:, None], is_causal=True),
    )
    logits_BLV = x_BLD @ weights["logits"]
    terms = [
        logits_BLV[row, i].logsumexp(0) - logits_BLV[row, i, labels[row][i + 1]]
        for row in range(case.batch)
        for i in range(case.length - 1)
        if documents[row][i] == documents[row][i + 1] >= 0 and labels[row][i + 1] != NONE
    ]
    if not terms:
        return 0.0, {name: torch.zeros_like(x) for name, x in weights.items()}
    mean = torch.stack(terms).mean()
    mean.backward()
    return mean.item(), {name: x.grad for name, x in weights.items() if x.grad is not None}


# ---- what the tests ask --------------------------------------------------------------------------------


def check(threads: RankThreads, case: Case) -> None:
    """Every parameter has a gradient, and their sum is that of one process."""
    shares, wholes, grads = zip(*threads.run(of_ranks, len(case.seq), case), strict=True)
    loss, grad_of = of_one(case)
    assert sum(shares) == pytest.approx(loss, rel=1e-12, abs=1e-15)
    assert list(wholes) == [pytest.approx(loss, rel=1e-12, abs=1e-15)] * len(case.seq)
    for name, grad in grad_of.items():
        summed = torch.stack([of_rank[name] for of_rank in grads]).sum(0)
        torch.testing.assert_close(
            summed, grad, rtol=1e-11, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
        )
    if case.targets != "none":
        assert loss > 0.1
        assert all(bool((grad != 0).any()) for name, grad in grad_of.items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_process(case: Case, rank_threads: RankThreads) -> None:
    """Invariant 5, with unequal numbers of targets and with none on a rank (B6, B10, B21)."""
    check(rank_threads, case)


MANY: dict[str, Callable[[int], Case]] = {
    "fewer tokens than ranks": lambda ranks: Case(seq=scattered(7, ranks)),
    "one target": lambda ranks: Case(seq=scattered(9, ranks), targets="one", order="LB"),
    "all on one rank": lambda ranks: Case(seq=(*(0,) * (ranks - 1), 6), kind="left", targets="unequal"),
    "documents": lambda ranks: Case(seq=scattered(15, ranks), batch=1, kind="padded", axes=3, chunk=1),
}


@pytest.mark.parametrize(("ranks", "name"), [*((16, name) for name in MANY), (64, "one target"), (64, "documents")])
def test_many_ranks(rank_threads: RankThreads, ranks: int, name: str) -> None:
    check(rank_threads, MANY[name](ranks))
