"""Known bugs put in on purpose: the run must then fail, and say which quantity differs.

That is how we know that the comparison can fail. Each mutant replaces one function, in the ranks, while a row runs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

from sp_attention.work.scheme import Keys

from ..config.spreading import CU_SEQLENS, MASK
from ..rows import Row
from . import known_bugs as bugs


def _anywhere(_row: Row) -> bool:
    return True


def _cut(row: Row) -> bool:
    return row.layout.sp * row.layout.tp > 1


def _tensor_parallel(row: Row) -> bool:
    return row.layout.tp > 1


def _attention_cut(row: Row) -> bool:
    return row.layout.sp > 1 and not row.one_head and row.spreading.is_ulysses


def _in_blocks(row: Row) -> bool:
    return row.layout.sp > 1 and row.layout.seq > 1 and not row.spreading.is_ulysses


def _closed_in_a_block(row: Row) -> bool:
    return _in_blocks(row) and row.spreading.documents_as == MASK


def _in_chunks(row: Row) -> bool:
    return _in_blocks(row) and row.spreading.scheme.chunk < row.layout.seq


def _padded_in_a_ring(row: Row) -> bool:
    return _padded(row) and row.layout.sp > 1 and row.spreading.scheme.keys is Keys.RING


def _windowed(row: Row) -> bool:
    return row.layout.sp > 1 and 0 <= row.layout.window < row.layout.seq and row.spreading.is_ulysses


def _in_another_order(row: Row) -> bool:
    return row.layout.places_in_order < row.layout.seq


def _padded(row: Row) -> bool:
    """With padding that attention knows of, and that breaks nothing off where it is attended to, as NaN does."""
    is_known = row.spreading.documents_as == CU_SEQLENS and not row.spreading.nan_padding
    return is_known and any(tokens < places for tokens, places in row.layout.documents)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One known bug.

    Attributes:
        name: what ``--mutant`` calls it.
        description: what it does wrong.
        target: the function, or property, it replaces: "module:name".
        wrong: takes the right function, gives the wrong one.
        shows_in: the rows in which it can show at all.
    """

    name: str
    description: str
    target: str
    wrong: Callable[[bugs.Right], bugs.Wrong]
    shows_in: Callable[[Row], bool]


@contextmanager
def mutated(name: str) -> Iterator[list[str]]:
    """With this mutant in place in this process; nothing for an empty name. Gets its name when it runs first.

    Raises:
        ValueError: no such mutant.
    """
    ran: list[str] = []
    if not name:
        yield ran
        return
    if name not in MUTANTS:
        raise ValueError(f"there is no mutant {name!r}; the mutants are {', '.join(MUTANTS)}")
    mutant = MUTANTS[name]
    path, _, attribute = mutant.target.replace(":", ".").rpartition(".")
    owner: Any = resolve_name(path)
    right = getattr(owner, attribute)
    wrong = mutant.wrong(right)

    def noted(*args: Any, **kwargs: Any) -> Any:
        if not ran:
            ran.append(name)
        return wrong(*args, **kwargs)

    with patch.object(owner, attribute, property(noted) if isinstance(right, property) else noted):
        yield ran


