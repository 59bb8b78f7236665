"""ulysses_attention equals attention on one rank: outputs and every gradient, over lengths, heads and masks.

The whole of a case is the same on every rank. Ranks cut their share out of it by slicing, run the attention, and say
what differs from their share of the answer of sp_attention/reference.py. Cases are drawn once in the parent and run
in batches inside living ranks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise, product
from typing import Any, Literal
from unittest import mock
from zlib import crc32

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import UlyssesAttention, scaled_dot_product, ulysses_attention
from sp_attention.reference import reference_attention

TOLERANCE = 1e-12

Order = Literal["BL", "LB"]
Options = dict[str, Any]
Attend = Callable[..., Tensor]
HEADS = [(1, 1), (2, 1), (3, 3), (4, 4), (4, 2), (6, 3), (7, 7), (8, 2), (12, 3)]
WIDTHS = [(6, 6), (6, 4), (4, 3)]
BATCH_OF_CASES = 4  # of each kind of mask, in a normal run
CUTS = ("balanced", "one rank", "random")


# ---- a case --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call. ``kind`` names its mask: a key of KINDS."""

    ranks: int
    kind: str
    batch: int
    seq: tuple[int, ...]
    kv_seq: tuple[int, ...]
    num_heads: tuple[int, int]
    widths: tuple[int, int]
    order: Order = "BL"
    heads: tuple[int, ...] | None = None
    scale: float | None = None
    seed: int = 0

    @property
    def lengths(self) -> tuple[int, int]:
        return sum(self.seq), sum(self.kv_seq)

    @property
    def head_sizes(self) -> tuple[int, ...]:
        return self.heads or tuple(len(range(rank, self.num_heads[0], self.ranks)) for rank in range(self.ranks))

    @property
    def shares_a_kv_head(self) -> bool:
        """Do two ranks hold query heads of one key/value head?"""
        per_group = self.num_heads[0] // self.num_heads[1]
        ends = list(accumulate(self.head_sizes))[:-1]
        return any(end % per_group for end in ends if 0 < end < self.num_heads[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The tensors and options of a case, batch first, whole sequences, all heads; the same on every rank."""

    q_BLNH: Tensor
    k_BLGH: Tensor
    v_BLGH: Tensor
    grad_BLNH: Tensor
    options: Options

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype) -> "Whole":
        draw = torch.Generator().manual_seed(case.seed)
        (queries, keys), (heads, groups), (width, v_width) = case.lengths, case.num_heads, case.widths

        def randn(length: int, num: int, width: int) -> Tensor:
            return torch.randn(case.batch, length, num, width, generator=draw, dtype=torch.float64).to(dtype)

        options = KINDS[case.kind](case, draw)
        if case.scale is not None:
            options["scale"] = case.scale
        for name, value in options.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                options[name] = value.to(dtype)
        return cls(
            q_BLNH=randn(queries, heads, width),
            k_BLGH=randn(keys, groups, width),
            v_BLGH=randn(keys, groups, v_width),
            grad_BLNH=randn(queries, heads, v_width),
            options=options,
        )

    @property
    def learned(self) -> tuple[str, ...]:
        """The options that are differentiated."""
        return tuple(
            name for name, value in self.options.items() if isinstance(value, Tensor) and value.is_floating_point()
        )


# ---- the kinds of mask ---------------------------------------------------------------------------------

Kind = Callable[[Case, torch.Generator], Options]


def some(shape: tuple[int, ...], draw: torch.Generator, share: float = 0.7) -> Tensor:
    return torch.rand(shape, generator=draw) < share


def left_pad(case: Case, draw: torch.Generator) -> Options:
    keys = case.lengths[1]
    pads = torch.randint(0, keys + 1, (case.batch, 1), generator=draw)
    return {"key_padding_mask": torch.arange(keys) >= pads}


def right_pad(case: Case, draw: torch.Generator) -> Options:
    return {"key_padding_mask": ~left_pad(case, draw)["key_padding_mask"], "is_causal": True}


def holes(case: Case, draw: torch.Generator) -> Options:
    return {"key_padding_mask": some((case.batch, case.lengths[1]), draw), "window": (3, 2)}


def mask_shape(case: Case, form: str) -> tuple[int, ...]:
    """Shape of a mask by the letters of its form: B, N, L for the whole extent, or 1. The first may be missing."""
    queries, keys = case.lengths
    wholes = (case.batch, case.num_heads[0], queries, keys)[4 - len(form) :]
    return tuple(1 if letter == "1" else whole for letter, whole in zip(form, wholes, strict=True))


def bool_mask(case: Case, draw: torch.Generator, form: str) -> Options:
    return {"attn_mask": some(mask_shape(case, form), draw), "is_causal": case.seed % 2 == 1}


def float_mask(case: Case, draw: torch.Generator, form: str) -> Options:
    shape = mask_shape(case, form)
    values = torch.randn(shape, generator=draw, dtype=torch.float64)
    return {"attn_mask": values.masked_fill(~some(shape, draw, 0.8), -torch.inf), "is_causal": case.seed % 2 == 1}


def closed_row(case: Case, draw: torch.Generator) -> Options:
    mask_LL = some(mask_shape(case, "LL"), draw)
    mask_LL[:: max(case.lengths[0] // 2, 1)] = False
    return {"attn_mask": mask_LL, "is_causal": case.seed % 2 == 1}


def sinks(case: Case, draw: torch.Generator) -> Options:
    values_N = torch.randn(case.num_heads[0], generator=draw, dtype=torch.float64)
    return {"sinks_N": values_N, "is_causal": case.seed % 2 == 1}


def sinks_and_mask(case: Case, draw: torch.Generator) -> Options:
    return sinks(case, draw) | float_mask(case, draw, "BNLL") | {"window": (4, 4)}


def document_lengths(case: Case, draw: torch.Generator) -> list[int]:
    """Lengths of documents that fit, those of 0 and 1 among them."""
    left, lengths = case.lengths[0], []
    for wanted in [0, 1, *torch.randint(0, 24, (6,), generator=draw).tolist(), 1, 0]:
        lengths.append(min(wanted, left))
        left -= lengths[-1]
    return [*lengths, left]


def cumulated(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)])


def packed(case: Case, draw: torch.Generator) -> Options:
    """Documents end to end, no padding."""
    return {"cu_seqlens": cumulated(document_lengths(case, draw)), "is_causal": case.seed % 2 == 1}


def padded(case: Case, draw: torch.Generator) -> Options:
    """Documents with padding before the first, between them and after the last."""
    lengths = document_lengths(case, draw)
    pads = [int(torch.randint(0, length // 2 + 1, (), generator=draw)) for length in lengths]
    reals = [length - pad for length, pad in zip(lengths, pads, strict=True)]
    starts = cumulated(lengths)
    return {"cu_seqlens": cumulated(reals[1:]), "cu_seqlens_padded": starts[1:]} | {"is_causal": case.seed % 2 == 1}


def with_tail(case: Case, draw: torch.Generator) -> Options:
    """The last document's padding ends before the sequence does."""
    options = padded(case, draw)
    ends, starts = options["cu_seqlens"], options["cu_seqlens_padded"]
    return options | {"cu_seqlens": ends[:-1], "cu_seqlens_padded": starts[:-1], "window": (4, -1)}


def masked_documents(case: Case, draw: torch.Generator) -> Options:
    """Documents, a mask over the whole packed sequence, padding inside them, and sinks."""
    keep = {"key_padding_mask": some((1, case.lengths[1]), draw)}
    return padded(case, draw) | float_mask(case, draw, "1NLL") | keep | sinks(case, draw)


FORMS = ["".join(letters) for letters in product(("B", "1"), ("N", "1"), ("L", "1"), ("L", "1"))]
FORMS += ["NLL", "LL", "1L", "L1", "L", ""]
CROSS = ("cross", "cross causal", "cross window", "cross bool", "cross float", "cross padded", "cross sinks")
PACKED = ("packed", "padded", "with tail", "masked documents")
KINDS: dict[str, Kind] = {
    "none": lambda case, draw: {},
    "causal": lambda case, draw: {"is_causal": True},
    "window": lambda case, draw: {"window": (4, 0)},
    "causal window": lambda case, draw: {"window": (4, 3), "is_causal": True},
    "right window": lambda case, draw: {"window": (-1, 1)},
    "left pad": left_pad,
    "right pad": right_pad,
    "holes": holes,
    "closed row": closed_row,
    "sinks": sinks,
    "sinks and mask": sinks_and_mask,
    "packed": packed,
    "padded": padded,
    "with tail": with_tail,
    "masked documents": masked_documents,
    "cross": lambda case, draw: {},
    "cross causal": lambda case, draw: {"is_causal": True},
    "cross window": lambda case, draw: {"window": (2, 4)},
    "cross bool": partial(bool_mask, form="BNLL"),
    "cross float": partial(float_mask, form="BNLL"),
    "cross padded": right_pad,
    "cross sinks": sinks,
    **{f"bool ({form})": partial(bool_mask, form=form) for form in FORMS},
    **{f"float ({form})": partial(float_mask, form=form) for form in FORMS},
}


# ---- drawing cases -------------------------------------------------------------------------------------


def cuts(length: int, ranks: int, kind: str) -> st.SearchStrategy[tuple[int, ...]]:
    if kind == "balanced":
        return st.just(tuple(len(range(rank, length, ranks)) for rank in range(ranks)))
    if kind == "one rank":
        owners = st.integers(0, ranks - 1)
        return owners.map(lambda owner: tuple(length if rank == owner else 0 for rank in range(ranks)))
    marks = st.lists(st.integers(0, length), min_size=ranks - 1, max_size=ranks - 1)
    return marks.map(lambda drawn: tuple(end - start for start, end in pairwise([0, *sorted(drawn), length])))


def lengths_to_try(ranks: int) -> list[int]:
    return sorted({1, max(ranks - 1, 1), ranks, ranks + 1, 7, 16, 67})


@st.composite
def cases(
    draw: st.DrawFn, ranks: int, kind: str, queries: int | None = None, num_heads: tuple[int, int] | None = None
) -> Case:
    lengths = lengths_to_try(ranks)
    queries = queries or draw(st.sampled_from(lengths))
    keys = draw(st.sampled_from([n for n in lengths if n != queries])) if kind in CROSS else queries
    seq = draw(cuts(queries, ranks, draw(st.sampled_from(CUTS))))
    num_heads = num_heads or draw(st.sampled_from(HEADS))
    head_cut = draw(st.sampled_from([None, None, "one rank", "random"]))
    return Case(
        ranks=ranks,
        kind=kind,
        batch=1 if kind in PACKED else draw(st.sampled_from([1, 2, 3])),
        seq=seq,
        kv_seq=draw(cuts(keys, ranks, draw(st.sampled_from(CUTS)))) if kind in CROSS else seq,
        num_heads=num_heads,
        widths=draw(st.sampled_from(WIDTHS)),
        order=draw(st.sampled_from(["BL", "LB"])),
        heads=None if head_cut is None else draw(cuts(num_heads[0], ranks, head_cut)),
        scale=draw(st.sampled_from([None, 0.3])),
        seed=draw(st.integers(0, 2**31)),
    )


def drawn(strategy: st.SearchStrategy[Case], number: int, name: str) -> list[Case]:
    """The same cases in every run, others for every name."""
    found: list[Case] = []

    @seed(crc32(name.encode()))
    @settings(
        derandomize=True,
        database=None,
        max_examples=number,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given],
    )
    @given(strategy)
    def keep(case: Case) -> None:
        found.append(case)

    keep()
    return list(dict.fromkeys(found))


# ---- running a case ------------------------------------------------------------------------------------


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def share(whole_BLNH: Tensor, sizes: tuple[int, ...], order: Order, rank: int) -> Tensor:
    """A rank's tokens of a whole tensor, cut by slicing."""
    start = sum(sizes[:rank])
    mine_BlNH = whole_BLNH[:, start : start + sizes[rank]]
    return mine_BlNH if order == "BL" else mine_BlNH.transpose(0, 1)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None, "no gradient: not part of the graph"
    return x.grad


@dataclass(frozen=True, slots=True)
class Seen:
    """What ``attend`` was called with."""

    shapes: tuple[tuple[int, ...], ...]
    options: Options


@contextmanager
def watched() -> Iterator[list[Seen]]:
    """Record the calls of the default ``attend``."""
    seen: list[Seen] = []

    def attend(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, **options: Any) -> Tensor:
        seen.append(Seen((tuple(q_BLnH.shape), tuple(k_BLgH.shape), tuple(v_BLgH.shape)), options))
        return scaled_dot_product(q_BLnH, k_BLgH, v_BLgH, **options)

    with mock.patch("sp_attention.call.ulysses.scaled_dot_product", attend):
        yield seen


def shares_of_ulysses(rank: int, case: Case, whole: Whole, attend: Attend | None = None) -> dict[str, Tensor]:
    """This rank's output and gradients; gradients of options are summed over the ranks."""
    parts = [(whole.q_BLNH, case.seq), (whole.k_BLGH, case.kv_seq), (whole.v_BLGH, case.kv_seq)]
    q_BlNH, k_BlGH, v_BlGH = (leaf(share(x, sizes, case.order, rank)) for x, sizes in parts)
    options: Options = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    sharding, kv_sharding = (
        TokenSharding(batch=case.batch, seq=Partition(sizes), order=case.order) for sizes in (case.seq, case.kv_seq)
    )
    out_BlNH = ulysses_attention(
        q_BlNH,
        k_BlGH,
        v_BlGH,
        sharding=sharding,
        group=world(),
        kv_sharding=kv_sharding if case.kind in CROSS else None,
        heads=None if case.heads is None else Partition(case.heads),
        attend=attend,
        **options,
    )
    out_BlNH.backward(share(whole.grad_BLNH, case.seq, case.order, rank))
    got = {"out": out_BlNH.detach(), "dq": grad_of(q_BlNH), "dk": grad_of(k_BlGH), "dv": grad_of(v_BlGH)}
    for name in whole.learned:
        grad = options[name].grad
        got[f"d {name}"] = torch.zeros_like(options[name]) if grad is None else grad
        dist.all_reduce(got[f"d {name}"])
    return got


def shares_of(answer: dict[str, Tensor], rank: int, case: Case) -> dict[str, Tensor]:
    sizes = {"out": case.seq, "dq": case.seq, "dk": case.kv_seq, "dv": case.kv_seq}
    return {
        name: share(whole, sizes[name], case.order, rank) if name in sizes else whole
        for name, whole in answer.items()
    }


def whole_answer(attend: Attend, whole: Whole) -> dict[str, Tensor]:
    """Output and gradients of ``attend`` on the whole tensors."""
    q_BLNH, k_BLGH, v_BLGH = (leaf(x) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH))
    options: Options = dict(whole.options) | {name: leaf(whole.options[name]) for name in whole.learned}
    out_BLNH = attend(q_BLNH, k_BLGH, v_BLGH, **options)
    out_BLNH.backward(whole.grad_BLNH)
    answer = {"out": out_BLNH.detach(), "dq": grad_of(q_BLNH), "dk": grad_of(k_BLGH), "dv": grad_of(v_BLGH)}
    return answer | {f"d {name}": grad_of(options[name]) for name in whole.learned}


