"""Transformers' models over ranks that hold any order of tokens are the same model on one process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.testing import RankThreads
from sp_attention import balance
from sp_attention.integrations.transformers import Parallel
from tests.support.orders import cut_by_loops
from tests.support.ranks import refusal
from tests.support.transformers.cases import IGNORED, Layout, batch_of, differences, on_one_process, over_ranks
from tests.support.transformers.models import CONFIGS, FAMILIES
from tests.support.transformers.strict import strict_float64

pytestmark = pytest.mark.usefixtures("uncovered")

STRICT = 1e-12
KINDS = ("plain", "left", "right", "packed")


def drawn(rows: int) -> TokenSharding:
    """Pieces out of order, an empty one, and a rank without tokens."""
    return TokenSharding(batch=rows, seq=Partition((9, 0, 5, 12, 7)), held=((3, 0), (), (4, 1), (2,)))


def zigzag(rows: int, ranks: int) -> TokenSharding:
    return TokenSharding.zigzag(batch=rows, length=33, ranks=ranks)


def striped(rows: int) -> TokenSharding:
    return TokenSharding.striped(batch=rows, length=33, ranks=2, stripe=5)


LAYOUTS = (
    Layout(1, 4, 4, None, zigzag(2, 4)),
    Layout(2, 2, 2, None, striped(2)),  # experts twice
    Layout(1, 4, 2, None, drawn(2)),
    Layout(4, 2, 8, None, zigzag(2, 2)),  # of two rows: ranks without any
)
# Each model in every order, and every kind of batch, too.
CASES = [
    (name, kind, LAYOUTS[(i + j) % len(LAYOUTS)]) for i, name in enumerate(FAMILIES) for j, kind in enumerate(KINDS)
]


def check(threads: RankThreads, name: str, batch: dict[str, Tensor], *layouts: Layout) -> None:
    with strict_float64():
        reference = on_one_process(name, torch.float64, batch)
        assert min(float(gradient.norm()) for gradient in reference.gradients.values()) > 1e-4  # everything matters
        for layout in layouts:
            for run in threads.run(over_ranks, layout.ranks, name, torch.float64, batch, layout):
                for what, off in differences(run, reference, batch.get("attention_mask")).items():
                    assert off <= STRICT, (layout, what)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(("name", "kind", "layout"), CASES)
def test_logits_loss_and_gradients_in_any_order(
    rank_threads: RankThreads, name: str, kind: str, layout: Layout
) -> None:
    check(rank_threads, name, batch_of(kind), layout)


@pytest.mark.sweep
@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_in_every_order(rank_threads: RankThreads, name: str, kind: str) -> None:
    check(rank_threads, name, batch_of(kind), *LAYOUTS)


@pytest.mark.usefixtures("uncovered")
def test_packed_documents_balanced_over_ranks(rank_threads: RankThreads) -> None:
    batch = batch_of("packed", rows=1)
    balanced = balance(torch.tensor([0, 12, 33]), 4, length=33)
    assert len(balanced.runs(0)) > 1
    check(rank_threads, "qwen3_moe", batch, Layout(1, 4, 4, None, balanced))


def cut(rank: int, sharding: TokenSharding, batch: dict[str, Any]) -> None:
    """Ids, positions, targets and padding are those of the rank's places, and the whole comes together again."""
    parallel = Parallel(sp=4, ep=4, device_type="cpu")
    step = parallel.shard(**batch, sharding=sharding)
    target_BL = torch.full_like(batch["labels"], IGNORED)
    for place in range(target_BL.shape[1] - 1):
        target_BL[:, place] = batch["labels"][:, place + 1]
    mask_BL = batch.get("attention_mask", torch.ones_like(target_BL)).bool()
    place_BL = torch.arange(33).expand(2, 33)
    position_BL = batch.get("position_ids", place_BL)
    for got, whole_BL in ((step.target_Bl, target_BL.masked_fill(~mask_BL, IGNORED)), (step.real_Bl, mask_BL)):
        assert torch.equal(got, cut_by_loops(whole_BL, sharding, rank))
    for got, whole_BL in ((step.input_ids, batch["input_ids"]), (step.position_ids, position_BL)):
        assert torch.equal(step.own(got), cut_by_loops(whole_BL, sharding, rank))
    assert step.sharding == sharding
    assert torch.equal(parallel.gather(step.feed(cut_by_loops(place_BL, sharding, rank)), step), place_BL)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_has_the_tokens_of_its_places(rank_threads: RankThreads, kind: str) -> None:
    for sharding in (zigzag(2, 4), drawn(2)):
        rank_threads.run(cut, 4, sharding, batch_of(kind))


def refused(rank: int) -> list[str]:
    parallel, batch = Parallel(dp=2, sp=2, ep=4, device_type="cpu"), batch_of("left")

    def told(sharding: Any, **options: Any) -> str:
        return refusal(lambda: parallel.shard(**batch, sharding=sharding, **options))

    mine = TokenSharding(batch=2, seq=Partition((16, 17)), held=((1,), (0,)))
    return [
        told(zigzag(2, 2), lengths=(16, 17)),
        told("zigzag"),
        told(zigzag(2, 4)),
        told(TokenSharding.zigzag(batch=2, length=32, ranks=2)),
        told(TokenSharding.zigzag(batch=2, length=33, ranks=2, order="LB")),
        told(TokenSharding.zigzag(batch=Partition((1, 1)), length=33, ranks=1)),
        told(zigzag(2, 2).select([0]) if rank == 1 else zigzag(2, 2)),
        told(mine if rank == 3 else zigzag(2, 2)),
    ]


def test_an_order_that_cannot_be_is_refused_on_every_rank(rank_threads: RankThreads) -> None:
    texts, *others = rank_threads.run(refused, 4)
    assert others == [texts] * 3
    grid = "for a batch of (B, L) = (2, 33) over sp = 2"
    wanted = (
        "lengths and a sharding; the sharding says how many places each rank of sp holds: leave lengths out",
        "sharding is 'zigzag'; pass the TokenSharding that says which places each rank of sp holds",
        f"a sharding of (2, 33) in order 'BL' over 4 ranks, {grid}",
        f"a sharding of (2, 32) in order 'BL' over 2 ranks, {grid}",
        f"in order 'LB' over 2 ranks, {grid}",
        "e.g. TokenSharding.zigzag(batch=2, length=33, ranks=2)",
        f"rank 1: a sharding of (2, 33) in order 'BL' over 1 ranks, {grid}",
        "pieces ((0, 3), (1, 2))",
    )
    for text, words in zip(texts, wanted, strict=True):
        assert words in text, text
