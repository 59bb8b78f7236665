"""Records that do not fit are the same error on every rank, before anything can hang, and the group works on."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from moe_dispatch import MoE, RoutingRecord, TokenSharding, record_routing, replay_routing
from moe_dispatch.testing import RankThreads
from tests.support.dispatch.moe import Case
from tests.support.dispatch.plans import KINDS, Kind, planner_of
from tests.support.ranks import refusal
from tests.support.routing.stack import NAMES, Stack, run_forwards, stack_of

CASE = Case(seq=(3, 0, 2), experts=(2, 1, 2))
MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "other names": (
        lambda: record_of(names=["layers.0", "layers.2"]),
        "the record has no layers ['layers.1'], which the model has; it has ['layers.0', 'layers.2']",
    ),
    "more layers": (
        lambda: record_of(names=[*NAMES, "layers.2"]),
        "the record has layers ['layers.2'], and the model does not; for a stage of a pipeline take "
        "record.restrict_to(stage)",
    ),
    "another K": (
        lambda: record_of(top_k=3),
        "layers.0 was recorded with K = 3 of 5 experts, and has K = 2 of 5; replay the model that was recorded",
    ),
    "other experts": (
        lambda: record_of(num_experts=6),
        "layers.0 was recorded with K = 2 of 6 experts, and has K = 2 of 5; replay the model that was recorded",
    ),
    "no record": (
        lambda: {"layers.0": []},
        "the record is a dict; pass a RoutingRecord, e.g. RoutingRecord.load(path)",
    ),
}


def record_of(
    names: list[str] = NAMES, forwards: int = 1, top_k: int = 2, num_experts: int = 5, length: int = 5
) -> RoutingRecord:
    expert_BLK = torch.zeros(2, length, top_k, dtype=torch.int32)
    return RoutingRecord.of_experts({name: [expert_BLK] * forwards for name in names}, num_experts=num_experts)


def works(stack: Stack, rank: int) -> None:
    """Nothing of a refused context is left, and the group is usable."""
    with replay_routing(stack, record_of()):
        run_forwards(stack, CASE, rank)


def refused_at_the_start(rank: int, mistake: str, at_fault: int) -> str:
    stack = stack_of(CASE, rank)
    record = MISTAKES[mistake][0]() if rank == at_fault else record_of()

    def enter() -> None:
        with replay_routing(stack, record):  # pyright: ignore[reportArgumentType]
            pytest.fail("entered")

    text = refusal(enter)
    works(stack, rank)
    return text


@pytest.mark.parametrize("mistake", MISTAKES)
def test_another_model_is_refused_at_the_start(rank_threads: RankThreads, mistake: str) -> None:
    texts = rank_threads.run(refused_at_the_start, 3, mistake, 1)
    assert texts == [f"rank 1: {MISTAKES[mistake][1]}"] * 3


def different(rank: int) -> str:
    """Rank 2 has a record of one forward more."""
    stack = stack_of(CASE, rank)
    text = refusal(lambda: replay_routing(stack, record_of(forwards=1 + (rank == 2))).__enter__())
    works(stack, rank)
    return text


def test_ranks_with_other_records_are_told_so(rank_threads: RankThreads) -> None:
    first, *others = rank_threads.run(different, 3)
    facts = "'2 x 5 tokens, K = 2 of 5 experts'"
    one, two = ("; ".join(f"{name}: [{', '.join([facts] * forwards)}]" for name in NAMES) for forwards in (1, 2))
    assert first == (
        f"the ranks disagree about one call (ranks [0, 1]: {one}; rank [2]: {two}); every rank of the group has to "
        "pass the same values"
    )
    assert others == [first] * 2


def nested(rank: int) -> str:
    stack = stack_of(CASE, rank)
    with replay_routing(stack, record_of()):
        text = refusal(lambda: replay_routing(stack, record_of()).__enter__())
        run_forwards(stack, CASE, rank)
    return text


def test_a_second_replay_of_a_layer_is_refused(rank_threads: RankThreads) -> None:
    text = "; ".join(f"rank {rank}: layers.0 replays a record already; end that context first" for rank in range(3))
    assert rank_threads.run(nested, 3) == [text] * 3


def refused_in_a_forward(rank: int, kind: Kind, at_fault: int) -> tuple[str, list[int]]:
    """The rank at fault gives experts too. Then the same context takes the forward, of which nothing is lost."""
    with planner_of(kind, rank, CASE.sizes) as planner:
        layer = CASE.layer(rank, planner=planner)
        expert_BLK = torch.arange(20).view(2, 5, 2).remainder(5)
        x_BlD, given = CASE.shards(rank)[0], CASE.sharding.shard(expert_BLK, rank).flip(-1)
        record = RoutingRecord.of_experts({"": [expert_BLK, expert_BLK - 1]}, num_experts=5)
        with record_routing(layer) as again, replay_routing(layer, record):
            arguments = {"expert_BlK": given} if rank == at_fault else {}
            text = refusal(lambda: layer(x_BlD, sharding=CASE.sharding, **arguments))
            layer(x_BlD, sharding=CASE.sharding)
            layer(x_BlD, sharding=CASE.sharding)
        forwards = [x.expert_NK.flatten().tolist() for x in again.layers[""]]
        wanted = [CASE.sharding.shard(x, rank).flatten().tolist() for x in (expert_BLK, expert_BLK - 1)]
        assert forwards == wanted
        return text, layer.load_E.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_experts_given_twice_are_refused_and_no_forward_is_lost(rank_threads: RankThreads, kind: Kind) -> None:
    texts, loads = zip(*rank_threads.run(refused_in_a_forward, 3, kind, 1), strict=True)
    text = "rank 1: expert_BlK is given to a layer that replays a record; leave out one of the two"
    assert len(set(texts)) == 1
    assert texts[0].endswith(text)  # between nodes, the column is named before
    assert [sum(counts) for counts in zip(*loads, strict=True)] == [8, 8, 8, 8, 4]


def without_given(rank: int, what: str) -> str:
    """What every rank, or only one, finds in the forward."""
    stack = stack_of(CASE, rank)
    if what == "one forward too many":
        with replay_routing(stack, record_of()):
            run_forwards(stack, CASE, rank)
            return refusal(lambda: run_forwards(stack, CASE, rank))
    if what == "forwards left":
        return refusal(lambda: in_context(stack, rank, record_of(forwards=2)))
    if what == "another grid":
        return refusal(lambda: in_context(stack, rank, record_of(length=6)))
    if what == "not gathered":
        with record_routing(stack) as record:
            run_forwards(stack, CASE, rank)
        in_context(stack, rank, record)  # the same layout needs no gathering
        return refusal(lambda: in_context(stack, rank, record, Case(seq=(2, 2, 1), experts=CASE.experts)))
    stack.run = hidden
    return refusal(lambda: in_context(stack, rank, record_of()))


def hidden(moe: MoE, x_BlD: Tensor, sharding: TokenSharding) -> tuple[Tensor, Tensor]:
    def forward(x_BlD: Tensor) -> tuple[Tensor, Tensor]:
        with save_on_cpu():
            return moe(x_BlD, sharding=sharding)

    return checkpoint(forward, x_BlD, use_reentrant=False)  # pyright: ignore[reportReturnType]


def in_context(stack: Stack, rank: int, record: RoutingRecord, case: Case = CASE) -> None:
    with replay_routing(stack, record):
        run_forwards(stack, case, rank)


HIDDEN = (
    "saved-tensor hooks between a checkpoint and this layer, e.g. save_on_cpu, hide which forward is recomputed, so "
    "it could not be replayed again; put them around the checkpoint"
)
LACKS = "the record lacks {} of the {} tokens of this rank in forward 0 of layers.0; put together what all ranks " + (
    "recorded, by record.gather(group)"
)


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        (
            "one forward too many",
            ["the record has 1 forward of layers.0, and this is one more; record as many as are replayed"] * 3,
        ),
        (
            "another grid",
            [
                "forward 0 of layers.0 was recorded for 2 x 6 tokens, and has 2 x 5 now; replay the batch that was "
                "recorded"
            ]
            * 3,
        ),
        ("not gathered", ["", LACKS.format(4, 4), ""]),
        ("hidden", [HIDDEN] * 3),
    ],
)
def test_other_forwards_are_refused_before_a_row_moves(
    rank_threads: RankThreads, what: str, texts: list[str]
) -> None:
    wanted = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)
    assert rank_threads.run(without_given, 3, what) == [wanted] * 3


def test_forwards_that_are_left_over_are_told_at_the_end(rank_threads: RankThreads) -> None:
    text = (
        "the record has 2 forwards of layers.0, of which 1 were replayed when the context ended, and 2 of 2 layers "
        "have forwards left; run the forwards that were recorded"
    )
    assert rank_threads.run(without_given, 3, "forwards left") == [text] * 3
