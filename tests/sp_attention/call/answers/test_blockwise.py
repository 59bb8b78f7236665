"""blockwise_attend over ranks: the reference's numbers, and the bits of one rank."""

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankPool, RankThreads
from sp_attention import UlyssesAttention, blockwise_attend, ulysses_attention
from sp_attention.reference import reference_attention
from tests.support.attention.case import Case
from tests.support.attention.drawn import cases_of_ranks
from tests.support.attention.one_process import whole_in_one_process
from tests.support.attention.packed import attended, documents, tensors
from tests.support.attention.whole import Whole, shares_of, shares_of_ulysses, whole_answer
from tests.support.compile import untraced
from tests.support.ranks import world
from tests.support.tensors import TOLERANCE, difference, leaf, same_bits, share

CHUNK = 5


@lru_cache(maxsize=8)
def answer_of(case: Case) -> dict[str, Tensor]:
    return whole_answer(reference_attention, Whole.of(case, torch.float64))


@lru_cache(maxsize=8)
def blocks_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return whole_answer(whole_in_one_process(blockwise_attend(chunk=CHUNK)), Whole.of(case, dtype))


def failures(rank: int, batch: list[Case]) -> list[str]:
    found = []
    for case in batch:
        wanted = shares_of(answer_of(case), rank, case)
        got = shares_of_ulysses(rank, case, Whole.of(case, torch.float64), blockwise_attend(chunk=CHUNK))
        found += [f"{name}: {case}" for name in wanted if not difference(got[name], wanted[name]) <= TOLERANCE]
    return found


def other_bits(rank: int, batch: list[Case], dtype: torch.dtype) -> list[str]:
    found = []
    for case in batch:
        wanted = shares_of(blocks_of(case, dtype), rank, case)
        got = shares_of_ulysses(rank, case, Whole.of(case, dtype), blockwise_attend(chunk=CHUNK))
        found += [f"{name}: {case}" for name in ("out", "dq", "dk", "dv") if not same_bits(got[name], wanted[name])]
    return found


def packed_with_nan(rank: int) -> list[float]:
    """How far each of out, dq, dk and dv is from the reference; NaN between documents."""
    seq, options = (9, 0, 11), documents([7, 0, 9], [8, 1, 11])
    whole = tensors(20)
    poisoned = [x.clone() for x in whole]
    for x in poisoned:
        x[:, 7:9], x[:, 18:] = torch.nan, torch.nan
    got = attended(rank, seq, poisoned, attend=blockwise_attend(chunk=3), window=(4, 0), **options)
    leaves = [leaf(x) for x in whole[:3]]
    out_BLNH = reference_attention(*leaves, window=(4, 0), **options)
    wanted = [out_BLNH.detach(), *torch.autograd.grad(out_BLNH, leaves, whole[3])]
    return [difference(x, share(y, seq, "BL", rank)) for x, y in zip(got, wanted, strict=True)]


@untraced()
def other_ways(rank: int) -> list[str]:
    """Which of these differ from the same call: in one graph, in a checkpoint, of a copy of the module."""
    torch._dynamo.reset()
    seq = (3, 4)
    sharding, keep_BL = TokenSharding(batch=2, seq=Partition(seq)), torch.arange(7).expand(2, -1) != 1
    module = UlyssesAttention(group=world(), attend=blockwise_attend(chunk=2), is_causal=True, window=(3, 0))
    draw = torch.Generator().manual_seed(rank)
    x_BlNH = torch.randn(2, seq[rank], 4, 6, generator=draw, dtype=torch.float64)
    sinks_N = torch.ones(4, dtype=torch.float64)

    def call(q: Tensor, attention: UlyssesAttention = module) -> Tensor:
        kv = q[:, :, :2], q[:, :, 2:] * 2
        return attention(q * 1.5, *kv, sharding=sharding, key_padding_mask=keep_BL, sinks_N=sinks_N)

    ways = {
        "same": call,
        "one graph": torch.compile(call, fullgraph=True, backend="aot_eager"),
        "checkpoint": lambda q: checkpoint(call, q, use_reentrant=False),
        "copy": lambda q: call(q, copy.deepcopy(module)),
    }
    answers = {}
    for name, way in ways.items():
        q = leaf(x_BlNH)
        out = way(q)
        answers[name] = [out.detach(), *torch.autograd.grad(out.square().sum(), q)]
    return [name for name, got in answers.items() if max(map(difference, got, answers["same"])) > TOLERANCE]


def wrong_options(rank: int) -> str:
    """Told where one rank means another window."""
    x_BlNH = torch.zeros(1, (2, 3)[rank], 2, 4)
    sharding = TokenSharding(batch=1, seq=Partition((2, 3)))
    with pytest.raises(ValueError, match="disagree") as error:
        ulysses_attention(
            x_BlNH, x_BlNH, x_BlNH, sharding=sharding, group=world(), attend=blockwise_attend(), window=(rank, 0)
        )
    return str(error.value)


# ---- what the tests ask --------------------------------------------------------------------------------


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_the_reference(rank_threads: RankThreads, ranks: int) -> None:
    assert rank_threads.run(failures, ranks, cases_of_ranks(ranks, 1)) == [[]] * ranks


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(("ranks", "dtype"), [(2, torch.float32), (3, torch.bfloat16)])
def test_the_bits_do_not_depend_on_the_number_of_ranks(
    rank_threads: RankThreads, ranks: int, dtype: torch.dtype
) -> None:
    """Where no two ranks share a key/value head."""
    batch = [case for case in cases_of_ranks(ranks, 1) if not case.shares_a_kv_head]
    assert rank_threads.run(other_bits, ranks, batch, dtype) == [[]] * ranks


def test_packed_documents(rank_threads: RankThreads) -> None:
    for differences in rank_threads.run(packed_with_nan, 3):
        assert max(differences) < TOLERANCE


def test_one_graph_checkpoints_and_copies(rank_pool: RankPool) -> None:
    assert rank_pool.run(other_ways, 2, timeout=120) == [[], []]


def test_ranks_that_mean_other_options_are_told(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(wrong_options, 2)
    assert first == second
