"""Cut a batch over ranks that are sure to mean the same batch.

Everything about a token is cut once, by one sharding. What attention needs of the whole sequence, masks and
documents, stays whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import TokenSharding, agree
from moe_dispatch.internals import check_is_group, digest, uncompiled, unseen_by_policies

from ..attend.documents import Documents
from ..blocks.dropout import mix
from ..wire.exchange import check_sharding
from ..wire.order import in_order
from .batch import Batch, ShardedBatch
from .checks import check_devices, check_shapes, check_types, device_of
from .labels import default_positions, document_of_place, documents_of, shift_labels
from .masks import BatchMask

PartT = TypeVar("PartT")
LONGEST_FACT = 100  # characters: then the facts of all fit in one sentence between ranks


@uncompiled("each batch would be another graph; cut batches outside of what is compiled")
@unseen_by_policies
def shard_batch(batch: Batch, *, sharding: TokenSharding, group: dist.ProcessGroup) -> ShardedBatch:
    """This rank's part of a batch. One exchange of 8 bytes per pair of ranks makes sure that all of them cut the same
    batch in the same way; so nothing needs to be asked per layer.

    Args:
        batch: the same on every rank of ``group``, on a device that the group communicates on.
        sharding: which tokens each rank of ``group`` holds; its batch is not cut.
        group: the sequence-parallel process group.

    Raises:
        ValueError: the same text on every rank, naming the ranks: a batch that is wrong on one of them, or ranks that
            differ in sharding, tokens, targets, positions, padding, documents, ``ignore_index``, the shape of a
            mask, or names, shapes, dtypes or bits of fields.
    """
    check_is_group(group)

    def cut() -> tuple[str, ShardedBatch]:
        check_types(batch)
        check_sharding(sharding, group)
        check_devices(batch, group)
        completed = CompletedBatch.of(batch, sharding)
        return completed.facts(batch, sharding), completed.part(batch, sharding, group.rank())

    return agreed_by_ranks(cut, device_of(batch, group), group)


def agreed_by_ranks(cut: Callable[[], tuple[str, PartT]], device: torch.device, group: dist.ProcessGroup) -> PartT:
    """The part that ``cut`` makes, if no rank fails to, and the facts that it tells are those of all ranks."""
    facts, problem, cause = "", "", None
    parts: list[PartT] = []  # one, unless there is a problem
    try:
        facts, part = cut()
        parts = [part]
    except ValueError as error:
        problem = str(error)
    except Exception as error:  # whatever it is, the peers wait for a word about it
        problem, cause = f"shard_batch raised {type(error).__name__}: {error}", error
    try:
        agree(facts, problem=problem, device=device, group=group)
    except ValueError as told:
        raise told from cause
    return parts[0]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CompletedBatch:
    """A batch with what follows from it.

    Attributes:
        token_BL, position_BL: as in the batch.
        target_BL: (B, L) int64, ``ignore_index`` at padding and where the loss mask says so.
        real_BL: (B, L) bool, False at padding.
        mask, documents: what attention needs.
    """

    token_BL: Tensor
    target_BL: Tensor
    position_BL: Tensor | None
    real_BL: Tensor
    mask: BatchMask
    documents: Documents | None

    @classmethod
    def of(cls, batch: Batch, sharding: TokenSharding) -> "CompletedBatch":
        """Complete the batch, or raise ValueError for what is wrong with it."""
        shape = (sharding.batch.total, sharding.seq.total)
        check_shapes(batch, shape)
        mask = BatchMask.of(batch.attention_mask, shape)
        documents = documents_of(batch.cu_seqlens, batch.cu_seqlens_padded, shape)
        real_BL = document_of_place(shape, mask, documents, batch.token_BL.device) >= 0
        target_BL = batch.target_BL
        if target_BL is None:
            target_BL = shift_labels(
                batch.token_BL,
                attention_mask=batch.attention_mask,
                cu_seqlens=batch.cu_seqlens,
                cu_seqlens_padded=batch.cu_seqlens_padded,
                ignore_index=batch.ignore_index,
            )
        counts_BL = real_BL if batch.loss_mask_BL is None else real_BL & batch.loss_mask_BL.bool()
        return cls(
            token_BL=batch.token_BL,
            target_BL=target_BL.to(torch.int64).masked_fill(~counts_BL, batch.ignore_index),
            position_BL=batch.position_BL,
            real_BL=real_BL,
            mask=mask,
            documents=documents,
        )

    def facts(self, batch: Batch, sharding: TokenSharding) -> str:
        """What the ranks have to agree about, in few words."""
        attn_mask = self.mask.attn_mask
        fields = ", ".join(f"{name!r} {fingerprint_of_bits(x)}" for name, x in sorted(batch.fields.items()))
        facts = {
            "sharding": f"batch {sharding.batch.sizes}, seq {sharding.seq.sizes}, order {sharding.order!r}, "
            f"ranks {sharding.rectangles}",
            "pieces": sharding.places.text,
            "tokens": fingerprint(self.token_BL),
            "targets": fingerprint(self.target_BL),
            "ignore_index": f"{batch.ignore_index}",
            "positions": "default" if self.position_BL is None else fingerprint(self.position_BL),
            "real": fingerprint(self.real_BL),
            "attn_mask": "none" if attn_mask is None else f"{tuple(attn_mask.shape)} of {attn_mask.dtype}",
            "fields": fields or "none",
            "documents": "none" if self.documents is None else f"{self.documents.ends} at {self.documents.starts}",
        }
        return "; ".join(f"{name} {shortened(value)}" for name, value in facts.items())

    def part(self, batch: Batch, sharding: TokenSharding, rank: int) -> ShardedBatch:
        """What of it is ``rank``'s."""
        if self.position_BL is None:
            position_L = default_positions(sharding.seq.total, self.documents, self.token_BL.device)
            position_t = position_L[sharding.positions(rank, self.token_BL.device)]
            position_Bl = position_t.view(sharding.local_shape(rank))
        else:
            position_Bl = cut(self.position_BL, sharding, rank)
        return ShardedBatch(
            token_Bl=cut(self.token_BL, sharding, rank),
            target_Bl=cut(self.target_BL, sharding, rank),
            position_Bl=position_Bl,
            real_Bl=cut(self.real_BL, sharding, rank),
            key_padding_mask=self.mask.key_padding_mask,
            attn_mask=self.mask.attn_mask,
            cu_seqlens=batch.cu_seqlens,
            cu_seqlens_padded=batch.cu_seqlens_padded,
            ignore_index=batch.ignore_index,
            fields={name: sharding.shard(in_order(x_BL, sharding), rank) for name, x_BL in batch.fields.items()},
            sharding=sharding,
            rank=rank,
        )


