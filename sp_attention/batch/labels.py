"""What is at each place of a batch: which document or padding, what to predict, which position id.

All of whole sequences, batch first, before anything is cut.
"""

import torch
from torch import Tensor

from moe_dispatch.internals import copied_to, refuse_dtensors, unseen_by_policies

from ..attend.documents import Documents
from ..dtypes import is_integer
from .masks import BatchMask


@unseen_by_policies
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
        ValueError: labels, a mask or documents that cannot be, or a DTensor.
    """
    refuse_dtensors(label_BL=label_BL)
    if label_BL.ndim != 2 or not is_integer(label_BL):
        raise ValueError(f"labels are {tuple(label_BL.shape)} of {label_BL.dtype}; they have to be (B, L) ints")
    batch, length = label_BL.shape
    mask = BatchMask.of(attention_mask, (batch, length))
    documents = documents_of(cu_seqlens, cu_seqlens_padded, (batch, length))
    document_BL = document_of_place((batch, length), mask, documents, label_BL.device)
    ends_BL = (document_BL[:, 1:] != document_BL[:, :-1]) | (document_BL[:, 1:] < 0)
    target_BL = torch.full_like(label_BL, ignore_index, dtype=torch.int64)
    target_BL[:, :-1] = label_BL[:, 1:].to(torch.int64).masked_fill(ends_BL, ignore_index)
    return target_BL


def documents_of(
    cu_seqlens: Tensor | None, cu_seqlens_padded: Tensor | None, shape: tuple[int, int]
) -> Documents | None:
    """The documents of a batch of ``shape`` (B, L), or ValueError. None if it is not packed."""
    batch, length = shape
    documents, problem = Documents.read(cu_seqlens, cu_seqlens_padded, batch, (length, length))
    if problem:
        raise ValueError(problem)
    return documents


def document_of_place(
    shape: tuple[int, int], mask: BatchMask, documents: Documents | None, device: torch.device
) -> Tensor:
    """(B, L) int64: the number of each token's document (0 if there is one per row), -1 at padding."""
    # On the CPU, then one copy, however many documents there are.
    document_L = torch.full((shape[1],), 0 if documents is None else -1, device="cpu")
    for number, (start, end) in enumerate(documents.spans if documents else ()):
        document_L[start:end] = number
    document_BL = copied_to(document_L, device).expand(shape)
    return document_BL if mask.real_BL is None else document_BL.masked_fill(~mask.real_BL.to(device), -1)


def default_positions(length: int, documents: Documents | None, device: torch.device) -> Tensor:
    """(L,) int64: the position id of each place. It counts from the start of the document, or of the sequence where
    there are no documents; 0 at padding."""
    if documents is None:
        return torch.arange(length, device=device)
    position_L = torch.zeros(length, dtype=torch.int64, device="cpu")
    for start, end in documents.spans:
        position_L[start:end] = torch.arange(end - start, device="cpu")
    return copied_to(position_L, device)
