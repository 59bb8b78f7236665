"""Whatever one rank has wrong is the same error on every rank, in every scheme, and the group works after it."""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import DisagreementError, GroupError, Partition, RankMistakeError, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention import Scheme, attention_over_ranks, scaled_dot_product
from sp_attention.reference import reference_attention
from tests.support.attention.wrong.before import BEFORE
from tests.support.attention.wrong.disagreements import DISAGREEMENTS
from tests.support.attention.wrong.one_rank import ON_ONE_RANK
from tests.support.attention.wrong_calls import SEQ, Arguments, Change, right_call
from tests.support.schemes import schemes
from tests.support.tensors import share

pytestmark = pytest.mark.usefixtures("uncovered")

Told = tuple[type[GroupError], str]
ULYSSES, GATHER, RING = Scheme.ulysses(), Scheme.gather(), Scheme.ring(chunk=2)
SHARED = Scheme.two_dimensional(head_ranks=2, keys="ring", keep=True)
FOUR = [ULYSSES, GATHER, RING, SHARED]
CHANGES = {name: change for name, (change, _) in (ON_ONE_RANK | BEFORE).items()}
TEXTS = {name: text for name, (_, text) in (ON_ONE_RANK | BEFORE).items()}


class Unnamed:
    """What no sentence can be made of."""

    def __repr__(self) -> str:
        raise RecursionError("no name")


def raises(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, **options: Any) -> Tensor:
    raise RuntimeError("out of luck")


def one_query_short(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, **options: Any) -> Tensor:
    return scaled_dot_product(q_BLnH, k_BLgH, v_BLgH, **options)[:, 1:]


def to_meta(a: Arguments) -> Arguments:
    return {name: a[name].to("meta") for name in ("q_BlNH", "k_BlGH", "v_BlGH")}


