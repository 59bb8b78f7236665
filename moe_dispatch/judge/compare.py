"""How far a run on a mesh is from one process."""

import torch
from torch import Tensor

from .results import Difference, Reference, Tolerance, Training

# Rounding moves a gradient by fewer units in the last place than this: measured 4 to 22 in every row of the packaged
# configs. One that cancels exactly moves by 10 million. It is the rest of larger terms, and is compared with those.
USUAL_NOISE = 32


def compare(found: Training, reference: Reference, tolerance: Tolerance) -> tuple[Difference, ...]:
    """One difference per quantity, each relative to the largest value of its kind (gradients: of the parameter).

    A gradient that cancels (exactly, in a text of one byte repeated) is what rounding leaves of its terms. It is
    compared with their size, which its noise in one process tells.
    """
    wanted = reference.training
    logits, (row, position, _) = difference(found.logits_BLV, wanted.logits_BLV, 0.0)
    found_losses, losses = (torch.tensor(run.losses, dtype=torch.float64, device="cpu") for run in (found, wanted))
    first_loss, _ = difference(found_losses[:1], losses[:1], 0.0)
    curve, (step,) = difference(found_losses, losses, 0.0)
    by_name = {
        name: difference(found.gradients[name], wanted.gradients[name], scale)[0]
        for name, scale in scales(reference).items()
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


def scales(reference: Reference) -> dict[str, float]:
    """The size of the terms of each parameter's gradient, of which its noise is a share.

    At most that of the largest gradient of all, which also stands for the terms of one that is 0 without noise.
    """
    gradients = reference.training.gradients
    largest = max(gradient.abs().max().item() for gradient in gradients.values() if gradient.numel())
    unit = USUAL_NOISE * reference.epsilon
    return {
        name: min(reference.noise[name] / unit, largest) if gradient.any() or reference.noise[name] else largest
        for name, gradient in gradients.items()
    }


def difference(found: Tensor, wanted: Tensor, least_scale: float) -> tuple[float, tuple[int, ...]]:
    """max |found - wanted| / max |wanted|, and where it is; NaN where the shapes differ or a value is not finite."""
    if found.shape != wanted.shape or not wanted.numel():
        return (torch.nan if found.shape != wanted.shape else 0.0), (0,) * wanted.ndim
    error = (found.double() - wanted.double()).abs()
    where = tuple(int(i) for i in torch.unravel_index(error.nan_to_num(torch.inf).argmax(), error.shape))
    scale = max(wanted.double().abs().max().item(), least_scale)
    return (error[where].item() / scale if scale else error[where].item()), where