# fmt: off
_TABLE = (
    ("offset-without-batch", "global token = local token + rank * local tokens",
     "moe_dispatch.layout.sharding:TokenSharding.global_token", bugs.offset_without_batch, _cut),
    ("padded-length-offset", "rows told apart by the longest shard's length, on shards that are not padded",
     "moe_dispatch.layout.sharding:TokenSharding.global_token", bugs.padded_length_offset, _cut),
    ("weights-twice", "routing weights applied twice",
     "moe_dispatch.layer.experts:GroupedExperts.forward", bugs.weights_twice, _anywhere),
    ("gradients-averaged", "gradients averaged over ranks instead of summed",
     "torch.distributed.fsdp:FSDPModule.set_gradient_divide_factor", bugs.gradients_averaged, _anywhere),
    ("positions-from-zero", "rotary positions start at 0 in each shard",
     "moe_dispatch.layout.sharding:TokenSharding.positions", bugs.positions_from_zero, _cut),
    ("contiguous-positions", "zigzag or striped positions taken for those of contiguous shards",
     "moe_dispatch.layout.sharding:TokenSharding.positions", bugs.positions_of_contiguous_shards, _in_another_order),
    ("stale-plan", "each MoE layer keeps the plan of its first step",
     "moe_dispatch.layer.moe:MoE._plan", bugs.stale_plan, _anywhere),
    ("weights-without-gradient", "routing weights cut off from the router",
     "moe_dispatch.layer.router:TopKRouter.weigh", bugs.weights_without_gradient, _anywhere),
    ("bias-in-weights", "the balancing bias enters the routing weights",
     "moe_dispatch.layer.router:TopKRouter.weigh", bugs.bias_in_weights, _anywhere),
    ("weights-in-bfloat16", "routing weights rounded to bfloat16",
     "moe_dispatch.layer.router:TopKRouter.weigh", bugs.weights_in_bfloat16, _anywhere),
    ("gather-without-sum", "the backward of gather_tokens keeps this rank's gradient only",
     "moe_dispatch.wire.regions:exchange_rows", bugs.gather_without_sum, _tensor_parallel),
    ("balance-of-the-shard", "the balance loss counts the experts of each shard by itself",
     "moe_dispatch.layer.balance:sum_counts", bugs.balance_of_the_shard, _cut),
    ("exchange-transposed", "the exchange back to tokens mixes positions with heads",
     "sp_attention.call.ulysses:output_to_tokens", bugs.exchange_transposed, _attention_cut),
    ("zero-key-unmasked", "a zero key that fills the sequence up takes softmax weight",
     "sp_attention.call.ulysses:attend_or_zeros", bugs.zero_key_unmasked, _attention_cut),
    ("padding-attended", "padding between packed documents is attended to",
     "sp_attention.attend.documents:Documents.spans", bugs.padding_attended, _padded),
    ("mask-of-local-length", "the mask over keys is built for a shard's length",
     "sp_attention.call.ulysses:attend_or_zeros", bugs.mask_of_local_length, _attention_cut),
    ("window-of-local-length", "a window longer than a shard is taken for none",
     "sp_attention.call.ulysses:attend_or_zeros", bugs.window_of_local_length, _windowed),
    ("kv-heads-rolled", "key/value heads go to the wrong query heads",
     "sp_attention.wire.heads:GroupedHeads.kv_by_rank", bugs.kv_heads_rolled, _attention_cut),
    ("lse-left-out", "blocks of keys added up without their log-sum-exp",
     "sp_attention.blocks.walk:merge", bugs.lse_left_out, _in_blocks),
    ("closed-row-believed", "0 believed as the log-sum-exp of a row without a key in a block",
     "sp_attention.blocks.walk:merge", bugs.closed_row_believed, _closed_in_a_block),
    ("remote-dkv-dropped", "dK and dV of other ranks' blocks dropped",
     "sp_attention.spread.backward:Backward._part", bugs.remote_dkv_dropped, _in_blocks),
    ("block-twice", "the first block of keys counted twice",
     "sp_attention.blocks.walk:tiles", bugs.block_twice, _in_blocks),
    ("padding-attended-in-ring", "padding between packed documents is attended to in ring schemes only",
     "sp_attention.call.spread_call:work_of", bugs.padding_attended_in_ring, _padded_in_a_ring),
    ("chunk-border-off-by-one", "each chunk but the first begins one place late",
     "sp_attention.work.turns:in_blocks", bugs.chunk_border_off_by_one, _in_chunks),
    ("labels-shifted-in-shard", "labels shifted inside each shard, whose last token then has no target",
     "sp_attention.batch.shard:CompletedBatch.part", bugs.labels_shifted_in_shard, _cut),
    ("loss-averaged-per-rank", "the mean over ranks of each rank's mean loss",
     "sp_attention.batch.loss:_mean", bugs.loss_averaged_per_rank, _cut),
)
# fmt: on

MUTANTS: Mapping[str, Mutant] = MappingProxyType(
    {
        name: Mutant(name=name, description=description, target=target, wrong=wrong, shows_in=shows_in)
        for name, description, target, wrong, shows_in in _TABLE
    }
)
