"""What of a case differs over ranks from the reference on one."""

from functools import lru_cache

import torch
from torch import Tensor

from moe_dispatch.testing import RankPool, RankThreads
from sp_attention.reference import reference_attention
from tests.support.attention.case import Case
from tests.support.attention.whole import Seen, Whole, recording, shares_of, shares_of_ulysses, whole_answer
from tests.support.tensors import TOLERANCE, difference


@lru_cache(maxsize=8)  # ranks that are threads are at the same case, or one apart
def answer_of(case: Case) -> dict[str, Tensor]:
    """The reference's, in float64."""
    return whole_answer(reference_attention, Whole.of(case, torch.float64))


def failures_of(ranks_of: RankPool | RankThreads, ranks: int, batch: list[Case], timeout: float = 60) -> list[str]:
    results = ranks_of.run(equal_to_reference, ranks, batch, timeout=timeout)
    return [f"rank {rank}: {failure}" for rank, failures in enumerate(results) for failure in failures]


def equal_to_reference(rank: int, batch: list[Case]) -> list[str]:
    """What differs from the reference in float64, and what of the options ``attend`` did not get."""
    failures = []
    for case in batch:
        whole = Whole.of(case, torch.float64)
        wanted = shares_of(answer_of(case), rank, case)
        seen: list[Seen] = []
        got = shares_of_ulysses(rank, case, whole, recording(seen))
        differences = {name: difference(got[name], wanted[name]) for name in wanted}
        failures += [f"{name} by {by:.1e}: {case}" for name, by in differences.items() if not by <= TOLERANCE]
        missed = what_reached(rank, case, whole, seen)
        failures += [f"{missed}: {case}"] * bool(missed)
    return failures


def what_reached(rank: int, case: Case, whole: Whole, seen: list[Seen]) -> str:
    """What of the options did not reach ``attend`` as given; empty where all did."""
    heads = case.head_sizes[rank]
    given = {name for name, value in whole.options.items() if value is not False} - {
        "cu_seqlens",
        "cu_seqlens_padded",
    }
    lengths = [case.lengths]
    if "cu_seqlens" in whole.options:
        reals = whole.options["cu_seqlens"].diff().tolist()
        lengths = [(length, length) for length in reals if length]
    if heads == 0 or 0 in case.lengths:
        lengths = []
    if [(call.shapes[0][1], call.shapes[1][1]) for call in seen] != lengths:
        return f"attend was called on {[call.shapes for call in seen]}, wanted lengths {lengths}"
    for call in seen:
        first_head = call.options.pop("first_head")  # told to every attend that takes it
        if first_head != sum(case.head_sizes[:rank]):
            return f"attend got first_head {first_head}, wanted {sum(case.head_sizes[:rank])}"
        if {name.replace("_n", "_N") if name == "sinks_n" else name for name in call.options} != given:
            return f"attend got {sorted(call.options)}, wanted {sorted(given)}"
        if call.shapes[0][2] != heads or heads % call.shapes[1][2]:
            return f"attend got {call.shapes[0][2]} query and {call.shapes[1][2]} key/value heads, wanted {heads}"
        if any(call.options[name] != whole.options[name] for name in given & {"scale", "window", "is_causal"}):
            return f"attend got {call.options}, wanted {whole.options}"
    return ""
