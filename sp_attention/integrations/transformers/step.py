"""One batch of a Transformers model, cut over all ranks of a mesh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import ParallelMesh, Partition, TokenSharding, gather_tokens

from ...batch.batch import Batch
from ...batch.shard import agreed_by_ranks
from ...parallel.mesh_batch import facts_and_part
from ...parallel.on_mesh import everyone
from ...work.scheme import ULYSSES, Scheme

IGNORED = -100  # the label that Transformers counts nowhere
TENSORS = ("input_ids", "labels", "shift_labels", "attention_mask", "position_ids")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """This rank's part of a batch; the keyword ``step`` of the model.

    A rank without tokens feeds its model one dummy token, since Transformers' code runs on no empty tensor. It is
    dropped before anything is sent, and counts nowhere.

    Attributes:
        inputs: what to call the model with, ``model(**step.inputs)``: (b, l) token and position ids of this rank,
            ``use_cache=False``, and the step itself. Add keywords of your own (``output_router_logits=True``).
        target_Bl: (b, l) int64, what each token has to predict, -100 for nothing. Without the dummy.
        real_Bl: (b, l) bool, False at padding. Without the dummy.
        sharding: the whole (B, L) grid over all ranks of the mesh.
        tokens_of_experts: the same grid as the "ep" group of this rank holds it.
        fed_shape: (rows, length) of ``inputs``: (b, l), with 1 in place of 0.
        padding_options: options of ``ulysses_attention``, without documents.
        packed_options: the same with documents, where positions start anew.
        mesh: that the batch was cut for.
        scheme: how attention is spread; the model that is called with the step sets its own.
    """

    target_Bl: Tensor
    real_Bl: Tensor
    sharding: TokenSharding
    tokens_of_experts: TokenSharding
    fed_shape: tuple[int, int]
    padding_options: Mapping[str, Any]
    packed_options: Mapping[str, Any]
    mesh: ParallelMesh
    input_ids: Tensor
    position_ids: Tensor
    scheme: Scheme = ULYSSES

    @property
    def inputs(self) -> dict[str, Any]:
        """The keywords of the model."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False, "step": self}

    def own(self, x_BlD: Tensor) -> Tensor:
        """(b, l, ...) of what the model gave, without the dummy."""
        rows, length = self.target_Bl.shape
        return x_BlD[:rows, :length]

    def feed(self, x_Bl: Tensor, dummy: int | bool = 0) -> Tensor:
        """(b, l) -> ``fed_shape``: with a dummy token where there is none."""
        rows, length = x_Bl.shape
        return F.pad(x_Bl, (0, self.fed_shape[1] - length, 0, self.fed_shape[0] - rows), value=dummy)


def shard_batch(
    batch: Mapping[str, Tensor],
    mesh: ParallelMesh,
    *,
    lengths: Sequence[int] | None = None,
    sharding: TokenSharding | None = None,
) -> Step:
    """Cut a batch: rows over "dp", the sequence over "sp". Every rank of the mesh has the whole batch.

    One exchange of 8 bytes per pair of ranks makes sure that all ranks cut the same batch in the same way.

    Args:
        batch: what a tokenizer and collator of Transformers give, (B, L) each: ``input_ids``; ``labels`` (the tokens
            themselves if left out), which are shifted here, before the cut, as Transformers does it; or
            ``shift_labels``, shifted already; ``attention_mask`` (0 at padding, left or right); ``position_ids``, 0
            to L - 1 if left out. Where they start anew within a row and there is no mask, documents are packed, as
            in Transformers: each attends to itself, in models that look for it.
        lengths: of the sequence on each "sp" rank, any numbers that add up to L, 0 too. Balanced if left out.
        sharding: in place of lengths: of whole rows over the ranks of "sp", in any order of tokens, e.g. what
            :func:`sp_attention.balance` gives, or ``TokenSharding.zigzag``. Labels, positions, padding and documents
            are those of the sequence itself.

    Raises:
        GroupError: on every rank: tensors of other shapes, unknown names, lengths that do not add up, a sharding of
            another batch or number of ranks, a mesh with tensor parallelism, or ranks with other batches.
    """
    return agreed_by_ranks(
        lambda: _facts_and_step(batch, mesh, lengths, sharding), torch.device(mesh.dense.device_type), everyone()
    )


