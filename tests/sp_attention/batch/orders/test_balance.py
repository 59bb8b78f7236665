"""balance: pairs of a query and a key counted by loops, and the documents that it cannot take."""

import random
from itertools import accumulate

import pytest
import torch

from moe_dispatch import TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import Batch, balance, shard_batch
from tests.support.orders import tokens_by_loops
from tests.support.ranks import refusal, world


def pairs_of_ranks(sharding: TokenSharding, spans: list[tuple[int, int]]) -> list[int]:
    """Token by token: how many keys of its document are not later than it."""
    keys_of_place = {place: place - start + 1 for start, stop in spans for place in range(start, stop)}
    return [sum(keys_of_place.get(place, 0) for _, place in mine) for mine in tokens_by_loops(sharding)]


def cumulated(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def spans_of(lengths: list[int], gaps: list[int]) -> list[tuple[int, int]]:
    starts = [0, *accumulate(length + gap for length, gap in zip(lengths, gaps, strict=True))]
    return [(start, start + length) for start, length in zip(starts, lengths, strict=False)]


def balanced(lengths: list[int], gaps: list[int], tail: int, ranks: int) -> tuple[TokenSharding, list[int]]:
    starts = [0, *accumulate(length + gap for length, gap in zip(lengths, gaps, strict=True))]
    sharding = balance(cumulated(lengths), ranks, length=starts[-1] + tail, cu_seqlens_padded=torch.tensor(starts))
    return sharding, pairs_of_ranks(sharding, spans_of(lengths, gaps))


def excess(values: list[int]) -> float:
    """The largest over the mean, less 1."""
    return max(values) * len(values) / max(sum(values), 1) - 1


LENGTHS = {
    "one document": [4096],
    "equal documents": [512] * 8,
    "a long one and short ones": [3000, *[37] * 40],
    "short ones only": [5, 9, 2, 30] * 60,
    "all lengths": list(range(1, 90)),
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LENGTHS)
def test_every_rank_has_as_many_pairs_and_as_many_tokens(name: str, ranks: int) -> None:
    lengths = LENGTHS[name]
    sharding = balance(cumulated(lengths), ranks, length=sum(lengths))
    assert sharding.num_ranks == ranks
    assert excess(pairs_of_ranks(sharding, spans_of(lengths, [0] * len(lengths)))) <= 0.05
    assert excess(list(sharding.local_sizes)) <= 0.05


def test_contiguous_shards_are_not_balanced() -> None:
    """What the check above sees."""
    sharding = TokenSharding.of_runs(batch=1, length=4096, runs=[[(0, 2048)], [(2048, 4096)]])
    assert excess(pairs_of_ranks(sharding, [(0, 4096)])) == pytest.approx(0.5, abs=1e-3)


def test_any_documents_are_balanced_but_for_one_token() -> None:
    """Padding, empty documents and fewer tokens than ranks among them."""
    draw = random.Random(0)
    for _ in range(150):
        ranks, most = draw.randint(1, 6), draw.choice((3, 30, 300))
        lengths = [draw.choice((0, 1, draw.randint(0, most))) for _ in range(draw.randint(1, 12))]
        gaps = [draw.choice((0, 0, draw.randint(0, most))) for _ in lengths]
        _, pairs = balanced(lengths, gaps, draw.choice((0, most)), ranks)
        mean = sum(pairs) / ranks
        assert max(pairs) - mean <= max(0.05 * mean, *lengths, 0), (lengths, gaps, ranks, pairs)


def test_padding_goes_where_tokens_are_few() -> None:
    sharding, pairs = balanced([64], [0], 1000, 4)
    assert max(sharding.local_sizes) - min(sharding.local_sizes) == 0
    assert max(pairs) == min(pairs)


def test_short_documents_stay_whole() -> None:
    lengths = [3000, *[37] * 40]
    sharding = balance(cumulated(lengths), 4, length=sum(lengths))
    runs = [run for rank in range(4) for run in sharding.runs(rank)]
    for start, stop in spans_of(lengths, [0] * len(lengths))[1:]:
        assert any(first <= start and stop <= last for first, last in runs), (start, stop)


def cut(rank: int, batch: Batch, sharding: TokenSharding) -> list[int]:
    return shard_batch(batch, sharding=sharding, group=world()).token_Bl.flatten().tolist()


def test_what_it_gives_is_for_shard_batch(rank_threads: RankThreads) -> None:
    ends = cumulated([9, 4, 6])
    sharding = balance(ends, 3, length=19)
    batch = Batch(token_BL=torch.arange(19)[None], cu_seqlens=ends)
    places = [[place for _, place in mine] for mine in tokens_by_loops(sharding)]
    assert rank_threads.run(cut, 3, batch, sharding) == places
    assert balance(ends, 3, length=19, order="LB") == TokenSharding(
        batch=1, seq=sharding.seq, held=sharding.held, order="LB"
    )


def test_what_cannot_be_is_refused() -> None:
    ends = torch.tensor([0, 3, 7])
    assert refusal(lambda: balance(ends, 0, length=7)) == "ranks is 0; it has to be an int of at least 1"
    assert refusal(lambda: balance(ends, 2, length=-1)) == "length is -1; it has to be an int of at least 0"
    assert "documents end at 7 of a packed sequence of 8 tokens" in refusal(lambda: balance(ends, 2, length=8))
    assert "it has to start at 0 and never fall" in refusal(lambda: balance(ends.flip(0), 2, length=7))
    assert "cu_seqlens is list" in refusal(lambda: balance([0, 7], 2, length=7))  # type: ignore[arg-type]
    assert "cu_seqlens is None" in refusal(lambda: balance(None, 2, length=7))  # type: ignore[arg-type]
