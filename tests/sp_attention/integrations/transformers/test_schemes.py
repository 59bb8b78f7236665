"""Transformers' models whose attention is spread in other schemes than Ulysses, against one process."""

from unittest import mock

import pytest
import torch

from moe_dispatch import TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Scheme
from sp_attention.integrations.transformers import Parallel, attention
from tests.support.ranks import refusal
from tests.support.transformers.cases import Layout, batch_of, differences, on_one_process, over_ranks
from tests.support.transformers.models import new_model
from tests.support.transformers.strict import strict_float64

STRICT = 1e-12
ZIGZAG = TokenSharding.zigzag(batch=2, length=33, ranks=4)
LAYOUTS = (
    Layout(1, 4, 4, None, ZIGZAG, Scheme.gather()),
    Layout(1, 4, 4, (17, 1, 15, 0), None, Scheme.two_dimensional(head_ranks=2, keys="ring", chunk=7)),
    Layout(2, 2, 4, (33, 0), None, Scheme.ring()),
)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("kind", ["left", "packed"])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_logits_loss_and_gradients(rank_threads: RankThreads, name: str, kind: str) -> None:
    spy = mock.patch.object(attention, "attention_over_ranks", wraps=attention.attention_over_ranks)
    with strict_float64(), spy as called:
        batch = batch_of(kind)
        reference = on_one_process(name, torch.float64, batch)
        for layout in LAYOUTS:
            for run in rank_threads.run(over_ranks, layout.ranks, name, torch.float64, batch, layout):
                assert max(differences(run, reference, batch.get("attention_mask")).values()) <= STRICT
            # Contiguous shards in Ulysses would have the same result: the schemes reached the calls.
            assert {call.kwargs["scheme"] for call in called.call_args_list} == {layout.scheme}
            called.reset_mock()


def refused(rank: int) -> list[str]:
    parallel = Parallel(sp=2, device_type="cpu")
    schemes = (Scheme.two_dimensional(head_ranks=3), "ring", Scheme.ring() if rank else Scheme.gather())
    return [refusal(lambda s=s: parallel.apply(new_model("qwen3_moe", torch.float32), scheme=s)) for s in schemes]  # type: ignore[arg-type]


def test_a_scheme_that_cannot_be_is_refused_on_every_rank(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(refused, 2)
    assert first == second
    for text, words in zip(first, ("head_ranks has to divide", "pass a Scheme", "ranks disagree"), strict=True):
        assert words in text