def to_8_bits(a: Arguments) -> Arguments:
    return {name: a[name].to(torch.float8_e4m3fn) for name in ("q_BlNH", "k_BlGH", "v_BlGH")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """A call that is right but for what ``change`` makes of rank 1's. ``text``: what every rank is told of it."""

    scheme: Scheme
    change: Change
    text: str
    options: Arguments = field(default_factory=dict)


NO_VALUES = "q, k, v are on meta, where there are no values to send; give them memory, e.g. module.to_empty()"
IN_A_SCHEME = {
    "teams that do not fill the group": Wrong(
        scheme=GATHER,
        change=lambda a: {"scheme": Scheme.two_dimensional(head_ranks=3)},
        text="teams of 3 head ranks in a group of 2; head_ranks has to divide the number of ranks",
    ),
    "a scheme that is none": Wrong(
        scheme=RING,
        change=lambda a: {"scheme": "ring"},
        text="scheme is 'ring'; pass a Scheme, e.g. Scheme.gather()",
    ),
    "heads of the group, not of the team": Wrong(
        scheme=GATHER,
        change=lambda a: {"heads": Partition((2, 2))},
        text="heads is Partition(sizes=(2, 2)); it has to be a Partition of the 4 query heads over 1 ranks",
    ),
    "an attend with ring keys": Wrong(
        scheme=RING,
        change=lambda a: {"attend": scaled_dot_product},
        text="attend with ring keys, which come in turns, so that no call of it would see all keys of a query; use "
        "gathered keys, or leave attend out",
    ),
    "an attend with a chunk": Wrong(
        scheme=Scheme.ulysses(chunk=3),
        change=lambda a: {"attend": scaled_dot_product},
        text="attend in a scheme with chunk 3: keys come in chunks; leave one of the two out",
    ),
    "q, k and v without values": Wrong(scheme=RING, change=to_meta, text=NO_VALUES),
    "q, k and v without values, in Ulysses": Wrong(scheme=ULYSSES, change=to_meta, text=NO_VALUES),
    "8-bit floats": Wrong(
        scheme=GATHER,
        change=to_8_bits,
        text="q, k, v are torch.float8_e4m3fn; cast them to a floating-point dtype of at least 16 bits",
    ),
    "documents without values": Wrong(
        scheme=SHARED,
        change=lambda a: {"cu_seqlens": torch.tensor([0, 7]).to("meta")},
        text="cu_seqlens is on meta, where there are no values to read; pass it on the CPU",
    ),
    "what no sentence can be made of": Wrong(
        scheme=RING, change=lambda a: {"window": Unnamed()}, text="reading the call raised RecursionError: no name"
    ),
    "an attend that raises": Wrong(
        scheme=GATHER,
        change=lambda a: {"attend": raises},
        text="attend raised RuntimeError: out of luck",
        options={"attend": scaled_dot_product},
    ),
    "an attend that raises, heads shared": Wrong(
        scheme=Scheme.ulysses(keep=False),
        change=lambda a: {"attend": raises},
        text="attend raised RuntimeError: out of luck",
        options={"attend": scaled_dot_product},
    ),
    "an attend of another shape": Wrong(
        scheme=GATHER,
        change=lambda a: {"attend": one_query_short},
        text="attend gave (2, 3, 4, 4) of torch.float32; it has to give (B, L, my query heads, value width) = "
        "(2, 4, 4, 4) of torch.float32",
        options={"attend": scaled_dot_product},
    ),
}


def wide(name: str, width: int) -> Change:
    return lambda a: {each: torch.zeros(*a[each].shape[:3], width) for each in name.split()}


def held(sharding: TokenSharding) -> Change:
    """Rank 1 has what another sharding gives it."""
    shape, widths = sharding.local_shape(1), {"q_BlNH": (4, 6), "k_BlGH": (2, 6), "v_BlGH": (2, 4)}
    return lambda a: {"sharding": sharding} | {name: torch.zeros(*shape, *of) for name, of in widths.items()}


# What rank 1 believes, and has: it would send other sizes than its peer expects. Words of its own that tell.
OTHER_SIZES: dict[str, tuple[Change, str]] = {
    "width": (wide("q_BlNH k_BlGH", 8), r"widths \(8, 4\)"),
    "width of values": (wide("v_BlGH", 8), r"widths \(6, 8\)"),
    "query heads": (lambda a: {"q_BlNH": a["q_BlNH"].repeat(1, 1, 2, 1)}, r"query heads \((8,|4, 4)\)"),
    "shards": (held(TokenSharding(batch=2, seq=Partition((4, 3)))), r"\(4, 3\) tokens"),
    "length": (held(TokenSharding(batch=2, seq=Partition((3, 5)))), r"\(3, 5\) tokens"),
    "batch": (held(TokenSharding(batch=1, seq=Partition(SEQ))), "1 rows"),
    "sequence first": (held(TokenSharding(batch=2, seq=Partition(SEQ), order="LB")), "order LB"),
}


# ---- cases: what the ranks run -------------------------------------------------------------------------


def told(arguments: Arguments) -> Told:
    with pytest.raises(GroupError) as error:
        attention_over_ranks(**arguments)
    return type(error.value), str(error.value)


def assert_works(rank: int, scheme: Scheme) -> None:
    """The group, after an error: a call, and a collective of another kind."""
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.randn(2, sum(SEQ), *shape, generator=draw) for shape in ((4, 6), (2, 6), (2, 4))]
    total = torch.ones(())
    dist.all_reduce(total)
    assert total.item() == 2
    out_BlNH = attention_over_ranks(**right_call(rank), scheme=scheme)
    torch.testing.assert_close(out_BlNH, share(reference_attention(*wholes), SEQ, "BL", rank))


def wrong_on_rank_1(rank: int, cases: list[tuple[str, Scheme]]) -> list[Told]:
    found = []
    for name, scheme in cases:
        arguments = right_call(rank) | {"scheme": scheme}
        found.append(told(arguments | CHANGES[name](arguments) if rank else arguments))
        assert_works(rank, scheme)
    return found


def disagree(rank: int, cases: list[tuple[str, Scheme]]) -> list[Told]:
    found = []
    for name, scheme in cases:
        arguments = right_call(rank, batch=1) | {"scheme": scheme}
        ours, theirs, _ = DISAGREEMENTS[name]
        found.append(told(arguments | (theirs if rank else ours)(arguments)))
        assert_works(rank, scheme)
    return found


def other_schemes(rank: int, pairs: list[tuple[Scheme, Scheme]]) -> list[Told]:
    found = []
    for pair in pairs:
        found.append(told(right_call(rank) | {"scheme": pair[rank]}))
        assert_works(rank, pair[0])
    return found


def other_sizes(rank: int, name: str) -> list[Told]:
    found = []
    for scheme in FOUR:
        arguments = right_call(rank) | {"scheme": scheme}
        found.append(told(arguments | OTHER_SIZES[name][0](arguments) if rank else arguments))
        assert_works(rank, scheme)
    return found


