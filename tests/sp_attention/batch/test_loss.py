"""The mean loss over all ranks, and a small model whose loss and gradients equal those of one process."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import Batch, mean_cross_entropy, mean_loss, shard_batch, shift_labels, ulysses_attention
from sp_attention.batch.loss import _mean
from sp_attention.reference import reference_attention

Order = Literal["BL", "LB"]
NONE = -100
VOCAB, WIDTH, HEADS, GROUPS = 11, 12, 3, 1


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


# ---- the mean over ranks ---------------------------------------------------------------------------

TARGETS = {
    "unequal": [[3, NONE, 4], [NONE, NONE, 2], [1, 2, 3]],
    "one rank has none": [[3, 1, 4], [NONE, NONE, NONE], [1, NONE, 3]],
    "one target in all": [[NONE, NONE, NONE], [NONE, 0, NONE], [NONE, NONE, NONE]],
    "none at all": [[NONE] * 3] * 3,
    "one rank is empty": [[3, NONE, 4], [], [1, 2, 3]],
    "all ranks are empty": [[], [], []],
}


def logits_of(targets: list[list[int]], rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, l, V) of one rank, another for each; NaN where there is no target."""
    draw = torch.Generator().manual_seed(rank)
    logits_BlV = torch.randn(1, len(targets[rank]), VOCAB, generator=draw, dtype=torch.float64).to(dtype)
    return logits_BlV.masked_fill((torch.tensor([targets[rank]]).view(1, -1) == NONE)[..., None], math.nan)


@dataclass(frozen=True, slots=True)
class Answer:
    share: Tensor
    whole: Tensor
    num_targets: int
    grad: Tensor
    collectives: list[tuple[int, ...]]


def answer(rank: int, targets: list[list[int]], of_logits: bool, dtype: torch.dtype) -> Answer:
    logits_BlV = logits_of(targets, rank, dtype).requires_grad_()
    target_Bl = torch.tensor([targets[rank]], dtype=torch.int64).view(1, -1)
    collectives: list[tuple[int, ...]] = []
    all_reduce = dist.all_reduce

    def counted(x: Tensor, **kwargs: Any) -> None:
        collectives.append(tuple(x.shape))
        all_reduce(x, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted):
        if of_logits:
            mean = mean_cross_entropy(logits_BlV, target_Bl, group=world())
        else:
            mean = mean_loss(losses(logits_BlV, target_Bl), target_Bl, group=world())
        mean.share.backward()
    assert not mean.whole.requires_grad
    assert logits_BlV.grad is not None  # a rank without targets keeps its graph
    return Answer(mean.share.detach(), mean.whole, mean.num_targets, logits_BlV.grad, collectives)


def losses(logits_BlV: Tensor, target_Bl: Tensor) -> Tensor:
    """Per token; NaN where there is no target."""
    at_Bl = logits_BlV.gather(-1, target_Bl.clamp(min=0)[..., None])[..., 0]
    return logits_BlV.logsumexp(-1) - at_Bl


def one_process(targets: list[list[int]], dtype: torch.dtype = torch.float64) -> tuple[float, list[Tensor]]:
    """The mean over targets, one by one, and the gradient of each rank's logits."""
    logits = [logits_of(targets, rank, dtype).double().requires_grad_() for rank in range(len(targets))]
    terms = [
        logits[rank][0, i].logsumexp(0) - logits[rank][0, i, target]
        for rank, row in enumerate(targets)
        for i, target in enumerate(row)
        if target != NONE
    ]
    mean = torch.stack(terms).mean() if terms else sum((x.sum() * 0 for x in logits), start=torch.zeros(()))
    grads = torch.autograd.grad(mean, logits, allow_unused=True, materialize_grads=True)
    return float(mean.detach().nan_to_num()), [grad.nan_to_num(0.0) for grad in grads]


@pytest.mark.parametrize("name", TARGETS)
def test_cross_entropy_is_that_of_one_process(name: str, rank_pool: RankPool) -> None:  # B21
    answers = rank_pool.run(answer, 3, TARGETS[name], True, torch.float64)
    check(answers, TARGETS[name])
    for got, grad in zip(answers, one_process(TARGETS[name])[1], strict=True):
        torch.testing.assert_close(got.grad, grad, rtol=1e-12, atol=1e-14)  # not NaN where there is no target


