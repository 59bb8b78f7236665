"""A mistake of one rank in a plan by counts is the same error on every rank, and the ranks work on. What ranks
believe about tokens, K and widths does not change what they send first."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch

from moe_dispatch import DisagreementError, GroupError, Partition, RankMistakeError, TokenSharding
from moe_dispatch.plan import counted
from moe_dispatch.plan.counts.facts import MOST_TOKENS, CountsFacts, message_steps
from moe_dispatch.plan.terms import Terms
from moe_dispatch.testing import RankPool, RankThreads
from tests.support.dispatch.plan_calls import Call, Mistake, good_call, works
from tests.support.ranks import refusal

pytestmark = pytest.mark.usefixtures("uncovered")


def call_of(rank: int, ranks: int) -> Call:
    """B = 2, L = 3 and 1 in turns; two experts a rank; K = 2."""
    sharding = TokenSharding(batch=2, seq=Partition((3, 1, 0, 2) * (ranks // 4)))
    shape = (*sharding.local_shape(rank), 2)
    ids_BlK = torch.arange(shape[0] * shape[1] * 2).view(shape) % (2 * ranks)
    return Call(ids_BlK, torch.full(shape, 0.5), 4, sharding, Partition((2,) * ranks))


def id_too_big(call: Call) -> Call:
    return replace(call, ids=call.ids.index_put((torch.tensor(0),) * 3, torch.tensor(1000)))


def nan_weight(call: Call) -> Call:
    return replace(call, weight=call.weight * torch.nan)


def float_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.float())


def list_of_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.tolist(), weight=None)


def flat_ids(call: Call) -> Call:
    return replace(call, ids=call.ids.flatten(0, 1))


def five_choices(call: Call) -> Call:
    return replace(call, ids=call.ids.repeat(1, 1, 3)[..., :5], weight=None)


def another_dim(call: Call) -> Call:
    return replace(call, dim=5)


def other_tokens(call: Call) -> Call:
    """The peers believe in shards of other sizes than this rank does."""
    seq = Partition((call.sharding.seq.sizes[0] + 1, *call.sharding.seq.sizes[1:]))
    ids = torch.zeros(2, 4, 2, dtype=torch.int64)
    return replace(call, sharding=TokenSharding(batch=2, seq=seq), ids=ids, weight=None)


def many_more_tokens(call: Call) -> Call:
    sharding = TokenSharding(batch=2, seq=Partition((100,) * call.sharding.num_ranks))
    return replace(call, sharding=sharding, ids=torch.zeros(2, 100, 2, dtype=torch.int64), weight=None)


def other_experts(call: Call) -> Call:
    """As many, but not two on each rank."""
    sizes = call.experts.sizes
    return replace(call, experts=Partition((3, 1, *sizes[2:])))


def error_of(call: Callable[[], object]) -> tuple[type, str]:
    with pytest.raises(GroupError) as error:
        call()
    return type(error.value), str(error.value)


def with_mistake(rank: int, ranks: int, mistake: Mistake) -> tuple[type, str, bool]:
    """What rank 0's mistake is everywhere, and whether a right plan follows."""
    call = call_of(rank, ranks)
    kind, text = error_of((mistake(call) if rank == 0 else call).plan)
    plan = call.plan()
    return kind, text, plan.rows_sent[rank] == plan.rows_received[rank]


OF_ONE_RANK: list[tuple[Mistake, str]] = [
    (id_too_big, "rank 0: expert id 1000 at local token 0, choice 0; ids are 0 to "),
    (nan_weight, "rank 0: the weight at local token 0, choice 0 is NaN; "),
    (float_ids, "rank 0: expert ids are torch.float32; they have to be a torch.int64 or torch.int32 tensor"),
    (list_of_ids, "rank 0: expert ids are <class 'list'>; they have to be"),
    (flat_ids, "rank 0: expert ids of shape (6, 2); its shard in order 'BL' is (2, 3)"),
]
BELIEFS: list[tuple[Mistake, str]] = [
    (five_choices, "K = 5, dim = 4"),
    (another_dim, "K = 2, dim = 5"),
    (other_tokens, "seq=Partition(sizes=(4, 1, 0, 2"),
    (many_more_tokens, "seq=Partition(sizes=(100, 100"),
    (other_experts, "experts = (3, 1, 2, "),
]


@pytest.mark.parametrize(("mistake", "text"), OF_ONE_RANK, ids=[mistake.__name__ for mistake, _ in OF_ONE_RANK])
@pytest.mark.parametrize("ranks", [16])
def test_what_one_rank_has_wrong_is_told_on_all(
    rank_threads: RankThreads, ranks: int, mistake: Mistake, text: str
) -> None:
    kinds, texts, right = zip(*rank_threads.run(with_mistake, ranks, ranks, mistake), strict=True)
    assert set(kinds) == {RankMistakeError}
    assert len(set(texts)) == 1
    assert texts[0].startswith(text)
    assert all(right)


@pytest.mark.parametrize(("mistake", "text"), BELIEFS, ids=[mistake.__name__ for mistake, _ in BELIEFS])
def test_ranks_that_believe_in_other_things_are_told_what(
    rank_threads: RankThreads, mistake: Mistake, text: str
) -> None:
    kinds, texts, right = zip(*rank_threads.run(with_mistake, 16, 16, mistake), strict=True)
    assert set(kinds) == {DisagreementError}
    assert len(set(texts)) == 1
    assert texts[0].startswith("the ranks disagree about one call (rank [0]: ")
    assert text in texts[0].partition("; ranks [1, ")[0]
    assert all(right)


def in_processes(rank: int) -> tuple[str, str, bool]:
    """Two mistakes of rank 1 of three, which plan by counts as if they were many."""
    with mock.patch.object(counted, "counts_cost_less", return_value=True):
        call = good_call(rank)
        sharding = TokenSharding(batch=2, seq=Partition((3, 4, 3)))
        others = replace(call, sharding=sharding, ids=torch.zeros(2, 4, 2, dtype=torch.int64), weight=None)
        texts = [refusal((wrong if rank == 1 else call).plan) for wrong in (list_of_ids(call), others)]
        return texts[0], texts[1], works(rank)


def test_processes_are_told_too_and_work_on(rank_pool: RankPool) -> None:
    (first, second, right), *others = rank_pool.run(in_processes, 3)
    assert others == [(first, second, right)] * 2
    assert right
    assert first.startswith("rank 1: expert ids are <class 'list'>")
    assert second.startswith("the ranks disagree about one call (ranks [0, 2]: K = 2, dim = 4, ")


def test_messages_have_one_size_up_to_6_experts_on_a_rank_and_are_whole_vectors() -> None:
    assert [message_steps(most) for most in (0, 1, 6, 7, 14, 15, 256)] == [8, 8, 8, 16, 16, 32, 512]


def test_more_tokens_than_4_bytes_can_number_are_refused() -> None:
    sharding = TokenSharding(batch=1, seq=Partition((MOST_TOKENS, *[0] * 14, 1)))
    terms = Terms(sharding=sharding, experts=Partition((1,) * 16), dim=1)
    assert refusal(lambda: CountsFacts.of(terms, 3, 1, torch.device("cpu"))) == (
        "2147483648 tokens in one plan over 16 ranks; their numbers travel in 4 bytes, so plan for at most "
        "2147483647 at once"
    )
