"""What a chunk bounds: memory beyond that of inputs, outputs and gradients does not grow with the sequence."""

import pytest
import torch

from moe_dispatch import TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme, attention_over_ranks
from tests.support.live import LiveBytes
from tests.support.ranks import world

pytestmark = pytest.mark.usefixtures("uncovered")

HEADS, GROUPS, WIDTH = 4, 2, 16
BOUNDED = {"gather": Scheme.gather(chunk=32), "ring": Scheme.ring(chunk=32)}


def memory(rank: int, length: int, scheme: Scheme) -> tuple[int, int]:
    """Bytes of forward beyond the output, and of backward beyond the gradients."""
    sharding = TokenSharding.zigzag(batch=1, length=length, ranks=world().size())
    mine = sharding.local_shape(rank)
    q_BlNH, k_BlGH, v_BlGH = (
        torch.randn(*mine, heads, WIDTH, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)
    )
    grad_BlNH = torch.randn(*mine, HEADS, WIDTH)
    with LiveBytes() as forward:
        out_BlNH = attention_over_ranks(
            q_BlNH, k_BlGH, v_BlGH, sharding=sharding, group=world(), scheme=scheme, is_causal=True
        )
    with LiveBytes() as backward:
        out_BlNH.backward(grad_BlNH)
    return forward.most - out_BlNH.nbytes, backward.most - sum(x.nbytes for x in (q_BlNH, k_BlGH, v_BlGH))


@pytest.mark.parametrize("name", BOUNDED)
def test_a_chunk_bounds_memory(rank_threads: RankThreads, name: str) -> None:
    short, long = (rank_threads.run(memory, 2, length, BOUNDED[name]) for length in (512, 1024))
    growth = [more / less for pair in zip(short, long, strict=True) for less, more in zip(*pair, strict=True)]
    assert max(growth) <= 1.2, (short, long)


def test_without_a_chunk_it_grows_with_the_sequence(rank_threads: RankThreads) -> None:
    short, long = (rank_threads.run(memory, 2, length, Scheme.gather()) for length in (512, 1024))
    growth = [more / less for pair in zip(short, long, strict=True) for less, more in zip(*pair, strict=True)]
    assert min(growth) >= 1.5, (short, long)
