"""What training runs found, and how far they are apart."""

from dataclasses import dataclass

from torch import Tensor

QUANTITIES = ("logits", "loss", "gradients", "loss curve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a model is trained: AdamW, a step for each batch."""

    learning_rate: float
    weight_decay: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Largest ``max |difference| / max |value|`` that counts as agreement, per quantity."""

    logits: float
    loss: float
    gradients: float
    loss_curve: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Training:
    """What a training run found, in one process or gathered from a mesh: tensors in float64 on the CPU.

    Attributes:
        logits_BLV: of the first step.
        losses: of every step.
        gradients: of every parameter in the first step, by name.
    """

    logits_BLV: Tensor
    losses: tuple[float, ...]
    gradients: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reference:
    """What one process found, and how far rounding alone moves it.

    Attributes:
        noise: by parameter, how far its gradient moves when all parameters move by a unit in the last place.
        epsilon: that unit, relative to 1.
    """

    training: Training
    noise: dict[str, float]
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OnMesh:
    """What a mesh found, the same on every rank.

    Attributes:
        training: the training run, gathered.
        rank_of_token_BL: which rank holds which token.
    """

    training: Training
    rank_of_token_BL: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one quantity is from one process, as ``max |difference| / max |value|``.

    Attributes:
        quantity: one of QUANTITIES.
        value: the difference; NaN where either side is.
        tolerance: what is allowed.
        where: the place of the largest difference: a parameter, a token or a step.
    """

    quantity: str
    value: float
    tolerance: float
    where: str

    @property
    def agrees(self) -> bool:
        return self.value <= self.tolerance  # False for NaN