@pytest.mark.parametrize("name", TARGETS)
def test_a_mean_of_losses_is_that_of_one_process(name: str, rank_pool: RankPool) -> None:
    answers = rank_pool.run(answer, 3, TARGETS[name], False, torch.float64)
    check(answers, TARGETS[name])
    for rank, (got, grad) in enumerate(zip(answers, one_process(TARGETS[name])[1], strict=True)):
        counts_l = torch.tensor(TARGETS[name][rank]) != NONE
        torch.testing.assert_close(got.grad[:, counts_l], grad[:, counts_l], rtol=1e-12, atol=1e-14)


def check(answers: list[Answer], targets: list[list[int]]) -> None:
    mean, _ = one_process(targets)
    assert sum(got.share.item() for got in answers) == pytest.approx(mean, rel=1e-12, abs=1e-15)
    for got in answers:
        assert got.whole.item() == pytest.approx(mean, rel=1e-12, abs=1e-15)
        assert got.num_targets == sum(target != NONE for row in targets for target in row)
        assert got.collectives == [(3,)]  # one, and none in backward
    assert len({got.whole.item() for got in answers}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_taken_in_float32(dtype: torch.dtype, rank_pool: RankPool) -> None:
    mean, grads = one_process(TARGETS["unequal"], dtype)
    for got, grad in zip(rank_pool.run(answer, 3, TARGETS["unequal"], True, dtype), grads, strict=True):
        assert got.whole.dtype == got.share.dtype == torch.float32
        assert got.grad.dtype == dtype
        assert got.whole.item() == pytest.approx(mean, rel=1e-6)
        torch.testing.assert_close(got.grad, grad.to(dtype))


def sum_of_many(rank: int) -> Tensor:
    """The losses of one rank in bfloat16, where 601 is 600."""
    loss_Bl = torch.ones(1, 601, dtype=torch.bfloat16)
    return mean_loss(loss_Bl, torch.zeros(1, 601, dtype=torch.int64), group=world()).share


def test_a_sum_of_bfloat16_losses_is_exact(rank_pool: RankPool) -> None:
    for share in rank_pool.run(sum_of_many, 2):
        assert share.dtype == torch.float32
        assert share.item() == 0.5


def count_many(rank: int) -> tuple[int, float]:
    mean = _mean(torch.tensor(2.0**24), 2**24 * rank + 1, "", world())
    return mean.num_targets, mean.share.item()


def test_counts_are_exact_where_float32_is_not(rank_pool: RankPool) -> None:
    assert rank_pool.run(count_many, 2) == [(2**24 + 2, pytest.approx(2**24 / (2**24 + 2), rel=1e-7))] * 2
    assert torch.tensor(2.0**24) + 1 == 2.0**24


def no_graph(rank: int) -> tuple[bool, float]:
    mean = mean_cross_entropy(torch.zeros(2, 3, VOCAB), torch.zeros(2, 3, dtype=torch.int32), group=world())
    return mean.share.requires_grad, mean.whole.item()


def test_evaluation_needs_no_graph_and_one_rank_is_enough(rank_pool: RankPool) -> None:
    assert rank_pool.run(no_graph, 1) == [(False, pytest.approx(math.log(VOCAB)))]


def ignored(rank: int) -> tuple[float, list[float], list[float]]:
    """The mean, and the gradients of a loss that is NaN where it is ignored and of what that came from."""
    x_Bl = torch.tensor([[4.0, 0.0]], requires_grad=True)
    loss_Bl = 0 * x_Bl.rsqrt() + x_Bl  # infinity times 0
    loss_Bl.retain_grad()
    mean = mean_loss(loss_Bl, torch.tensor([[1, NONE]]), group=world())
    mean.share.backward()
    assert loss_Bl.grad is not None
    assert x_Bl.grad is not None
    assert loss_Bl.isnan().tolist() == [[False, True]]
    return mean.whole.item(), loss_Bl.grad.flatten().tolist(), x_Bl.grad.flatten().tolist()


def test_nan_where_there_is_no_target_has_gradient_0_and_that_goes_into_its_graph(rank_pool: RankPool) -> None:
    """As ``mean_loss`` says: it cannot know what made the losses."""
    for whole, of_loss, of_x in rank_pool.run(ignored, 2):
        assert (whole, of_loss) == (4.0, [0.5, 0.0])
        assert of_x[0] == 0.5
        assert math.isnan(of_x[1])


def another_index(rank: int) -> int:
    return mean_loss(torch.ones(4), torch.tensor([-1, NONE, 2, -1]), group=world(), ignore_index=-1).num_targets


def test_the_index_to_ignore_is_the_callers(rank_pool: RankPool) -> None:
    assert rank_pool.run(another_index, 2) == [4, 4]


# ---- refusals --------------------------------------------------------------------------------------

IDS = torch.zeros(1, 2, dtype=torch.int64)
OUTSIDE = torch.tensor([[NONE, VOCAB]])
BAD_LOSSES = {
    "losses are (1, 3) of torch.float32 for targets (1, 2)": (torch.ones(1, 3), IDS),
    "losses are () of torch.float32 for targets (1, 2)": (torch.ones(()), IDS),
    "losses are (1, 2) of torch.int64 for targets (1, 2)": (torch.ones(1, 2).long(), IDS),
    "targets are torch.float32; they have to be ints": (torch.ones(1, 2), torch.zeros(1, 2)),
    "targets are on meta, but what they are for on cpu; move them there": (torch.ones(1, 2), IDS.to("meta")),
}
BAD_LOGITS = {
    "logits are (1, 3, 11) of torch.float32 for targets (1, 2)": (torch.ones(1, 3, VOCAB), IDS),
    "logits are (1, 2, 11) of torch.int64 for targets (1, 2)": (torch.ones(1, 2, VOCAB).long(), IDS),
    "targets are torch.bool; they have to be ints": (torch.ones(1, 2, VOCAB), IDS.bool()),
    "targets are on meta, but what they are for on cpu; move them there": (torch.ones(1, 2, VOCAB), IDS.to("meta")),
    "logits are (11,) of torch.float32 for targets ()": (torch.ones(VOCAB), torch.tensor(1)),
    "logits are () of torch.float32 for targets ()": (torch.ones(()), torch.tensor(1)),
    "target 11 for logits of 11 tokens; it has to be 0 to 10, or ignore_index = -100": (
        torch.ones(1, 2, VOCAB),
        OUTSIDE,
    ),
    "target -3 for logits of 11 tokens": (torch.ones(1, 2, VOCAB), IDS - 3),
}


def refusal(rank: int, mean: Callable[..., Any], bad: tuple[Tensor, Tensor]) -> str:
    """On rank 1 alone something is wrong."""
    good = torch.ones(1, 2, VOCAB) if mean is mean_cross_entropy else torch.ones(1, 2)
    values, targets = bad if rank == 1 else (good, IDS)
    try:
        mean(values, targets, group=world())
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("mean", "text", "bad"),
    [(mean_loss, *item) for item in BAD_LOSSES.items()]
    + [(mean_cross_entropy, *item) for item in BAD_LOGITS.items()],
)
def test_what_one_rank_has_wrong_is_everyones_error(
    mean: Callable[..., Any], text: str, bad: tuple[Tensor, Tensor], rank_pool: RankPool
) -> None:
    texts = rank_pool.run(refusal, 3, mean, bad, timeout=30)
    assert len(set(texts)) == 1
    assert texts[0].startswith(f"rank 1: {text}")


def test_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match="group is None; pass the process group explicitly"):
        mean_loss(torch.ones(2), torch.zeros(2, dtype=torch.int64), group=None)  # type: ignore[arg-type]


# ---- a model ---------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradients_are_those_of_one_process(case: Case, rank_pool: RankPool) -> None:
    """Invariant 5: every parameter has a gradient, and their sum is that of one process, with unequal numbers of
    targets and with none on a rank (B6, B10, B21)."""
    shares, wholes, grads = zip(*rank_pool.run(of_ranks, len(case.seq), case), strict=True)
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