def difference(got: Tensor, wanted: Tensor) -> float:
    """Relative to the largest value wanted, or to 1; infinite if a shape or dtype differs, or there is a NaN."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype or not got.isfinite().all():
        return float("inf")
    scale = max(wanted.abs().amax().item(), 1.0) if wanted.numel() else 1.0
    return (got - wanted).abs().amax().item() / scale if got.numel() else 0.0


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
        if {name.replace("_n", "_N") if name == "sinks_n" else name for name in call.options} != given:
            return f"attend got {sorted(call.options)}, wanted {sorted(given)}"
        if call.shapes[0][2] != heads or heads % call.shapes[1][2]:
            return f"attend got {call.shapes[0][2]} query and {call.shapes[1][2]} key/value heads, wanted {heads}"
        if any(call.options[name] != whole.options[name] for name in given & {"scale", "window", "is_causal"}):
            return f"attend got {call.options}, wanted {whole.options}"
    return ""


# ---- cases: what the ranks run -------------------------------------------------------------------------


def equal_to_reference(rank: int, batch: list[Case]) -> tuple[list[str], float]:
    """What differs from the reference in float64, and by how much at most."""
    failures, largest = [], 0.0
    for case in batch:
        whole = Whole.of(case, torch.float64)
        wanted = shares_of(whole_answer(reference_attention, whole), rank, case)
        with watched() as seen:
            got = shares_of_ulysses(rank, case, whole)
        differences = {name: difference(got[name], wanted[name]) for name in wanted}
        largest = max(largest, *differences.values())
        failures += [f"{name} by {by:.1e}: {case}" for name, by in differences.items() if not by <= TOLERANCE]
        missed = what_reached(rank, case, whole, seen)
        failures += [f"{missed}: {case}"] * bool(missed)
    return failures, largest


def whole_in_one_process(attend: Attend) -> Attend:
    """``attend`` on whole tensors, document by document where there are some."""

    def call(q_BLNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, **options: Any) -> Tensor:
        named = {"sinks_N": "sinks_n"}
        options = {named.get(name, name): value for name, value in options.items() if value is not False}
        ends, starts = options.pop("cu_seqlens", None), options.pop("cu_seqlens_padded", None)
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"][(None,) * (4 - options["attn_mask"].ndim)]
        if ends is None:
            return attend(q_BLNH, k_BLGH, v_BLGH, **options)
        out_BLNH = torch.zeros(*q_BLNH.shape[:3], v_BLGH.shape[3], dtype=q_BLNH.dtype)
        out_BLNH = out_BLNH + sum(x[:, :0].sum() for x in (q_BLNH, k_BLGH, v_BLGH))
        for start, length in zip((ends if starts is None else starts).tolist(), ends.diff().tolist(), strict=False):
            real = slice(start, start + length)
            if length:
                own = of_document(options, real)
                out_BLNH[:, real] = attend(q_BLNH[:, real], k_BLGH[:, real], v_BLGH[:, real], **own)
        return out_BLNH

    return call


def of_document(options: Options, real: slice) -> Options:
    own = dict(options)
    if "attn_mask" in own:
        mask = own["attn_mask"]
        mask = mask[:, :, real] if mask.shape[2] > 1 else mask
        own["attn_mask"] = mask[..., real] if mask.shape[3] > 1 else mask
    if "key_padding_mask" in own:
        own["key_padding_mask"] = own["key_padding_mask"][:, real]
    return own


def equal_in_bits(rank: int, batch: list[Case], dtype: torch.dtype, attend: Attend) -> list[str]:
    failures = []
    for case in batch:
        whole = Whole.of(case, dtype)
        wanted = shares_of(whole_answer(whole_in_one_process(attend), whole), rank, case)
        got = shares_of_ulysses(rank, case, whole, attend)
        names = [name for name in ("out", "dq", "dk", "dv") if not same_bits(got[name], wanted[name])]
        failures += [f"{', '.join(names)}: {case}"] * bool(names)
    return failures


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    return got.dtype == wanted.dtype and torch.equal(got, wanted)


def without_heads(rank: int, names: list[str]) -> list[str]:
    """Which learned options have no gradient, on a rank that has tokens and no head."""
    case = Case(
        ranks=2,
        kind="sinks and mask",
        batch=2,
        seq=(3, 4),
        kv_seq=(3, 4),
        num_heads=(2, 1),
        widths=(4, 4),
        heads=(2, 0),
    )
    whole = Whole.of(case, torch.float64)
    options: Options = {name: leaf(whole.options[name]) for name in names}
    parts = [leaf(share(x, case.seq, case.order, rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    sharding = TokenSharding(batch=2, seq=Partition(case.seq))
    out_BlNH = ulysses_attention(*parts, sharding=sharding, group=world(), heads=Partition((2, 0)), **options)
    out_BlNH.sum().backward()
    missing = [name for name, value in options.items() if value.grad is None]
    return missing + [
        name for name, value in options.items() if rank == 1 and value.grad is not None and value.grad.any()
    ]


def values_only(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor) -> Tensor:
    """Each query gets its own value."""
    return v_BLgH.repeat_interleave(q_BLnH.shape[2] // v_BLgH.shape[2], dim=2)


def shared_head(rank: int, first: float, dtype: torch.dtype) -> list[float]:
    """The gradient of a value whose head three ranks use, from ``first``, 1 and 1."""
    sharding = TokenSharding(batch=1, seq=Partition((2, 0, 1)))
    q_BlNH = torch.zeros(1, (2, 0, 1)[rank], 3, 1, dtype=dtype)
    v_BlGH = leaf(q_BlNH[:, :, :1])
    out_BlNH = ulysses_attention(
        q_BlNH, q_BlNH[:, :, :1], v_BlGH, sharding=sharding, group=world(), attend=values_only
    )
    out_BlNH.backward(torch.tensor([first, 1, 1], dtype=dtype)[:, None].expand_as(out_BlNH))
    return grad_of(v_BlGH).flatten().tolist()


def softcapped(q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, *, scale: float = 1.0, cap: float = 2.0) -> Tensor:
    """A user's own ``attend``: products squashed to within the cap, and a bias that grows with distance."""
    repeats = q_BLnH.shape[2] // k_BLgH.shape[2]
    k_BLnH, v_BLnH = (x.repeat_interleave(repeats, dim=2) for x in (k_BLgH, v_BLgH))
    product_BnLL = cap * torch.tanh(torch.einsum("bqnh,bknh->bnqk", q_BLnH, k_BLnH) * scale / cap)
    place_L = torch.arange(k_BLgH.shape[1])
    bias_LL = -(place_L[-q_BLnH.shape[1] :, None] - place_L).abs()
    return torch.einsum("bnqk,bknh->bqnh", (product_BnLL + bias_LL).softmax(-1), v_BLnH)


