"""Bugs that this field has shipped: functions from the right code to the wrong one, for ``mutants.py`` only."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sp_attention import Batch, MeanLoss, ShardedBatch
from sp_attention.attend.documents import Documents
from sp_attention.batch.shard import CompletedBatch
from sp_attention.blocks.pieces import Piece
from sp_attention.call.call_inputs import Inputs
from sp_attention.call.inputs import AttentionInputs
from sp_attention.call.options import Given as GivenOptions
from sp_attention.spread.backward import Backward
from sp_attention.spread.moves import Part, Side
from sp_attention.work.plan import RankWork
from sp_attention.work.runs import Runs
from sp_attention.work.scheme import Keys

from .... import GroupedExperts, MoE, TokenSharding, TopKRouter
from ....layer.given import Given
from ....plan.planner import Plan
from ....plan.terms import Terms
from ....wire.agreement import Statement

Right = Callable[..., Any]
Wrong = Callable[..., Any]


def offset_without_batch(_right: Right) -> Wrong:
    def global_token(sharding: TokenSharding, local_token: Tensor, rank: int) -> Tensor:
        return local_token + rank * sharding.local_sizes[rank]

    return global_token


def padded_length_offset(_right: Right) -> Wrong:
    def global_token(sharding: TokenSharding, local_token: Tensor, rank: int) -> Tensor:
        length, ranks = max(sharding.places.lengths.sizes), len(sharding.held)
        return (local_token // length) * (length * ranks) + (rank % ranks) * length + local_token % length

    return global_token


def weights_twice(right: Right) -> Wrong:
    def forward(experts: GroupedExperts, x_MD: Tensor, rows_per_expert_e: Tensor, weight_M: Tensor) -> Tensor:
        return right(experts, x_MD, rows_per_expert_e, weight_M * weight_M)

    return forward


def gradients_averaged(_right: Right) -> Wrong:
    return lambda module, factor: None  # FSDP's own factor is the number of ranks


def positions_from_zero(right: Right) -> Wrong:
    def positions(sharding: TokenSharding, rank: int, device: torch.device | str = "cpu") -> Tensor:
        position_t = right(sharding, rank, device)
        return position_t - position_t.min() if len(position_t) else position_t

    return positions


def positions_of_contiguous_shards(_right: Right) -> Wrong:
    def positions(sharding: TokenSharding, rank: int, device: torch.device | str = "cpu") -> Tensor:
        (_, start), (rows, length) = sharding.first(rank), sharding.extent(rank)
        position_l = torch.arange(start, start + length, device=device)
        return position_l.repeat(rows) if sharding.order == "BL" else position_l.repeat_interleave(rows)

    return positions


def stale_plan(right: Right) -> Wrong:
    first_plans: dict[int, Plan] = {}

    def plan(moe: MoE, scores_BlE: Tensor, given: Given, terms: Terms) -> Plan:
        if id(moe) not in first_plans:
            first_plans[id(moe)] = right(moe, scores_BlE, given, terms)
        return first_plans[id(moe)]

    return plan


def weights_without_gradient(right: Right) -> Wrong:
    return lambda router, scores_BlE, expert_BlK: right(router, scores_BlE.detach(), expert_BlK)


def bias_in_weights(right: Right) -> Wrong:
    def weigh(router: TopKRouter, scores_BlE: Tensor, expert_BlK: Tensor) -> Tensor:
        return right(router, scores_BlE + router.expert_bias_E, expert_BlK)

    return weigh


def weights_in_bfloat16(right: Right) -> Wrong:
    def weigh(router: TopKRouter, scores_BlE: Tensor, expert_BlK: Tensor) -> Tensor:
        return right(router, scores_BlE, expert_BlK).bfloat16().to(scores_BlE.dtype)

    return weigh


def gather_without_sum(right: Right) -> Wrong:
    def exchange(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        parts = list(right(rows.detach(), sent, received, group).split(list(received)))
        parts[group.rank()] = rows[: sent[0]]  # every rank gets the same rows
        return torch.cat(parts)

    return exchange


def balance_of_the_shard(_right: Right) -> Wrong:
    return lambda count, group: None  # counts of the rank's own tokens only


def exchange_transposed(right: Right) -> Wrong:
    def output_to_tokens(out_BLnH: Tensor, inputs: AttentionInputs, statement: Statement) -> Tensor:
        out_BlNH = right(out_BLnH, inputs, statement)
        return out_BlNH.transpose(1, 2).reshape(out_BlNH.shape)

    return output_to_tokens


def zero_key_unmasked(right: Right) -> Wrong:
    def attend(attend: Any, q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, options: Mapping[str, Any]) -> Tensor:
        padded = (F.pad(x_BLgH, (0, 0, 0, 0, 1, 0)) for x_BLgH in (k_BLgH, v_BLgH))
        return right(attend, q_BLnH, *padded, options)

    return attend


def padding_attended(_right: Right) -> Wrong:
    return lambda documents: tuple(pairwise(documents.starts))


def mask_of_local_length(right: Right) -> Wrong:
    def attend(attend: Any, q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, options: Mapping[str, Any]) -> Tensor:
        seen_BL = (torch.arange(k_BLgH.shape[1]) < k_BLgH.shape[1] // 2).expand(len(k_BLgH), -1)
        return right(attend, q_BLnH, k_BLgH, v_BLgH, {**options, "key_padding_mask": seen_BL})

    return attend


def window_of_local_length(right: Right) -> Wrong:
    def attend(attend: Any, q_BLnH: Tensor, k_BLgH: Tensor, v_BLgH: Tensor, options: Mapping[str, Any]) -> Tensor:
        local = k_BLgH.shape[1] // 4
        kept = {name: value for name, value in options.items() if name != "window" or value[0] < local}
        return right(attend, q_BLnH, k_BLgH, v_BLgH, kept)

    return attend


def kv_heads_rolled(right: Right) -> Wrong:
    return lambda heads, x_BlGH: right(heads, x_BlGH.roll(1, dims=2))


def lse_left_out(_right: Right) -> Wrong:
    def merge(out_BnLH: Tensor, lse_BnL: Tensor, part_BnLH: Tensor, part_lse_BnL: Tensor) -> None:
        out_BnLH += part_BnLH
        lse_BnL.copy_(torch.logaddexp(lse_BnL, part_lse_BnL))

    return merge


def closed_row_believed(right: Right) -> Wrong:
    def merge(out_BnLH: Tensor, lse_BnL: Tensor, part_BnLH: Tensor, part_lse_BnL: Tensor) -> None:
        # What torch's CPU kernel says of such a row.
        right(out_BnLH, lse_BnL, part_BnLH, part_lse_BnL.masked_fill(part_lse_BnL == -torch.inf, 0.0))

    return merge


def remote_dkv_dropped(right: Right) -> Wrong:
    def part(
        backward: Backward, side: Side, turn: int, grads: Sequence[Tensor], homes: Sequence[Tensor]
    ) -> Part:  # they travel all the same
        is_of_keys = side is backward.moves.keys
        return right(backward, side, turn, [grad * (not is_of_keys) for grad in grads], homes)

    return part


def block_twice(right: Right) -> Wrong:
    def tiles(block: Piece, chunk: int) -> Iterator[Piece]:
        for tile in right(block, chunk):
            yield from [tile] * (2 if tile.k_place == 0 else 1)

    return tiles


def padding_attended_in_ring(right: Right) -> Wrong:
    def work_of(inputs: Inputs, given: GivenOptions, documents: Documents | None, *, at_once: bool) -> RankWork:
        if documents is not None and inputs.scheme.keys is Keys.RING:
            documents = replace(documents, ends=documents.starts)
        return right(inputs, given, documents, at_once=at_once)

    return work_of


def chunk_border_off_by_one(right: Right) -> Wrong:
    def in_blocks(runs: Runs, most: int) -> list[Runs]:
        blocks: list[Runs] = right(runs, most)
        return blocks[:1] + [((start + 1, stop), *rest) for (start, stop), *rest in blocks[1:]]

    return in_blocks


def labels_shifted_in_shard(right: Right) -> Wrong:
    def part(completed: CompletedBatch, batch: Batch, sharding: TokenSharding, rank: int) -> ShardedBatch:
        sharded = right(completed, batch, sharding, rank)
        target_Bl = torch.full_like(sharded.target_Bl, batch.ignore_index)
        target_Bl[:, :-1] = sharded.token_Bl[:, 1:]
        # The targets of a Transformers model are a field, as they are shifted before.
        fields = {name: target_Bl if name == "target" else x for name, x in sharded.fields.items()}
        return replace(sharded, target_Bl=target_Bl, fields=fields)

    return part


def loss_averaged_per_rank(right: Right) -> Wrong:
    def mean(
        loss_sum: Tensor,
        count: int | Tensor,
        problem: str,
        group: dist.ProcessGroup,
        num_targets: int | Tensor | None,
    ) -> MeanLoss:
        found = right(loss_sum, count, problem, group, num_targets)
        return replace(found, share=found.share * (found.num_targets / (max(int(count), 1) * group.size())))

    return mean