def cut(x_BL: Tensor, sharding: TokenSharding, rank: int) -> Tensor:
    """(..., B, L) -> this rank's (..., B, l), or (..., l, B) for order "LB"; a view where that is one run."""
    tokens_first = in_order(x_BL.movedim((-2, -1), (0, 1)), sharding)
    return sharding.shard(tokens_first, rank).movedim((0, 1), (-2, -1))


def fingerprint(x: Tensor) -> str:
    """Shape, and a number that differs (but for one case in 2**32) where ints or bools differ in value or order."""
    value = x.flatten().to(torch.int64)
    index = torch.arange(len(value), device=x.device)
    return f"{tuple(x.shape)} {int(mix(value ^ mix(index)).sum()) & 0xFFFFFFFF:08x}"


def fingerprint_of_bits(x_BL: Tensor) -> str:
    """Shape, dtype, and a number that differs where values differ, or their order over the tokens: (B, L, ...) of any
    dtype. The bits of a token are summed first, as ints, so that nothing is made that is as large as the whole."""
    real_BL = torch.view_as_real(x_BL.detach().resolve_conj()) if x_BL.is_complex() else x_BL.detach()
    bits_BL = real_BL.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real_BL.itemsize])
    sum_BL = bits_BL.unsqueeze(-1).sum(tuple(range(2, bits_BL.ndim + 1)), dtype=torch.int64)
    return f"{tuple(x_BL.shape)} of {x_BL.dtype} {fingerprint(sum_BL).rpartition(' ')[2]}"


def shortened(text: str) -> str:
    """Text that differs where ``text`` differs, at a bounded length."""
    return text if len(text) <= LONGEST_FACT else f"{text[: LONGEST_FACT - 12]}... {digest(text):08x}"
