"""What the plan says of memory is what there is: bytes kept until backward, and bytes that arrive at once."""

import pytest
import torch
from torch import Tensor

from moe_dispatch.testing import RankThreads
from sp_attention import attention_over_ranks
from sp_attention.spread.moves import Moves
from sp_attention.work.memory import memory_of
from tests.support.attention.drawn import cases, drawn
from tests.support.attention.whole import Whole
from tests.support.live import LiveBytes
from tests.support.orders import cut_by_loops
from tests.support.planned import sizes, work
from tests.support.ranks import world
from tests.support.schemes import SpreadCase, sampled, schemes
from tests.support.tensors import leaf

pytestmark = pytest.mark.usefixtures("uncovered")

KINDS = ("none", "causal", "window", "padded", "cross causal")


class LiveRows(LiveBytes):
    """Of tensors of rows only: what they travel in is flat."""

    def _made(self, x: Tensor) -> None:
        if x.ndim == 4:
            super()._made(x)


def in_tiles(ranks: int) -> list[SpreadCase]:
    number = -(-2 * len(schemes(ranks)) // len(KINDS))
    some = sampled([case for kind in KINDS for case in drawn(cases(ranks, kind), number, f"kept {ranks} {kind}")])
    return [each for each in some if not each.scheme.is_ulysses(ranks)]


def tensors(rank: int, each: SpreadCase, dtype: torch.dtype) -> list[Tensor]:
    whole, (sharding, kv_sharding) = Whole.of(each.case, dtype), each.shardings
    wholes = ((whole.q_BLNH, sharding), (whole.k_BLGH, kv_sharding), (whole.v_BLGH, kv_sharding))
    return [leaf(cut_by_loops(x, of, rank)) for x, of in wholes]


def kept(rank: int, each: SpreadCase, dtype: torch.dtype) -> int:
    """Bytes of all that autograd saves, but for the tensors of the call."""
    qkv, saved, (sharding, kv_sharding) = tensors(rank, each, dtype), dict[int, int](), each.shardings

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out_BlNH = attention_over_ranks(
            *qkv,
            sharding=sharding,
            kv_sharding=kv_sharding if each.case.kind.startswith("cross") else None,
            group=world(),
            scheme=each.scheme,
            heads=each.heads,
            **Whole.of(each.case, dtype).options,
        )
    for x in (*qkv, out_BlNH):
        saved.pop(x.untyped_storage()._cdata, None)
    return sum(saved.values())


def arriving(rank: int, each: SpreadCase, dtype: torch.dtype) -> int:
    order = each.shardings[0].order
    qkv = [x.detach() if order == "BL" else x.detach().transpose(0, 1) for x in tensors(rank, each, dtype)]
    moves = Moves(work(each, at_once=False).of_rank(rank), world())
    with LiveRows() as live:
        for _ in moves.arrivals(qkv[:1], qkv[1:]):
            pass
    return live.most


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_is_what_the_plan_counts(rank_threads: RankThreads, ranks: int, dtype: torch.dtype) -> None:
    for each in in_tiles(ranks)[dtype == torch.bfloat16 :: 2]:
        of, all_work = sizes(each, dtype.itemsize), work(each, at_once=False)
        planned = [memory_of(all_work, of, rank) for rank in range(ranks)]
        assert rank_threads.run(kept, ranks, each, dtype) == [memory.kept for memory in planned], each
        if not each.scheme.offload:
            assert rank_threads.run(arriving, ranks, each, dtype) == [memory.arriving for memory in planned], each
