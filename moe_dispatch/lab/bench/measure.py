"""One workload on one rank: check every contender, count what it does, then time all of them in turns."""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ...testing.counting import Counts, counting, run_backward
from ...wire.exchange import check_is_group
from .config import ExchangeConfig
from .contenders.floor import Floor, floors_of
from .contenders.named import contenders_of
from .contenders.protocol import Made, NotApplicable
from .memory import allocator_in_force, bytes_kept, peak_bytes
from .results import Line, Traffic
from .workloads.case import Case
from .workloads.of_config import cases_of, workload_of

WARMUPS = 1  # after the check and the accounts, which call everything four times
# Largest max |difference| / max |value|; rows are rounded once or twice on their way, and sums have their own order.
TOLERANCE = (
    (torch.float64, 1e-6),  # weights are float32
    (torch.float32, 1e-5),
    (torch.float16, 1e-2),
    (torch.bfloat16, 5e-2),
)


class Run:
    """A contender with its tensors: ``forward`` and ``backward`` as the floors have them."""

    def __init__(self, contender: Made, case: Case) -> None:
        self.contender, self.case = contender, case

    def forward(self) -> Tensor:
        return self.contender.forward(*self.case.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.case.leaves, self.case.grad_out)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Not the dispatcher's: the caller's, and what the experts of the last forward keep."""
        case = self.case
        return *case.inputs, case.grad_out, case.out, *case.grads, *getattr(self.contender, "experts_keep", ())


@dataclass(frozen=True, slots=True)
class Times:
    """Of one call on this rank: the clock's, and forward + backward on all threads of this process."""

    forward_ms: float
    both_ms: float
    processor_ms: float


def measure(
    rank: int, config: ExchangeConfig, adapter: str, repeat: int, profile: bool
) -> tuple[list[Line], tuple[str, ...]]:
    """This rank's lines, and the allocator settings it was started with. Every rank of the default group calls it."""
    gc.collect()
    gc.freeze()  # what is there already, modules above all, is no contender's: bytes_kept need not look at it
    try:
        return _measure(rank, config, adapter, repeat, profile)
    finally:
        gc.unfreeze()


def _measure(
    rank: int, config: ExchangeConfig, adapter: str, repeat: int, profile: bool
) -> tuple[list[Line], tuple[str, ...]]:
    group = check_is_group(dist.group.WORLD)
    workload = workload_of(config)
    case_of = cases_of(workload, group)
    lines, runs = {}, {}
    for name, make in contenders_of(workload.kind, adapter).items():
        try:
            contender = make(workload, group)
            run = Run(contender, case_of(contender))
        except NotApplicable as reason:
            lines[name] = Line(name=name, absent=str(reason))
            continue
        if problem := problem_of(run, workload.dtype):
            lines[name] = Line(name=name, absent=problem, wrong=True)
            continue
        runs[name] = run
        lines[name] = account(name, run)
    floors = floors_of(workload, group)
    lines |= {name: Line(name=name) for name in floors}
    times = time_in_turns(runs | floors, repeat * config.turns)
    for name, of_name in times.items():
        lines[name] = replace(
            lines[name],
            forward_ms=tuple(each.forward_ms for each in of_name),
            both_ms=tuple(each.both_ms for each in of_name),
            processor_ms=(tuple(each.processor_ms for each in of_name),),
        )
    if profile:
        from .phases import phases_of

        lines |= {name: replace(lines[name], phase_ms=phases_of(run)) for name, run in runs.items()}
    return list(lines.values()), allocator_in_force()


def problem_of(run: Run, dtype: torch.dtype) -> str:
    """What is wrong with the results on any rank, the same text on every rank; empty where nothing is."""
    limit = dict(TOLERANCE)[dtype]
    out = run.forward()
    # agreed on before backward, which communicates: all ranks enter it, or none
    problem = _first_of_ranks(_difference("the output", out, run.case.out, limit))
    if problem:
        return problem
    for leaf, grad, wanted in zip(run.case.leaves, run.backward(out), run.case.grads, strict=True):
        place = next(i for i, x in enumerate(run.case.inputs) if x is leaf)
        problem = problem or _difference(f"the gradient of input {place}", grad, wanted, limit)
    return _first_of_ranks(problem)


def _first_of_ranks(problem: str) -> str:
    problems: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")


def _difference(what: str, got: Tensor, wanted: Tensor, limit: float) -> str:
    if got.shape != wanted.shape:
        return f"{what} is {tuple(got.shape)}, but it has to be {tuple(wanted.shape)}"
    if not wanted.numel():
        return ""
    off = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
    return "" if off <= limit else f"{what} is off by {off:.1e} of its largest value; at most {limit:.0e} is right"


def account(name: str, run: Run) -> Line:
    """What a forward and a backward move, wait for and keep."""
    with counting() as forward:
        out = run.forward()
    with counting() as backward:
        run_backward(out, run.case.grad_out)
    for leaf in run.case.leaves:
        leaf.grad = None
    del out
    return Line(
        name=name,
        forward=_traffic(forward),
        backward=_traffic(backward),
        kept_bytes=bytes_kept(run.forward, lambda: run.tensors),
        peak_bytes=peak_bytes(lambda: run.backward(run.forward())),
    )


def _traffic(counts: Counts) -> Traffic:
    return Traffic(
        collectives=len(counts.collectives),
        wire_bytes=counts.wire_bytes,
        all_ranks_bytes=counts.wire_bytes,
        host_syncs=len(counts.host_syncs),
    )


def time_in_turns(runs: Mapping[str, Run | Floor], repeat: int) -> dict[str, list[Times]]:
    """Times of each repetition. In each, every run has its turn, in an order of :func:`order_of_turn`."""
    times: dict[str, list[Times]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    gc.disable()
    try:
        for i in range(-WARMUPS, repeat):
            for place in order_of_turn(i, len(names)):
                name = names[place]
                time_of_call = _time_call(runs[name])
                if i >= 0:
                    times[name].append(time_of_call)
    finally:
        gc.enable()
    return times


def order_of_turn(turn: int, count: int) -> list[int]:
    """Of ``count`` runs. In 2 ``count`` turns each is in every place twice, and directly after each other one equally
    often: always after the same one, the same code took up to 5 % longer than beside itself, at 64 tokens. Source:
    E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments (1949)."""
    zigzag = [(place + 1) // 2 if place % 2 else count - place // 2 for place in range(count)]
    order = [(turn + step) % count for step in zigzag]
    return order if turn // count % 2 == 0 else order[::-1]


def _time_call(run: Run | Floor) -> Times:
    dist.barrier()
    start, processor = time.perf_counter(), time.process_time()
    out = run.forward()
    middle = time.perf_counter()
    grads = run.backward(out)
    end, processor_end = time.perf_counter(), time.process_time()
    del out, grads  # freed here: the time of others, not ours
    return Times((middle - start) * 1e3, (end - start) * 1e3, (processor_end - processor) * 1e3)
