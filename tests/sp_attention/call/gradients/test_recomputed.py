"""A checkpointed call repeats the collectives of its forward, in one order on every rank."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool
from sp_attention import ulysses_attention
from tests.support.attention.case import Case
from tests.support.attention.sent import Sent, counted
from tests.support.attention.whole import Whole
from tests.support.ranks import world
from tests.support.tensors import grad_of, leaf, share

# ---- cases: what the ranks run -------------------------------------------------------------------------


def recomputed(rank: int, case: Case) -> tuple[list[Sent], list[Sent], list[str]]:
    """The collectives of a checkpointed call, those of a plain one, and what differs from it."""
    whole = Whole.of(case, torch.float64)
    sharding = TokenSharding(batch=case.batch, seq=Partition(case.seq))
    parts = [share(x, case.seq, "BL", rank) for x in (whole.q_BLNH, whole.k_BLGH, whole.v_BLGH)]
    heads = Partition(case.head_sizes)
    grad_BlNH = share(whole.grad_BLNH, case.seq, "BL", rank)

    def attention(*qkv: Tensor) -> Tensor:
        q_BlNH, k_BlGH, v_BlGH = (x * 2 for x in qkv)
        return ulysses_attention(
            q_BlNH, k_BlGH, v_BlGH, sharding=sharding, group=world(), heads=heads, is_causal=True, dropout_p=0.3
        )

    def grads(run: Callable[..., Tensor]) -> tuple[list[Sent], list[Tensor]]:
        leaves = [leaf(x) for x in parts]
        torch.manual_seed(3)
        with counted() as sent:
            run(*leaves).backward(grad_BlNH)
        return sent, [grad_of(x) for x in leaves]

    plain, wanted = grads(attention)
    again, got = grads(lambda *qkv: checkpoint(attention, *qkv, use_reentrant=False))
    return again, plain, [name for name, a, b in zip("qkv", got, wanted, strict=True) if not torch.equal(a, b)]


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(2, 2), (4, 0), (1, 3)])
@pytest.mark.parametrize("seq", [(3, 2), (0, 5)])
def test_recomputation_repeats_the_forward(rank_pool: RankPool, seq: tuple[int, ...], heads: tuple[int, ...]) -> None:
    """Invariant 8, in one order on every rank: what one sends, the other expects. Dropout falls on the same
    weights."""
    case = Case(ranks=2, kind="none", batch=2, seq=seq, kv_seq=seq, num_heads=(4, 2), widths=(6, 4), heads=heads)
    results = rank_pool.run(recomputed, 2, case)
    assert [failures for _, _, failures in results] == [[], []]
    for again, plain in [(again, plain) for again, plain, _ in results]:
        assert len(plain) == 4
        assert again[:2] == plain[:2]
        assert sorted(again[2:], key=repr) == sorted(plain[: len(again) - 4] + plain[2:], key=repr)
    everywhere = [again for again, _, _ in results]
    for one, other in zip(*everywhere, strict=True):
        assert (one.to[1], one.back[1]) == (other.back[0], other.to[0])