def attend_or_none(rank: int) -> Told:
    return told(right_call(rank) | {"scheme": GATHER} | ({"attend": scaled_dot_product} if rank else {}))


def wrong_in_a_scheme(rank: int, name: str) -> Told:
    wrong = IN_A_SCHEME[name]
    arguments = right_call(rank) | {"scheme": wrong.scheme} | wrong.options
    answer = told(arguments | wrong.change(arguments) if rank else arguments)
    assert_works(rank, wrong.scheme)
    return answer


# ---- what the tests ask --------------------------------------------------------------------------------


def test_what_ulysses_tells_is_told_in_every_scheme(rank_threads: RankThreads) -> None:
    """Also what is an error of one rank alone there. An ``attend`` is no matter of a ring, and ``heads`` are those of
    a team."""
    cases = [
        (name, scheme)
        for i, name in enumerate(CHANGES)
        for scheme in FOUR[i % 2 :: 2]
        if name != "no group"
        and not (scheme in (RING, SHARED) and "attend" in TEXTS[name])
        and not (scheme in (GATHER, RING) and "heads" in CHANGES[name](right_arguments()))
    ]
    mine, others = rank_threads.run(wrong_on_rank_1, 2, cases)
    assert mine == others
    wanted = [(RankMistakeError, f"rank 1: {TEXTS[name]}") for name, _ in cases]
    assert mine == wanted


def right_arguments() -> Arguments:
    """What a change reads, without a group."""
    return {
        name: torch.zeros(2, 4, *shape)
        for name, shape in (("q_BlNH", (4, 6)), ("k_BlGH", (2, 6)), ("v_BlGH", (2, 4)))
    }


def test_ranks_that_disagree_are_told_apart_in_every_scheme(rank_threads: RankThreads) -> None:
    cases = [(name, scheme) for name in DISAGREEMENTS for scheme in FOUR if name != "heads of the same size"]
    mine, others = rank_threads.run(disagree, 2, cases)
    assert mine == others
    for (name, scheme), (kind, text) in zip(cases, mine, strict=True):
        ours, theirs = text.split("; rank [1]: ")
        assert kind is DisagreementError
        assert DISAGREEMENTS[name][2][0] in ours
        assert DISAGREEMENTS[name][2][1] in theirs
        assert f"{scheme}" in ours


def test_ranks_in_other_schemes_are_told_apart(rank_threads: RankThreads) -> None:
    pairs = list(pairwise(schemes(2)))
    mine, others = rank_threads.run(other_schemes, 2, pairs)
    assert mine == others
    for pair, (kind, text) in zip(pairs, mine, strict=True):
        ours, theirs = text.split("; rank [1]: ")
        assert kind is DisagreementError
        assert f"; {pair[0]}, tiles" in ours
        assert f"; {pair[1]}, tiles" in theirs


def test_an_attend_on_some_ranks(rank_threads: RankThreads) -> None:
    (kind, text), other = rank_threads.run(attend_or_none, 2)
    assert other == (kind, text)
    assert kind is DisagreementError
    assert "keys gather, tiles; rank [1]" in text
    assert "keys gather, attend of the caller's); every rank" in text


@pytest.mark.parametrize("name", IN_A_SCHEME)
def test_what_one_rank_has_wrong_in_a_scheme(rank_pool: RankPool, name: str) -> None:
    assert rank_pool.run(wrong_in_a_scheme, 2, name) == [(RankMistakeError, f"rank 1: {IN_A_SCHEME[name].text}")] * 2


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_ranks_that_mean_other_sizes_are_told_apart(rank_pool: RankPool, name: str) -> None:
    """Ulysses itself sends them: gloo would end the processes."""
    mine, others = rank_pool.run(other_sizes, 2, name)
    assert mine == others
    for kind, text in mine:
        assert kind is DisagreementError
        assert re.search(OTHER_SIZES[name][1], text.split("; rank [1]: ")[1])


@pytest.mark.parametrize("name", ["window", "is_causal", "order of the pieces", "gradients"])
def test_processes_that_disagree(rank_pool: RankPool, name: str) -> None:
    """What decides how much each rank sends: gloo would end them."""
    (kind, text), *others = (found[0] for found in rank_pool.run(disagree, 2, [(name, GATHER)]))
    assert others == [(kind, text)]
    assert text.startswith("the ranks disagree about one call (rank [0]: ")
