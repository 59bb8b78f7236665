"""What is wrong with a run that differs, in words, where its numbers tell."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .layout import CONTIGUOUS, Layout
from .results import Difference, OnMesh, Reference, Training

MOST_NAMED = 3  # parameters in a sentence
RANDOM = 0.01  # of the largest gradient; rounding moves it by 1e-6 in float32
OTHERWISE_COUNTED = (
    "logits agree and the loss does not: it counts targets, their mean or an auxiliary loss otherwise, e.g. labels "
    "shifted inside of a shard, a mean of each rank, or a balance loss of each shard"
)
ORDER_LOST = ", as far as the order of tokens is that of contiguous shards: it is taken for theirs, e.g. in positions"
MEANINGS = ("dp", "sp", "tp", "ep", "ranks")


@dataclass(frozen=True, slots=True)
class Finding:
    """What tells of a run.

    Attributes:
        layout: of the mesh.
        near: whether two numbers, relative to 1, are the same but for rounding.
    """

    layout: Layout
    near: Callable[[float], bool]

    def count(self, ratio: float) -> str:
        """ "4 (dp * sp)": the number of ranks that ``ratio`` is, with what it counts; empty where it is none."""
        whole = round(ratio)
        if whole < 2 or not self.near(ratio / whole - 1):
            return ""
        kinds = [name for name in MEANINGS if getattr(self.layout, name) == whole]
        return f"{whole} ({' or '.join(kinds)})" if kinds else f"{whole}"


def words_of(
    differences: Sequence[Difference], found: OnMesh, reference: Reference, layout: Layout
) -> tuple[str, ...]:
    """Sentences about what differs; none where all agrees or nothing more can be told."""
    by_quantity = {difference.quantity: difference for difference in differences}
    if all(difference.agrees for difference in differences):
        return ()
    told = list(_of_noise(reference))
    if not by_quantity["logits"].agrees:
        told += _of_logits(found, reference.training, by_quantity["logits"].tolerance, layout)
    if not by_quantity["loss"].agrees:
        limit = by_quantity["loss"].tolerance
        finding = Finding(layout, lambda off: abs(off) <= 10 * limit)
        told += _of_loss(found.training, reference.training, finding, logits_agree=by_quantity["logits"].agrees)
    if not by_quantity["gradients"].agrees:
        limit = by_quantity["gradients"].tolerance
        told += _of_gradients(
            found.training, reference.training, limit, Finding(layout, lambda off: abs(off) <= 10 * limit)
        )
    if [name for name, difference in by_quantity.items() if not difference.agrees] == ["loss curve"]:
        told.append(
            "the first step agrees and later ones do not: something is kept from step to step, or is not updated"
        )
    return tuple(told)


def _of_noise(reference: Reference) -> Iterator[str]:
    """Whether one process agrees with itself."""
    largest = max((gradient.abs().max().item() for gradient in reference.training.gradients.values()), default=0.0)
    noise = max(reference.noise.values(), default=0.0)
    if noise > RANDOM * largest:
        yield (
            f"gradients of one process move by {noise / largest:.0%} where its weights move by a unit in the last "
            "place: the model is random, e.g. by dropout, or has no stable answer"
        )


def _of_logits(found: OnMesh, wanted: Training, limit: float, layout: Layout) -> Iterator[str]:
    """Whose tokens agree."""
    got_BLV, wanted_BLV = found.training.logits_BLV, wanted.logits_BLV
    if got_BLV.shape != wanted_BLV.shape:
        yield f"logits are {tuple(got_BLV.shape)}, of one process {tuple(wanted_BLV.shape)}"
        return
    scale = wanted_BLV.abs().max().item()
    agrees_BL = ((got_BLV - wanted_BLV).abs() <= limit * scale).all(-1)
    rank_BL = torch.tensor(found.rank_of_token_BL, device="cpu")
    ranks = rank_BL.unique().tolist()
    right = [rank for rank in ranks if agrees_BL[rank_BL == rank].all()]
    places_L = agrees_BL.all(0)
    if of_data := _of_rows_that_agree(agrees_BL, layout):
        yield of_data
    elif right:
        yield f"logits agree on the tokens of rank{'s' * (len(right) > 1)} {', '.join(map(str, right))} only"
    elif not agrees_BL.any():
        yield "logits differ at every token"
    elif places_L[0]:
        first = int(places_L.int().cumprod(0).sum())
        is_lost = layout.order != CONTIGUOUS and first == layout.places_in_order
        yield f"logits agree at the first {first} places of each row{ORDER_LOST if is_lost else ''}"
    else:
        yield f"logits agree at {int(agrees_BL.sum())} of {agrees_BL.numel()} tokens"


def _of_rows_that_agree(agrees_BL: Tensor, layout: Layout) -> str:
    """Whether what agrees is what padding, or documents before, cannot reach; empty where it is not."""
    unpadded = [pads == 0 for pads in layout.left_padding]
    if any(unpadded) and agrees_BL.all(1).tolist() == unpadded:
        return "logits differ in rows with padding only: it is attended to, or its mask is lost"
    places, starts = [room for _, room in layout.documents], range(0, agrees_BL.numel() + 1, layout.seq)
    ends = list(accumulate(places))
    first = [[start in starts] * room for start, room in zip([0, *ends], places, strict=False)]
    first_BL = torch.tensor([x for part in first for x in part], device="cpu")
    if places and not first_BL.all() and torch.equal(agrees_BL.flatten(), first_BL):
        return "logits agree in the first document of each row only: documents attend to those before them"
    return ""


def _of_loss(found: Training, wanted: Training, finding: Finding, *, logits_agree: bool) -> Iterator[str]:
    got, right = found.losses[0], wanted.losses[0]
    if not right or not got or got != got:
        return
    if count := finding.count(got / right):
        yield f"the loss is {count} times that of one process: each share is the whole, or a mean of fewer tokens"
    elif count := finding.count(right / got):
        yield f"the loss is 1/{count.partition(' ')[0]} of that of one process: divided once more than it should be"
    elif logits_agree:
        yield OTHERWISE_COUNTED


def _of_gradients(found: Training, wanted: Training, limit: float, finding: Finding) -> Iterator[str]:
    """Groups of parameters whose gradients are the same multiple of the right ones."""
    names_of_ratio: dict[str, list[str]] = defaultdict(list)
    agreeing = []
    for name, right in wanted.gradients.items():
        got = found.gradients[name]
        text = _ratio(got, right, limit, finding)
        (agreeing if text == "agrees" else names_of_ratio[text]).append(name)
    for text, names in names_of_ratio.items():
        if text:
            yield f"{_named(names, of=len(wanted.gradients))} {text}"


def _ratio(got: Tensor, right: Tensor, limit: float, finding: Finding) -> str:
    """What multiple of ``right`` it is, in words; empty where it is none that tells anything."""
    if got.shape != right.shape or not right.numel():
        return "" if got.shape == right.shape else "are of another shape"
    scale = right.abs().max().item()
    if ((got - right).abs() <= limit * scale).all():
        return "agrees"
    if got.isnan().all():
        return "are not there: nothing reached these parameters"
    if not scale or not got.isfinite().all():
        return ""
    if not got.any():
        return "are 0: no gradient comes back to them"
    if _same_on_each_rank(got, finding.layout.ep, 10 * limit * scale):
        return "are the same on every rank of ep: summed over ranks that hold other experts"
    ratio = ((got * right).sum() / (right * right).sum()).item()
    if ((got - ratio * right).abs() > 10 * limit * scale * max(ratio, 1)).any():
        return ""
    if count := finding.count(ratio):
        return f"are {count} times too large: summed over ranks that hold the same"
    if count := finding.count(1 / ratio if ratio else 0.0):
        return f"are 1/{count} of the reference: averaged over ranks instead of summed"
    return f"are {ratio:.3g} times the reference"


def _same_on_each_rank(got: Tensor, ep: int, limit: float) -> bool:
    """Whether all shares of experts are one and the same."""
    if ep == 1 or not got.ndim or len(got) % ep:
        return False
    first, *others = got.chunk(ep)
    return all(((part - first).abs() <= limit).all() for part in others)


def _named(names: Sequence[str], *, of: int) -> str:
    if len(names) == of:
        return "gradients of all parameters"
    more = len(names) - MOST_NAMED
    return f"gradients of {', '.join(names[:MOST_NAMED])}" + (f" and {more} more" if more > 0 else "")
