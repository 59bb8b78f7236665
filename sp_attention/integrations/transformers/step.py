"""One batch of a Transformers model, cut over all ranks of a mesh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dispatch import ParallelMesh, Partition, TokenSharding, agree, gather_tokens

from ...batch.batch import Batch
from ...batch.shard import fingerprint
from ...batch.shard import shard_batch as shard_rows
from ...parallel.on_mesh import everyone

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


def shard_batch(batch: Mapping[str, Tensor], mesh: ParallelMesh, *, lengths: Sequence[int] | None = None) -> Step:
    """Cut a batch: rows over "dp", the sequence over "sp". Every rank of the mesh has the whole batch.

    Two exchanges of 8 bytes per pair of ranks make sure that all ranks cut the same batch in the same way.

    Args:
        batch: what a tokenizer and collator of Transformers give, (B, L) each: ``input_ids``; ``labels`` (the tokens
            themselves if left out), which are shifted here, before the cut, as Transformers does it; or
            ``shift_labels``, shifted already; ``attention_mask`` (0 at padding, left or right); ``position_ids``, 0
            to L - 1 if left out. Where they start anew within a row and there is no mask, documents are packed, as
            in Transformers: each attends to itself, in models that look for it.
        lengths: of the sequence on each "sp" rank, any numbers that add up to L, 0 too. Balanced if left out.

    Raises:
        GroupError: on every rank: tensors of other shapes, unknown names, lengths that do not add up, a mesh with
            tensor parallelism, or ranks with other batches.
    """
    problem, facts = _problem(batch, mesh, lengths), ""
    if not problem:
        prints = ", ".join(f"{name} {fingerprint(batch[name])}" for name in TENSORS if batch.get(name) is not None)
        facts = f"{prints}, lengths {lengths and tuple(lengths)}, dp = {mesh.dense.size(0)}"
    agree(facts, problem=problem, device=torch.device(mesh.dense.device_type), group=everyone())
    tokens_BL = batch["input_ids"]
    rows, length = tokens_BL.shape
    over_dp, over_sp = Partition.balanced(rows, mesh.dense.size(0)), Partition.balanced(length, mesh.dense.size(1))
    whole = TokenSharding(batch=over_dp, seq=over_sp if lengths is None else Partition(tuple(lengths)))
    piece = mesh.dense.get_local_rank("dp")
    mine = _rows(batch, over_dp.offsets[piece], over_dp.sizes[piece])
    sp_group = mesh.dense.get_group("sp")
    sharded = shard_rows(mine, sharding=TokenSharding(batch=over_dp.sizes[piece], seq=whole.seq), group=sp_group)
    fed_rows, fed_length = (max(size, 1) for size in sharded.token_Bl.shape)
    unfed = Step(
        target_Bl=sharded.fields["target"],
        real_Bl=sharded.real_Bl,
        sharding=whole,
        tokens_of_experts=whole.select(mesh.ep_ranks),
        fed_shape=(fed_rows, fed_length),
        padding_options=sharded.attention,
        packed_options={**sharded.attention, **_documents(batch, mine)},
        mesh=mesh,
        input_ids=sharded.token_Bl,
        position_ids=sharded.position_Bl,
    )
    return _fed(unfed)


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


def _problem(batch: Mapping[str, Tensor], mesh: ParallelMesh, lengths: Sequence[int] | None) -> str:
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
    if lengths is not None and (len(lengths) != mesh.dense.size(1) or sum(lengths) != shape[1] or min(lengths) < 0):
        return (
            f"lengths {tuple(lengths)} for a sequence of {shape[1]} over sp = {mesh.dense.size(1)}; give each rank "
            "of sp a length of at least 0, which add up to that"
        )
    return ""


def _rows(batch: Mapping[str, Tensor], first: int, size: int) -> Batch:
    """The rows of one "dp" rank."""

    tokens_BL = batch["input_ids"].narrow(0, first, size)

    def of_rows(name: str) -> Tensor | None:
        x_BL = batch.get(name)
        return None if x_BL is None else x_BL.expand(batch["input_ids"].shape).narrow(0, first, size)

    target_BL, mask_BL = of_rows("shift_labels"), of_rows("attention_mask")
    if target_BL is None:
        label_BL = of_rows("labels")
        target_BL = F.pad(tokens_BL if label_BL is None else label_BL, (0, 1), value=IGNORED)[:, 1:]
    return Batch(
        token_BL=tokens_BL,
        position_BL=of_rows("position_ids"),
        attention_mask=None if mask_BL is None else mask_BL.bool(),
        # Targets of a Batch end at padding. Transformers counts what a pad before the first token has to predict.
        fields={"target": target_BL.to(torch.int64)},
    )


def _documents(batch: Mapping[str, Tensor], mine: Batch) -> dict[str, Tensor]:
    """Options for packed documents, as Transformers finds them: no mask, and a position that does not follow the one
    before."""
    position_BL = mine.position_BL
    if batch.get("attention_mask") is not None or position_BL is None or not len(position_BL):
        return {}
    starts_BL = torch.zeros_like(position_BL, dtype=torch.bool)
    starts_BL[:, 1:] = position_BL.diff(dim=1) != 1
    if not bool(starts_BL.any()):
        return {}
    if len(starts_BL) == 1:
        first_N = starts_BL[0].nonzero().flatten().cpu()
        return {"cu_seqlens": F.pad(F.pad(first_N, (1, 0)), (0, 1), value=starts_BL.shape[1])}
    document_BL = starts_BL.cumsum(1)
    return {"attn_mask": document_BL[:, None, :, None] == document_BL[:, None, None, :]}
