"""How far a run on a mesh is from one process."""

import torch
from torch import Tensor

from .config.tables import ToleranceConfig
from .results import Difference, Reference

# A parameter whose gradient is this much smaller than the largest of all is compared with that, not with itself:
# what is left of it is rounding.
SMALLEST_SCALE = 1e-6


def compare(found: Reference, reference: Reference, tolerance: ToleranceConfig) -> tuple[Difference, ...]:
    """One difference per quantity, each relative to the largest value of its kind (gradients: of the parameter)."""
    logits, (row, position, _) = difference(found.logits_BLV, reference.logits_BLV, 0.0)
    found_losses, losses = (torch.tensor(run.losses, dtype=torch.float64) for run in (found, reference))
    first_loss, _ = difference(found_losses[:1], losses[:1], 0.0)
    curve, (step,) = difference(found_losses, losses, 0.0)
    largest = max(gradient.abs().max().item() for gradient in reference.gradients.values() if gradient.numel())
    by_name = {
        name: difference(found.gradients[name], gradient, SMALLEST_SCALE * largest)[0]
        for name, gradient in reference.gradients.items()
    }
    worst = max(by_name, key=lambda name: torch.inf if by_name[name] != by_name[name] else by_name[name])
    return (
        Difference(
            quantity="logits", value=logits, tolerance=tolerance.logits, where=f"row {row}, position {position}"
        ),
        Difference(quantity="loss", value=first_loss, tolerance=tolerance.loss, where="step 0"),
        Difference(quantity="gradients", value=by_name[worst], tolerance=tolerance.gradients, where=worst),
        Difference(quantity="loss curve", value=curve, tolerance=tolerance.loss_curve, where=f"step {step}"),
    )


def difference(found: Tensor, wanted: Tensor, least_scale: float) -> tuple[float, tuple[int, ...]]:
    """max |found - wanted| / max |wanted|, and where it is; NaN where the shapes differ or a value is not finite."""
    if found.shape != wanted.shape or not wanted.numel():
        return (torch.nan if found.shape != wanted.shape else 0.0), (0,) * wanted.ndim
    error = (found.double() - wanted.double()).abs()
    where = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
    scale = max(wanted.double().abs().max().item(), least_scale)
    return (error[where].item() / scale if scale else error[where].item()), where
