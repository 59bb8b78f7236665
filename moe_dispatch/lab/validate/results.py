"""What one row of the matrix found."""

from dataclasses import dataclass

from torch import Tensor

QUANTITIES = ("logits", "loss", "gradients", "loss curve")


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one quantity is from one process, as max |difference| / max |value|.

    Attributes:
        quantity: one of QUANTITIES.
        value: the difference; NaN where either side is.
        tolerance: what the config allows.
        where: the place of the largest difference: a parameter, a token or a step.
    """

    quantity: str
    value: float
    tolerance: float
    where: str

    @property
    def agrees(self) -> bool:
        return self.value <= self.tolerance  # False for NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One row of the matrix in one dtype.

    Attributes:
        name, dtype, mesh: what ran, e.g. "FSDP2 + TP2 + EP4", "float64", "dp 2, sp 1, tp 2, ep 4".
        shape: (B, L), global.
        differences: one per quantity, in the order of QUANTITIES; empty where the row did not run to its end.
        error: why it did not: the exception's text; empty where it did.
        losses, reference_losses: the loss of each step, here and in one process.
        seconds: how long it took.
        rank_of_token_BL: which rank holds which token in the MoE layers.
        rows_sent_PP: rows that each rank sent to each rank in the first MoE layer's first dispatch.
    """

    name: str
    dtype: str
    mesh: str
    shape: tuple[int, int]
    differences: tuple[Difference, ...]
    error: str
    losses: tuple[float, ...]
    reference_losses: tuple[float, ...]
    seconds: float
    rank_of_token_BL: tuple[tuple[int, ...], ...]
    rows_sent_PP: tuple[tuple[int, ...], ...]

    @property
    def disagreeing(self) -> tuple[str, ...]:
        """The quantities that differ; ("error",) where the row did not run to its end."""
        if self.error:
            return ("error",)
        return tuple(difference.quantity for difference in self.differences if not difference.agrees)

    @property
    def agrees(self) -> bool:
        return not self.disagreeing
