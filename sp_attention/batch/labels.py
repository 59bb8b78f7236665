"""What the places of a batch are: which document, real or padding, what to predict. Of whole sequences, batch first,
before anything is cut."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attend.documents import Documents


def shift_labels(
    label_BL: Tensor,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_padded: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """What each token has to predict: the label after it.

    Shift whole sequences, never a shard: the last token of a shard needs the first label of the next one.

    Args:
        label_BL: (B, L) ints, each at its own token: the tokens, or labels with ``ignore_index`` where nothing is to
            be learnt.
        attention_mask, cu_seqlens, cu_seqlens_padded: where padding and documents are; see :class:`Batch`.
        ignore_index: the target of a token that has none.

    Returns:
        (B, L) int64. The last token of a sequence or document has no target, nor has one at padding or before it.

    Raises:
        ValueError: labels, a mask or documents that cannot be.
    """
    if label_BL.ndim != 2 or not is_integer(label_BL):
        raise ValueError(f"labels are {tuple(label_BL.shape)} of {label_BL.dtype}; they have to be (B, L) ints")
    batch, length = label_BL.shape
    masks = Masks.of(attention_mask, (batch, length))
    documents = documents_of(cu_seqlens, cu_seqlens_padded, (batch, length))
    document_BL = document_of_place((batch, length), masks, documents).to(label_BL.device)
    ends_BL = (document_BL[:, 1:] != document_BL[:, :-1]) | (document_BL[:, 1:] < 0)
    target_BL = torch.full_like(label_BL, ignore_index, dtype=torch.int64)
    target_BL[:, :-1] = label_BL[:, 1:].to(torch.int64).masked_fill(ends_BL, ignore_index)
    return target_BL


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Masks:
    """An attention mask as :func:`ulysses_attention` takes it.

    Attributes:
        key_padding_mask: (B, L) bool, True attends; None if every key may be attended to.
        attn_mask: (B or 1, N or 1, L or 1, L), bool or added to the products; None if ``key_padding_mask`` says all.
        real_BL: (B, L) bool: False where no query may attend to the key; None if there is no mask.
    """

    key_padding_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    real_BL: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, shape: tuple[int, int]) -> "Masks":
        """Read a mask in any of its forms: a host sync or two.

        Args:
            mask: (B, L), (B, 1, 1, L) or (B, 1, L, L); bool or 0/1 ints (True, 1 attends), or floats added to the
                products (0 attends; -inf, or the lowest number of a dtype as Hugging Face has it, does not).
            shape: (B, L).

        Raises:
            ValueError: another shape, or values that cannot be.
        """
        if mask is None:
            return cls()
        _check_mask(mask, shape)
        is_learned = mask.requires_grad  # so it is a bias, whatever it holds now
        mask = mask if mask.ndim == 4 else mask[:, None, None, :]
        if mask.is_floating_point():
            mask = mask.masked_fill(mask <= _lowest(mask.dtype), -torch.inf)
            open_BNLL = mask > -torch.inf
            is_bias = bool((open_BNLL & (mask != 0)).any())
        else:
            mask = open_BNLL = mask.bool()
            is_bias = False
        real_BL = open_BNLL.any(dim=(1, 2)).expand(shape)
        if is_bias or is_learned or mask.shape[1] > 1 or mask.shape[2] > 1:
            return cls(attn_mask=mask, real_BL=real_BL)
        return cls(key_padding_mask=None if bool(real_BL.all()) else real_BL, real_BL=real_BL)


def _check_mask(mask: Tensor, shape: tuple[int, int]) -> None:
    batch, length = shape
    wanted = [(batch, length), (batch, 1, 1, length), (batch, 1, length, length)]
    fits = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, length) and mask.shape[3] == length
    if tuple(mask.shape) != wanted[0] and not fits:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it has to be one of {', '.join(map(str, wanted))}: the whole "
            "sequence, on every rank"
        )
    zeros_and_ones = bool(((mask == 0) | (mask == 1)).all())
    if is_integer(mask) and not zeros_and_ones:
        raise ValueError(
            "attention_mask is ints other than 0 and 1; pass cu_seqlens for documents, or floats to add to the "
            "products"
        )
    if mask.is_floating_point() and (bool(mask.isnan().any()) or (zeros_and_ones and bool((mask == 1).any()))):
        raise ValueError(
            f"attention_mask is {mask.dtype} with NaN, or with 0 and 1 alone; floats are added to the products (0 "
            "attends, -inf does not), so pass bools or ints where 1 means that a token attends"
        )


def _lowest(dtype: torch.dtype) -> float:
    """What counts as -inf: masks are cast between dtypes, and bfloat16 has the highest lowest number but for
    float16."""
    return torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).min


def documents_of(
    cu_seqlens: Tensor | None, cu_seqlens_padded: Tensor | None, shape: tuple[int, int]
) -> Documents | None:
    """The documents of a batch of ``shape``, or ValueError."""
    if cu_seqlens is None:
        if cu_seqlens_padded is not None:
            raise ValueError("cu_seqlens_padded without cu_seqlens; the real lengths have to be given too")
        return None
    for x in (cu_seqlens, cu_seqlens_padded):
        if x is not None and (x.ndim != 1 or not is_integer(x)):
            raise ValueError(f"cu_seqlens are {tuple(x.shape)} of {x.dtype}; they have to be (documents + 1,) ints")
    documents = Documents.of(cu_seqlens, cu_seqlens_padded)
    if problem := documents.problem(shape[0], (shape[1], shape[1])):
        raise ValueError(problem)
    return documents


def document_of_place(shape: tuple[int, int], masks: Masks, documents: Documents | None) -> Tensor:
    """(B, L) int64: the number of each token's document (0 if there is one per row), -1 at padding."""
    document_L = torch.full((shape[1],), 0 if documents is None else -1)
    for number, (start, end) in enumerate(documents.spans if documents else ()):
        document_L[start:end] = number
    if masks.real_BL is None:
        return document_L.expand(shape)
    return document_L.to(masks.real_BL.device).expand(shape).masked_fill(~masks.real_BL, -1)


def place_in_document(length: int, documents: Documents | None) -> Tensor:
    """(L,) int64: each token's place in its document, 0 at padding; without documents, in the sequence."""
    if documents is None:
        return torch.arange(length)
    place_L = torch.zeros(length, dtype=torch.int64)
    for start, end in documents.spans:
        place_L[start:end] = torch.arange(end - start)
    return place_L


def is_integer(x: Tensor) -> bool:
    return not (x.dtype == torch.bool or x.is_floating_point() or x.is_complex())