def _facts_and_step(
    batch: Mapping[str, Tensor], mesh: ParallelMesh, lengths: Sequence[int] | None, sharding: TokenSharding | None
) -> tuple[str, Step]:
    if problem := _problem(batch, mesh):
        raise ValueError(problem)
    whole = _whole(batch)
    facts, part = facts_and_part(whole, mesh, lengths, sharding, everyone())
    fed_rows, fed_length = (max(size, 1) for size in part.batch.token_Bl.shape)
    unfed = Step(
        target_Bl=part.batch.fields["target"],
        real_Bl=part.batch.real_Bl,
        sharding=part.sharding,
        tokens_of_experts=part.moe["sharding"],
        fed_shape=(fed_rows, fed_length),
        padding_options=part.attention,
        packed_options={**part.attention, **_documents(whole, part.sharding.batch, mesh)},
        mesh=mesh,
        input_ids=part.batch.token_Bl,
        position_ids=part.batch.position_Bl,
    )
    return facts, _fed(unfed)


def gather_sequence(x_BlD: Tensor, step: Step) -> Tensor:
    """The whole on every rank, e.g. of logits: (b, l, ...) as the model gave it -> (B, L, ...). One collective, one
    more in backward, which sums each token's gradient over the ranks.

    Raises:
        ValueError: a shape that is not that of ``step.inputs``.
    """
    if tuple(x_BlD.shape[:2]) != step.fed_shape:
        raise ValueError(
            f"a tensor of shape {tuple(x_BlD.shape)} of a step whose inputs are {step.fed_shape}; pass what the "
            "model gave for them, e.g. out.logits"
        )
    return gather_tokens(step.own(x_BlD), sharding=step.sharding, group=everyone())


def _fed(step: Step) -> Step:
    fields = {name: getattr(step, name) for name in Step.__slots__}
    fed = {name: step.feed(fields[name]) for name in ("input_ids", "position_ids")}
    return Step(**{**fields, **fed})


def _problem(batch: Mapping[str, Tensor], mesh: ParallelMesh) -> str:
    if mesh.dense.size(2) > 1:
        return f"the mesh has tp = {mesh.dense.size(2)}, and Transformers' models are not cut over tp here; use tp=1"
    unknown = sorted(name for name, x in batch.items() if x is not None and name not in TENSORS)
    if unknown or batch.get("input_ids") is None:
        return f"a batch of {sorted(batch)}; it has to have input_ids, and of others only {', '.join(TENSORS[1:])}"
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2:
        return f"input_ids are {shape}; they have to be (B, L)"
    for name in TENSORS:
        x = batch.get(name)
        if x is not None and tuple(x.shape) not in ((shape, (1, shape[1])) if name == "position_ids" else (shape,)):
            return f"{name} is {tuple(x.shape)}; it has to be (B, L) = {shape}, of the whole batch"
    return ""


def _whole(batch: Mapping[str, Tensor]) -> Batch:
    """All rows, in our words."""
    mask_BL, position_BL = batch.get("attention_mask"), batch.get("position_ids")
    target_BL = batch.get("shift_labels")
    if target_BL is None:
        label_BL = batch.get("labels")
        target_BL = F.pad(batch["input_ids"] if label_BL is None else label_BL, (0, 1), value=IGNORED)[:, 1:]
    return Batch(
        token_BL=batch["input_ids"],
        position_BL=None if position_BL is None else position_BL.expand(batch["input_ids"].shape),
        attention_mask=None if mask_BL is None else mask_BL.bool(),
        # Targets of a Batch end at padding. Transformers counts what a pad before the first token has to predict.
        fields={"target": target_BL.to(torch.int64)},
    )


def _documents(whole: Batch, rows: Partition, mesh: ParallelMesh) -> dict[str, Tensor]:
    """Options for packed documents of this "dp" rank, as Transformers finds them: no mask, and a position that does
    not follow the one before."""
    piece = mesh.dense.get_local_rank("dp")
    if whole.attention_mask is not None or whole.position_BL is None or not rows.sizes[piece]:
        return {}
    position_BL = whole.position_BL.narrow(0, rows.offsets[piece], rows.sizes[piece])
    starts_BL = torch.zeros_like(position_BL, dtype=torch.bool)
    starts_BL[:, 1:] = position_BL.diff(dim=1) != 1
    if not bool(starts_BL.any()):
        return {}
    if len(starts_BL) == 1:
        first_N = starts_BL[0].nonzero().flatten().cpu()
        return {"cu_seqlens": F.pad(F.pad(first_N, (1, 0)), (0, 1), value=starts_BL.shape[1])}
    document_BL = starts_BL.cumsum(1)
    return {"attn_mask": document_BL[:, None, :, None] == document_BL[:, None, None, :]}
