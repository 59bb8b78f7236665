"""Batches, a run on one process, and the same over ranks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import TokenSharding, whole_state_dict
from sp_attention import Scheme
from sp_attention.integrations.transformers import Parallel

from .models import new_model

IGNORED = -100
ULYSSES = Scheme.ulysses()


@dataclass(frozen=True)
class Layout:
    """The sequence in ``lengths``, or in the order of tokens of ``sharding``, over "sp"."""

    dp: int
    sp: int
    ep: int
    lengths: tuple[int, ...] | None
    sharding: TokenSharding | None = None
    scheme: Scheme = ULYSSES

    @property
    def ranks(self) -> int:
        return self.dp * self.sp


@dataclass(frozen=True, eq=False)
class Run:
    """What is compared: all logits, the loss, and the gradient of every parameter by its name, all of one process."""

    logits_BLV: Tensor
    loss: float
    gradients: dict[str, Tensor] = field(default_factory=dict)


def batch_of(kind: str, rows: int = 2, length: int = 33) -> dict[str, Any]:
    """Plain, left-padded, right-padded or packed, with all labels that Transformers can tell."""
    ids = torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[:, 5] = IGNORED
    batch = {"input_ids": ids}
    if kind in ("left", "right"):
        padding = torch.arange(length) < 9 if kind == "left" else torch.arange(length) > length - 9
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[-1] = (~padding).long()
        # What a pad predicts depends on how an implementation attends where there is nothing to attend to.
        labels = labels.masked_fill(mask == 0, IGNORED)
        if kind == "left":
            labels[-1, 9] = IGNORED
        batch["attention_mask"] = mask
    if kind == "packed":
        ends = (12, 19) if rows > 1 else (12,)
        position = torch.arange(length).repeat(rows, 1)
        for row in range(rows):
            start = ends[row % len(ends)]
            position[row, start:] -= start
        batch["position_ids"] = position
    return batch | {"labels": labels}


def on_one_process(name: str, dtype: torch.dtype, batch: dict[str, Tensor]) -> Run:
    model = new_model(name, dtype)
    out = model(**batch, use_cache=False)
    out.loss.backward()
    return Run(out.logits.detach(), out.loss.item(), {n: p.grad for n, p in model.named_parameters()})


Change = Callable[[Parallel, Any], None]


def over_ranks(name: str, dtype: torch.dtype, batch: dict[str, Tensor], layout: Layout, change: Any = None) -> Run:
    """The same on each rank of a layout.

    Args:
        change: what a test does to the model before the forward.
    """
    parallel = Parallel(dp=layout.dp, sp=layout.sp, ep=layout.ep, device_type="cpu")
    model = new_model(name, dtype)
    parallel.apply(model, scheme=layout.scheme)
    if change is not None:
        change(model)
    step = parallel.shard(**batch, lengths=layout.lengths, sharding=layout.sharding)
    out = model(**step.inputs)
    loss = parallel.loss(model, out, step)
    loss.share.backward()
    parallel.sum_gradients(model)
    return Run(parallel.gather(out.logits, step).detach(), loss.whole.item(), whole_gradients(model))


def whole_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients under the names of the model of one process."""
    names = {n for n, _ in model.named_parameters()}
    for p in model.parameters():
        p.data = torch.zeros_like(p) if p.grad is None else p.grad
    whole = whole_state_dict(model)
    return {n: x for n, x in whole.items() if n in names}


def differences(run: Run, reference: Run, real_BL: Tensor | None = None) -> dict[str, float]:
    """Largest differences: of logits (of real tokens) and the loss in absolute terms, of each gradient relative to
    its norm."""
    logits_BLV = (run.logits_BLV - reference.logits_BLV).abs().amax(-1)
    if real_BL is not None:
        logits_BLV = logits_BLV[real_BL.bool()]
    found = {"logits": float(logits_BLV.max()), "loss": abs(run.loss - reference.loss)}
    for name, gradient in reference.gradients.items():
        found[name] = float((run.gradients[name] - gradient).norm() / gradient.norm())
    return found


def wide_enough(reference: Run) -> bool:
    """Does every parameter matter?"""
    return all(float(F.normalize(g.flatten(), dim=0).norm()) > 0 for g in reference.gradients.values())
