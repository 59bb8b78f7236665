"""The kinds of mask: the options of a call, drawn for the sizes of a case."""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, product

import torch
from torch import Tensor

from tests.support.attention.case import Case, Options

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