def own_attend(rank: int, case: Case) -> list[str]:
    """What differs with an ``attend`` of the user's, through the module."""
    whole = Whole.of(case, torch.float64)
    wanted = shares_of(whole_answer(softcapped, whole), rank, case)
    parts = [leaf(share(x, case.seq, case.order, rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    module = UlyssesAttention(group=world(), attend=softcapped, scale=case.scale)
    sharding = TokenSharding(batch=case.batch, seq=Partition(case.seq), order=case.order)
    out_BlNH = module(*parts, sharding=sharding)
    out_BlNH.backward(share(whole.grad_BLNH, case.seq, case.order, rank))
    got = dict(zip(("out", "dq", "dk", "dv"), (out_BlNH.detach(), *map(grad_of, parts)), strict=True))
    return [name for name in got if not difference(got[name], wanted[name]) <= TOLERANCE]


def calls_of_a_module() -> list[tuple[Case, Options, Options]]:
    """Each option of the module, and of its calls."""
    case = named_case(2, "cross bool", (2, 5), num_heads=(4, 2), batch=1, kv_seq=(3, 4))
    square = named_case(2, "none", (2, 5), num_heads=(4, 2), batch=1)
    keep_BL = torch.arange(7).unsqueeze(0) % 3 > 0
    return [
        (square, {"is_causal": True}, {}),
        (square, {"window": (1, 1)}, {}),
        (square, {"scale": 0.1}, {}),
        (square, {"heads": Partition((1, 3))}, {}),
        (square, {"attend": softcapped}, {}),
        (square, {}, {"attn_mask": keep_BL}),
        (square, {}, {"key_padding_mask": keep_BL}),
        (square, {}, {"cu_seqlens": torch.tensor([0, 3, 7])}),
        (square, {}, {"cu_seqlens": torch.tensor([0, 2, 5]), "cu_seqlens_padded": torch.tensor([0, 3, 7])}),
        (square, {}, {"sinks_N": torch.ones(4, dtype=torch.float64)}),
        (case, {"is_causal": True}, {"kv_sharding": TokenSharding(batch=1, seq=Partition((3, 4)))}),
    ]


def module_equals_function(rank: int) -> list[str]:
    """Which options the module loses on the way: each changes the bits of the output, and as the function does. In
    eval mode too, where dropout is off and nothing else is."""
    failures = []
    for case, choices, facts in calls_of_a_module():
        whole = Whole.of(case, torch.float64)
        sizes = (case.seq, case.kv_seq, case.kv_seq)
        parts = [
            share(x, n, "BL", rank) for x, n in zip((whole.q_BLNH, whole.k_BLGH, whole.v_BLGH), sizes, strict=True)
        ]
        sharding = TokenSharding(batch=1, seq=Partition(case.seq))
        plain_BlNH = ulysses_attention(
            *parts, sharding=sharding, group=world(), **{k: v for k, v in facts.items() if k == "kv_sharding"}
        )
        wanted_BlNH = ulysses_attention(*parts, sharding=sharding, group=world(), **choices, **facts)
        module = UlyssesAttention(group=world(), **choices)
        got_BlNH = deepcopy(module)(*parts, sharding=sharding, **facts)  # as of an averaged model
        changed = "heads" in choices or not torch.equal(got_BlNH, plain_BlNH)
        failures += [f"{choices} {facts}"] * (not changed or not torch.equal(got_BlNH, wanted_BlNH))
        evaluated_BlNH = UlyssesAttention(group=world(), dropout_p=0.9, **choices).eval()(
            *parts, sharding=sharding, **facts
        )
        failures += [f"{choices} {facts} in eval mode"] * (not torch.equal(evaluated_BlNH, wanted_BlNH))
    return failures


def masks_in_every_form(rank: int, length: int) -> list[str]:
    """What differs, with 5 tokens padded to ``length`` and told so in some form, from the 5 tokens alone; and what at
    padding is not exactly 0."""
    case = named_case(2, "none", (3, length - 3), batch=2, num_heads=(4, 2), widths=(6, 4))
    whole = Whole.of(case, torch.float64)
    short = replace(
        whole, **{name: getattr(whole, name)[:, :5] for name in ("q_BLNH", "k_BLGH", "v_BLGH", "grad_BLNH")}
    )
    short_answer = whole_answer(reference_attention, short)
    sharding = TokenSharding(batch=2, seq=Partition(case.seq))
    real_l = share(torch.arange(length)[None] < 5, case.seq, "BL", rank)[0]
    failures = []
    for form, options in padding_forms(length).items():
        for at_padding in (0.0, 1.0):  # of the gradient that comes in
            leaves = [leaf(share(x, case.seq, "BL", rank)) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
            out_BlNH = ulysses_attention(*leaves, sharding=sharding, group=world(), **options)
            grad_BLNH = whole.grad_BLNH.clone()
            grad_BLNH[:, 5:] *= at_padding
            out_BlNH.backward(share(grad_BLNH, case.seq, "BL", rank))
            names = ["out", "dq", "dk", "dv"]
            got = dict(zip(names, (out_BlNH.detach(), *map(grad_of, leaves)), strict=True))
            sees_nothing = "L, L" in form  # else queries at padding see the real keys
            exact = ["dk", "dv", *["dq"] * (sees_nothing or not at_padding), *["out"] * sees_nothing]
            failures += [f"{name} at padding: {form}" for name in exact if got[name][:, ~real_l].any()]
            if sees_nothing or not at_padding:
                wanted = {name: share(padded_to(x, length), case.seq, "BL", rank) for name, x in short_answer.items()}
                failures += [
                    f"{name}: {form}"
                    for name in got
                    if not difference(got[name][:, real_l], wanted[name][:, real_l]) <= TOLERANCE
                ]
    return failures


def padded_to(x_BLNH: Tensor, length: int) -> Tensor:
    return F.pad(x_BLNH, (0, 0, 0, 0, 0, length - x_BLNH.shape[1]))


def padding_forms(length: int) -> dict[str, Options]:
    """Of 2 rows with 5 real tokens."""
    keep_BL = (torch.arange(length) < 5).expand(2, length)
    keep_B1LL = keep_BL[:, None, None, :] & keep_BL[:, None, :, None]
    added_B11L, added_B1LL = (
        torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
        for keep in (keep_BL[:, None, None], keep_B1LL)
    )
    return {
        "(B, L)": {"key_padding_mask": keep_BL},
        "(B, 1, 1, L)": {"attn_mask": keep_BL[:, None, None]},
        "(B, 1, L, L)": {"attn_mask": keep_B1LL},
        "added (B, 1, 1, L)": {"attn_mask": added_B11L},
        "added (B, 1, L, L)": {"attn_mask": added_B1LL},
    }


# ---- what the tests ask --------------------------------------------------------------------------------


def named_case(
    ranks: int,
    kind: str,
    seq: tuple[int, ...],
    *,
    batch: int = 2,
    num_heads: tuple[int, int] = (4, 4),
    widths: tuple[int, int] = (6, 6),
    kv_seq: tuple[int, ...] | None = None,
    order: Order = "BL",
    scale: float | None = None,
) -> Case:
    return Case(
        ranks=ranks,
        kind=kind,
        batch=batch,
        seq=seq,
        kv_seq=kv_seq or seq,
        num_heads=num_heads,
        widths=widths,
        order=order,
        scale=scale,
        seed=7,
    )


# The cases of ../shared/known-bugs.md, part 2, that are one call.
NAMED = {
    "B4 two documents": named_case(2, "packed", (8, 8), batch=1, num_heads=(8, 4)),
    "B4 padding on the left": named_case(2, "left pad", (8, 8), num_heads=(8, 4)),
    "B4 sliding window": named_case(2, "window", (8, 8), num_heads=(8, 4)),
    "B9 uneven shards and a key mask": named_case(3, "holes", (3, 2, 2), num_heads=(6, 6)),
    "B9 uneven shards the other way": named_case(3, "right pad", (3, 3, 2), num_heads=(6, 6)),
    "B19 grouped heads, narrow values": named_case(2, "causal", (4, 4), num_heads=(4, 2), widths=(6, 4)),
    "B20 28 query and 7 key/value heads": named_case(2, "causal", (3, 4), num_heads=(28, 7)),
    "B24 window wider than a shard": named_case(4, "window", (4, 4, 4, 4), num_heads=(4, 4)),
    "B27 fewer heads than ranks": named_case(4, "causal", (2, 2, 2, 1), num_heads=(2, 1)),
    "B28 one head, four tokens": named_case(2, "none", (2, 2), num_heads=(1, 1), widths=(4, 4)),
    "report 2: three heads": named_case(2, "none", (4, 4), num_heads=(3, 3)),
    "report 2: 6 over 3": named_case(2, "causal", (4, 4), num_heads=(6, 3)),
    "report 2: 12 over 3": named_case(2, "causal", (4, 4), num_heads=(12, 3)),
    "report 2: one key/value head": named_case(4, "causal", (4, 4, 1, 2), num_heads=(8, 1)),
    "report 3: five tokens on two ranks": named_case(2, "causal", (3, 2), num_heads=(4, 2), widths=(6, 4)),
    "report 3: sequence-first": named_case(2, "none", (4, 4), num_heads=(4, 4), widths=(3, 3), order="LB"),
    "MLA widths": named_case(3, "causal", (3, 0, 4), num_heads=(5, 5), widths=(192, 128)),
    "MLA widths, one key/value head": named_case(3, "causal", (3, 0, 4), num_heads=(5, 1), widths=(192, 128)),
    "no token at all": named_case(2, "causal", (0, 0), num_heads=(4, 2)),
    "no key": named_case(2, "cross", (3, 2), num_heads=(4, 2), kv_seq=(0, 0)),
    "no query": named_case(2, "cross", (0, 0), num_heads=(4, 2), kv_seq=(3, 2)),
    "a row that sees nothing": named_case(2, "closed row", (3, 2), num_heads=(4, 2)),
    "queries before every key": named_case(2, "cross causal", (6, 3), num_heads=(4, 2), kv_seq=(1, 2)),
}


def failures_of(rank_pool: RankPool, ranks: int, batch: list[Case], timeout: float = 60) -> list[str]:
    results = rank_pool.run(equal_to_reference, ranks, batch, timeout=timeout)
    return [f"rank {rank}: {failure}" for rank, (failures, _) in enumerate(results) for failure in failures]


def cases_of_ranks(ranks: int, number: int) -> list[Case]:
    return [case for kind in KINDS for case in drawn(cases(ranks, kind), number, f"{ranks} {kind}")]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equal_to_the_reference(rank_pool: RankPool, ranks: int) -> None:
    """Invariants 2, in float64 and with a gradient of every input on every rank (B26), and 11: what ``attend`` was
    called with is what was given. Measured: 3.3e-15 at most."""
    assert failures_of(rank_pool, ranks, cases_of_ranks(ranks, BATCH_OF_CASES)) == []


@pytest.mark.parametrize("name", NAMED)
def test_a_case_that_others_got_wrong(rank_pool: RankPool, name: str) -> None:
    assert failures_of(rank_pool, NAMED[name].ranks, [NAMED[name]]) == []


def test_the_drawn_cases_reach_what_others_got_wrong() -> None:
    """Invariant 11: a grid without an empty shard, a rank without heads or a group over ranks proves little."""
    batch = [case for ranks in (3, 4) for case in cases_of_ranks(ranks, BATCH_OF_CASES)]
    wanted: dict[str, Callable[[Case], bool]] = {
        "an empty shard among others": lambda case: 0 in case.seq and max(case.seq) < sum(case.seq),
        "one rank has everything": lambda case: max(case.seq) == sum(case.seq) > 1,
        "uneven": lambda case: len(set(case.seq)) == case.ranks,
        "a rank without heads": lambda case: 0 in case.head_sizes,
        "fewer heads than ranks": lambda case: case.num_heads[0] < case.ranks,
        "a group that straddles ranks": lambda case: case.shares_a_kv_head,
        "whole groups": lambda case: not case.shares_a_kv_head and case.num_heads[1] > 1 and case.batch > 1,
        "batch-first, uneven, two rows": lambda case: (
            case.order == "BL" and case.batch > 1 and len(set(case.seq)) > 1
        ),
        "sequence-first, two rows": lambda case: case.order == "LB" and case.batch > 1,
        "67 tokens": lambda case: sum(case.seq) == 67,
    }
    wanted |= {f"heads {heads}": lambda case, heads=heads: case.num_heads == heads for heads in HEADS}
    wanted |= {f"widths {widths}": lambda case, widths=widths: case.widths == widths for widths in WIDTHS}
    wanted |= {kind: lambda case, kind=kind: case.kind == kind and sum(case.seq) > 1 for kind in KINDS}
    assert {name for name, reaches in wanted.items() if sum(map(reaches, batch)) < 2} == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_bit_equal_to_one_process(rank_pool: RankPool, ranks: int, dtype: torch.dtype) -> None:
    """Invariant 2, where no two ranks share a key/value head, so that nothing is added up in another order: at small,
    odd widths, and at one that models have."""
    batch = [case for case in cases_of_ranks(ranks, BATCH_OF_CASES) if not case.shares_a_kv_head][::2]
    batch += [replace(case, widths=(64, 32)) for case in batch[::8]]
    assert len({case.kind for case in batch}) > 0.9 * len(KINDS)
    assert in_bits(rank_pool, ranks, batch, dtype, scaled_dot_product) == []


@pytest.mark.parametrize("kind", ["cross", "cross bool", "cross sinks"])
def test_bit_equal_where_one_head_meets_one_key(rank_pool: RankPool, kind: str) -> None:
    """A product with one column takes another kernel for one head than for several."""
    batch = [
        named_case(2, kind, seq, batch=1, num_heads=(3, 3), widths=widths, kv_seq=(1, 0))
        for seq in ((34, 33), (9, 7))
        for widths in ((6, 6), (64, 64))
    ]
    assert in_bits(rank_pool, 2, batch, torch.float32, scaled_dot_product) == []


def in_bits(
    pool: RankPool, ranks: int, batch: list[Case], dtype: torch.dtype, attend: Attend, timeout: float = 60
) -> list[str]:
    results = pool.run(equal_in_bits, ranks, batch, dtype, attend, timeout=timeout)
    return [f"rank {rank}: {failure}" for rank, failures in enumerate(results) for failure in failures]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_shared_head_are_added_in_float32(rank_pool: RankPool, dtype: torch.dtype) -> None:
    """2048 + 1 + 1 and, in bfloat16, 256 + 1 + 1 stay where they are when every sum is rounded."""
    first = 2048.0 if dtype == torch.float16 else 256.0
    assert rank_pool.run(shared_head, 3, first, dtype) == [[first + 2] * n for n in (2, 0, 1)]


@pytest.mark.parametrize("name", ["sinks_N", "attn_mask"])
def test_a_rank_without_heads_has_a_zero_gradient_of_what_is_learned(rank_pool: RankPool, name: str) -> None:
    assert rank_pool.run(without_heads, 2, [name]) == [[], []]


@pytest.mark.parametrize("order", ["BL", "LB"])
def test_attend_is_the_users_own(rank_pool: RankPool, order: Order) -> None:
    case = named_case(3, "none", (4, 0, 3), num_heads=(6, 2), order=order, scale=0.7)
    assert rank_pool.run(own_attend, 3, case) == [[]] * 3


def test_the_module_loses_no_option(rank_pool: RankPool) -> None:
    """Invariant 11. B5: masks and windows stay in eval mode."""
    assert rank_pool.run(module_equals_function, 2) == [[]] * 2


@pytest.mark.parametrize("length", [6, 8, 16])
def test_report_3_padding_in_every_form_of_mask(rank_pool: RankPool, length: int) -> None:
    """Report 3, 3, 5 and 6: output and gradients are those of the tokens without padding, and padding has none: of
    keys and values in any case, of queries where nothing comes in for them."""
    assert rank_pool.run(masks_in_every_form, 2, length) == [[]] * 2


@pytest.mark.sweep
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_length_and_head_count(rank_pool: RankPool, ranks: int, kind: str) -> None:
    batch = [
        case
        for queries, num_heads in product(lengths_to_try(ranks), HEADS)
        for case in drawn(cases(ranks, kind, queries, num_heads), 4, f"{ranks} {kind} {queries} {num_heads}")
    ]
    assert failures_of(rank_pool, ranks, batch, timeout=600) == []
    whole_groups = [case for case in batch if not case.shares_a_kv_head]
    for dtype in (torch.float32, torch.bfloat16):
        assert in_bits(rank_pool, ranks, whole_groups, dtype, scaled_dot_product, timeout=600) == []
