"""torch.compile with its default backend, in training: the numbers of the same call uncompiled, in every dtype."""

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.internals import digest
from moe_dispatch.testing import RankPool
from sp_attention import ulysses_attention
from sp_attention.call.inputs import AttentionInputs
from sp_attention.call.options import facts_of_call, given_options
from sp_attention.work.scheme import Scheme
from tests.support.compile import untraced
from tests.support.ranks import world
from tests.support.tensors import difference, leaf

SEQ = (3, 2)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}


def sharding() -> TokenSharding:
    return TokenSharding(batch=2, seq=Partition(SEQ))


def is_signalling(half: int) -> bool:
    """Whether these 16 bits are a signalling NaN as bfloat16: a copy through float32 sets bit 6."""
    return half & 0x7F80 == 0x7F80 and half & 0x7F != 0 and not half & 0x40


def scale_with_a_signalling_word(x_BlNH: Tensor) -> float:
    """A scale for which a half of the call's word is such a NaN, if it travels as it is."""
    for step in range(5000):
        scale = 0.2 + step * 1e-4
        given = given_options(
            is_causal=True,
            window=None,
            scale=scale,
            attn_mask=None,
            key_padding_mask=None,
            sinks_N=None,
            dropout_p=0.0,
        )
        inputs = AttentionInputs.of(x_BlNH, x_BlNH, x_BlNH, sharding(), None, None, world(), Scheme.ulysses())
        word = digest(facts_of_call(inputs, given, None))
        if is_signalling(word & 0xFFFF) or is_signalling(word >> 16):
            return scale
    raise AssertionError("no scale has such a word")


@untraced()
def training(rank: int, dtype: torch.dtype) -> list[float]:
    """How far output and gradients are from those of the call that is not compiled."""
    torch._dynamo.reset()
    draw = torch.Generator().manual_seed(rank)
    shards = [torch.randn(2, SEQ[rank], 2, 8, generator=draw).to(dtype) for _ in "qkv"]
    scale = scale_with_a_signalling_word(leaf(shards[0]))

    def attention(q_BlNH: Tensor, k_BlGH: Tensor, v_BlGH: Tensor) -> Tensor:
        return ulysses_attention(
            q_BlNH,
            k_BlGH,
            v_BlGH,
            sharding=sharding(),
            group=world(),
            is_causal=True,
            scale=scale,
        )

    answers = []
    for run in (attention, torch.compile(attention, fullgraph=True)):
        leaves = [leaf(x) for x in shards]
        out_BlNH = run(*leaves)
        answers.append([out_BlNH.detach(), *torch.autograd.grad(out_BlNH.square().sum(), leaves)])
    wanted, got = answers
    return [difference(x, y) for x, y in zip(got, wanted, strict=True)]


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(dtype, marks=pytest.mark.sweep) for dtype in TOLERANCE],  # one is in tests/composed/test_table.py
)
def test_training_with_the_default_backend(rank_pool: RankPool, dtype: torch.dtype) -> None:
    """The word of the call has a signalling NaN in it, as bfloat16. What travels as floats must not change in a copy,
    and must be no constant that the compiler cannot view in another dtype."""
    for differences in rank_pool.run(training, 2, dtype, timeout=600):
        assert max(differences) < TOLERANCE[dtype]
