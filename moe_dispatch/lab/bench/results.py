"""What a bench run measured, as frozen values."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One pass of one contender, forward or backward: on one rank, or the largest of all ranks.

    Attributes:
        collectives: operations of a process group.
        wire_bytes: bytes to other ranks.
        all_ranks_bytes: the same, of all ranks that this tells of together.
        host_syncs: where the host waited for a device, or would have.
    """

    collectives: int
    wire_bytes: int
    all_ranks_bytes: int
    host_syncs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One contender, or floor, in one workload: on one rank, or the largest of all ranks.

    Attributes:
        forward_ms, both_ms: of each repetition; forward alone, and forward + backward. Empty where nothing was timed.
        processor_ms: for each rank, what forward + backward took of a processor in each repetition.
        forward, backward: None for a floor.
        kept_bytes: what the forward leaves for the backward, without its output.
        peak_bytes: rise of the resident memory during forward + backward; None where it is not known.
        phase_ms: time of each phase in one forward + backward, on rank 0; empty unless asked for.
        absent: why nothing was timed; empty where something was.
        wrong: whether that is because its results were wrong.
    """

    name: str
    forward_ms: tuple[float, ...] = ()
    both_ms: tuple[float, ...] = ()
    processor_ms: tuple[tuple[float, ...], ...] = ()
    forward: Traffic | None = None
    backward: Traffic | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    phase_ms: Mapping[str, float] | None = None
    absent: str = ""
    wrong: bool = False

    @property
    def processor_ms_of_rank(self) -> tuple[float, ...]:
        """Medians over the repetitions."""
        return tuple(median(of_rank) for of_rank in self.processor_ms)

    @property
    def fullest_rank(self) -> float:
        """The processor time of the rank that takes most, over the mean of all ranks."""
        return max(self.processor_ms_of_rank) / mean(self.processor_ms_of_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """All lines of a workload; the first floor is the one that ratios are taken against.

    Attributes:
        allocator: settings of the memory allocator that every rank was started with.
        error: what ended the workload early; empty where nothing did.
    """

    name: str
    kind: str
    shape: str
    allocator: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    error: str = ""

    @property
    def floor(self) -> Line | None:
        return next((line for line in self.lines if line.name in ("rank floor", "floor")), None)

    @property
    def timed_floor(self) -> Line:
        if self.floor is None:
            raise ValueError(f"workload {self.name!r} has no line of the floor, over which its times are told")
        return self.floor

    def ratios(self, line: Line) -> tuple[float, float]:
        """Forward, and forward + backward: medians over those of the floor."""
        floor = self.timed_floor
        return median(line.forward_ms) / median(floor.forward_ms), median(line.both_ms) / median(floor.both_ms)

    @property
    def fine(self) -> bool:
        return not self.error and not any(line.wrong for line in self.lines)


def largest(lines: list[Line]) -> Line:
    """One line of the same contender on every rank: the largest number of any rank, repetition by repetition."""
    first = lines[0]
    if first.absent:
        return next((line for line in lines if line.wrong), first)

    def passes(name: str) -> Traffic | None:
        of_ranks = [getattr(line, name) for line in lines]
        if of_ranks[0] is None:
            return None
        return Traffic(
            collectives=max(t.collectives for t in of_ranks),
            wire_bytes=max(t.wire_bytes for t in of_ranks),
            all_ranks_bytes=sum(t.all_ranks_bytes for t in of_ranks),
            host_syncs=max(t.host_syncs for t in of_ranks),
        )

    kept = [line.kept_bytes for line in lines if line.kept_bytes is not None]
    peaks = [line.peak_bytes for line in lines if line.peak_bytes is not None]
    return Line(
        name=first.name,
        forward_ms=tuple(map(max, zip(*(line.forward_ms for line in lines), strict=True))),
        both_ms=tuple(map(max, zip(*(line.both_ms for line in lines), strict=True))),
        processor_ms=tuple(of_rank for line in lines for of_rank in line.processor_ms),
        forward=passes("forward"),
        backward=passes("backward"),
        kept_bytes=max(kept, default=None),
        peak_bytes=max(peaks, default=None),
        phase_ms=first.phase_ms,
    )
