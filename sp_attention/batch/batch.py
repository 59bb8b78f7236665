"""A batch, and one rank's part of it: tokens, targets, positions, masks and documents together."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dispatch import Partition, TokenSharding, agree, gather_tokens
from moe_dispatch.internals import check_group, problem_of_dtensors

from ..wire.order import batch_first, token_dim


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A whole batch, the same on every rank of a sequence-parallel group; always batch first.

    Attributes:
        token_BL: (B, L) ints.
        target_BL: (B, L) ints: what each token has to predict, so labels already shifted (:func:`shift_labels`). If
            left out, the next token. There is none at padding, whatever this holds there.
        loss_mask_BL: (B, L) bool or 0/1, along ``target_BL``: where the loss counts.
        position_BL: (B, L), or (3, B, L) and the like: position ids. If left out, places in the sequence, or in the
            document. They do not say where documents are.
        attention_mask: (B, L), (B, 1, 1, L) or (B, 1, L, L); bool or 0/1 ints (True, 1 attends), or floats that are
            added to the products (0 attends, -inf does not).
        cu_seqlens: (documents + 1,) ints, for B = 1, best on the CPU; see :func:`ulysses_attention`.
        cu_seqlens_padded: (documents + 1,) ints; see there.
        ignore_index: the target of a token that has none.
        fields: what else belongs to a token, by names of the caller: (B, L, ...) of any dtype. Advantages, log
            probabilities of an older policy, temperatures, embeddings of images. Padding may hold anything.
    """

    token_BL: Tensor
    target_BL: Tensor | None = None
    loss_mask_BL: Tensor | None = None
    position_BL: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_padded: Tensor | None = None
    ignore_index: int = -100
    fields: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Consecutive tokens of one rank, c of each row, in the order of its tensor; views, but for what is said.

    Attributes:
        token_Bc: (B, c) or (c, B).
        target_Bc: (B, c) or (c, B).
        position_Bc: (B, c) or (c, B), or that after a first dimension of 3.
        real_Bc: bool, False at padding.
        attn_mask: (B or 1, N or 1, c or 1, L): the rows of these queries, all keys. A copy where the rank holds
            several runs of the sequence.
        fields: (B, c, ...) or (c, B, ...) each.
        place_c: (c,) int64, where each token is in the whole sequence; made here.
    """

    token_Bc: Tensor
    target_Bc: Tensor
    position_Bc: Tensor
    real_Bc: Tensor
    attn_mask: Tensor | None
    fields: Mapping[str, Tensor]
    place_c: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ShardedBatch:
    """One rank's part of a :class:`Batch`, made by :func:`shard_batch`.

    Attributes:
        token_Bl: (B, l), or (l, B) for order "LB".
        target_Bl: of that shape, int64, ``ignore_index`` where nothing counts.
        position_Bl: (B, l), (l, B), or that after a first dimension of 3.
        real_Bl: bool, False at padding.
        key_padding_mask: (B, L) bool, whole, or None.
        attn_mask: (B or 1, N or 1, L or 1, L), whole, or None.
        cu_seqlens: whole, or None.
        cu_seqlens_padded: whole, or None.
        ignore_index: as in the batch.
        fields: as in the batch, (B, l, ...), or (l, B, ...) for order "LB"; in the graph of the whole, and
            views of it where the rank holds one run of the sequence. Each rank's gradient of the whole is that of its
            own tokens, so sum it over the ranks.
        sharding: which tokens each rank holds.
        rank: whose part it is.
    """

    token_Bl: Tensor
    target_Bl: Tensor
    position_Bl: Tensor
    real_Bl: Tensor
    key_padding_mask: Tensor | None
    attn_mask: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_padded: Tensor | None
    ignore_index: int
    fields: Mapping[str, Tensor]
    sharding: TokenSharding
    rank: int

    @property
    def loss_mask_Bl(self) -> Tensor:
        """Where the loss counts, bool."""
        return self.target_Bl != self.ignore_index

    @property
    def attention(self) -> dict[str, Any]:
        """The sharding, masks and documents, as keyword arguments of :func:`ulysses_attention`."""
        names = ("sharding", "key_padding_mask", "attn_mask", "cu_seqlens", "cu_seqlens_padded")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def chunks(self, size: int) -> Iterator[Chunk]:
        """This rank's tokens in chunks of at most ``size`` of each row, as equal as can be: for work on single tokens
        that should not need the memory of all of them.

        Every rank has the same number of chunks, at least one; where shards are short some are empty. So a collective
        per chunk is safe.

        Yields:
            Consecutive tokens of this rank, c of each row: ``token_Bc``, ``target_Bc``, ``position_Bc`` and
            ``real_Bc``, (B, c), or (c, B) for order "LB"; ``fields`` of them; ``attn_mask`` (B or 1, N or 1, c or 1,
            L), the rows of these queries with all keys; ``place_c``, where they are in the sequence.

        Raises:
            ValueError: a size below 1.
        """
        if size < 1:
            raise ValueError(f"chunks of {size} places; size has to be at least 1")
        dim = token_dim(self.sharding)
        longest = max(self.sharding.extent(rank)[1] for rank in range(self.sharding.num_ranks))
        cut = Partition.balanced(self.token_Bl.shape[dim], max(len(range(0, longest, size)), 1))
        runs, device = self.sharding.runs(self.rank), self.token_Bl.device
        place_l = torch.cat([torch.arange(*run, device=device) for run in runs])
        for start, count in zip(cut.offsets, cut.sizes, strict=True):
            place_c, mask = place_l[start : start + count], self.attn_mask
            if mask is not None and mask.shape[2] > 1:
                one_run = len(runs) == 1
                mask = mask.narrow(2, runs[0][0] + start, count) if one_run else mask.index_select(2, place_c)
            yield Chunk(
                token_Bc=self.token_Bl.narrow(dim, start, count),
                target_Bc=self.target_Bl.narrow(dim, start, count),
                position_Bc=self.position_Bl.narrow(dim, start, count),
                real_Bc=self.real_Bl.narrow(dim, start, count),
                attn_mask=mask,
                # Its tokens come first, so their dimension counts from the front.
                fields={name: x.narrow(2 + dim, start, count) for name, x in self.fields.items()},
                place_c=place_c,
            )


def gather_outputs(x_BlD: Tensor, *, batch: ShardedBatch, group: dist.ProcessGroup) -> Tensor:
    """The whole output on every rank, 0 at padding whatever was there. One collective, and one of 8 bytes per pair of
    ranks before it, so that a wrong output of one rank is everyone's error; one more in backward.

    Args:
        x_BlD: (B, l, ...), or (l, B, ...): of this rank's tokens.

    Returns:
        (B, L, ...), batch first for either order. Backward as in ``moe_dispatch.gather_tokens``, 0 at padding.

    Raises:
        ValueError: the same text on every rank: an output that is not the rank's shard, or ranks whose outputs differ
            in dtype, in what follows the tokens, or in whether they have a gradient.
    """
    check_group(group, batch.sharding.num_ranks, "the token sharding")
    agree(
        f"{_facts_of_output(x_BlD)} for {batch.sharding}",
        problem=_problem_of_output(x_BlD, batch),
        device=batch.token_Bl.device,
        group=group,
    )
    padding_Bl = ~batch.real_Bl
    x_BlD = x_BlD.masked_fill(padding_Bl.view(*padding_Bl.shape, *(1,) * (x_BlD.ndim - 2)), 0)
    return batch_first(gather_tokens(x_BlD, sharding=batch.sharding, group=group), batch.sharding)


def _problem_of_output(x_BlD: Tensor, batch: ShardedBatch) -> str:
    if problem := problem_of_dtensors(x_BlD=x_BlD):
        return problem
    shape = tuple(x_BlD.shape) if isinstance(x_BlD, Tensor) else type(x_BlD).__name__
    if isinstance(x_BlD, Tensor) and shape[:2] == batch.sharding.local_shape(batch.rank):
        there = batch.token_Bl.device
        return f"the output is on {x_BlD.device}, but the tokens on {there}; move it there" * (x_BlD.device != there)
    return (
        f"the output is {shape}, but this rank's tokens in order {batch.sharding.order!r} are "
        f"{batch.sharding.local_shape(batch.rank)}; pass what was computed for them"
    )


def _facts_of_output(x_BlD: Tensor) -> str:
    if not isinstance(x_BlD, Tensor):
        return ""
    with_gradient = torch.is_grad_enabled() and x_BlD.requires_grad
    return f"outputs {tuple(x_BlD.shape[2:])} of {x_BlD.dtype} {'with' if with_gradient else 'without'} gradient"
