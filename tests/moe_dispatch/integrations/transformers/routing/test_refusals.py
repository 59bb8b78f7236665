"""What does not fit is refused, on one process and with the same text on every rank, and before any row moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from moe_dispatch import RoutingRecord
from moe_dispatch.integrations.transformers import record_routing, replay_routing
from moe_dispatch.testing import RankThreads
from sp_attention.integrations.transformers import Parallel
from tests.support.ranks import refusal
from tests.support.transformers.cases import batch_of
from tests.support.transformers.models import COMMON, new_model
from tests.support.transformers.routing import record_of

DTYPE, BATCH = torch.float32, batch_of("plain")
NAMES = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")


def experts_of(record: RoutingRecord) -> dict[str, list[Tensor]]:
    return {
        name: [x.expert_NK.unflatten(0, x.grid).clone() for x in forwards] for name, forwards in record.layers.items()
    }


def renamed(record: RoutingRecord) -> RoutingRecord:
    return RoutingRecord({name.removeprefix("model."): x for name, x in record.layers.items()})


def of_one_choice(record: RoutingRecord) -> RoutingRecord:
    ids = {name: [x[..., :1] for x in forwards] for name, forwards in experts_of(record).items()}
    return RoutingRecord.of_experts(ids, num_experts=8)


def of_more_experts(record: RoutingRecord) -> RoutingRecord:
    return RoutingRecord.of_experts(experts_of(record), num_experts=9)


def of_some_choices(record: RoutingRecord) -> RoutingRecord:
    ids = experts_of(record)
    ids[NAMES[1]][0][1, 2, 0] = -1
    return RoutingRecord.of_experts(ids, num_experts=8)


def of_a_part(record: RoutingRecord) -> RoutingRecord:
    ids = {name: [x[:, :20] for x in forwards] for name, forwards in experts_of(record).items()}
    return RoutingRecord.of_experts(ids, num_experts=8)


def of_no_forward(record: RoutingRecord) -> RoutingRecord:
    return RoutingRecord(dict.fromkeys(record.layers, ()))


def of_two_forwards(record: RoutingRecord) -> RoutingRecord:
    return RoutingRecord({name: x * 2 for name, x in record.layers.items()})


WRONG: dict[str, tuple[Callable[[RoutingRecord], RoutingRecord], str]] = {
    "names": (
        renamed,
        f"the record has no layers {list(NAMES)}, which the model has; it has ['layers.0.mlp.experts', "
        "'layers.1.mlp.experts']",
    ),
    "K": (
        of_one_choice,
        f"{NAMES[0]} was recorded with K = 1 of 8 experts, and has K = 2 of 8; replay the model that was recorded",
    ),
    "E": (
        of_more_experts,
        f"{NAMES[0]} was recorded with K = 2 of 9 experts, and has K = 2 of 8; replay the model that was recorded",
    ),
    "some experts": (
        of_some_choices,
        f"{NAMES[1]} was recorded with tokens that go to fewer than K experts (-1 beside ids), for which its router "
        "has no weights; a token of such a layer goes to K experts, or to none",
    ),
    "another batch": (
        of_a_part,
        f"forward 0 of {NAMES[0]} was recorded for 2 x 20 tokens, and has 2 x 33 now; replay the batch that was "
        "recorded",
    ),
    "too few": (
        of_no_forward,
        f"the record has 0 forwards of {NAMES[0]}, and this is one more; record as many as are replayed",
    ),
    "too many": (
        of_two_forwards,
        f"the record has 2 forwards of {NAMES[0]}, of which 1 were replayed when the context ended, and 2 of 2 "
        "layers have forwards left; run the forwards that were recorded",
    ),
}


@pytest.fixture(scope="module")
def record() -> RoutingRecord:
    return record_of("mixtral", DTYPE, BATCH)


def told(model: Any, record: RoutingRecord, inputs: dict[str, Any]) -> str:
    def replay() -> None:
        with replay_routing(model, record):
            model(**inputs)

    return refusal(replay)


def on_ranks(record: RoutingRecord) -> str:
    parallel, model = Parallel(sp=2, ep=2, device_type="cpu"), new_model("mixtral", DTYPE)
    parallel.apply(model)
    step = parallel.shard(**BATCH, lengths=(33, 0))
    found = told(model, record, step.inputs)
    with record_routing(model) as again:  # ranks are where they were
        model(**step.inputs)
    assert len(again.layers) == 2
    return found


@pytest.mark.parametrize("what", WRONG)
def test_records_that_do_not_fit(rank_threads: RankThreads, record: RoutingRecord, what: str) -> None:
    change, text = WRONG[what]
    wrong = change(record)
    assert told(new_model("mixtral", DTYPE), wrong, {**BATCH, "use_cache": False}) == text
    of_ranks = text if what == "too many" else f"rank 0: {text}; rank 1: {text}"
    assert rank_threads.run(on_ranks, 2, wrong) == [of_ranks] * 2


def not_gathered(rank: int) -> str:
    """Each rank replays what it recorded itself, after the tokens moved to the other."""
    parallel, model = Parallel(sp=2, ep=2, device_type="cpu"), new_model("mixtral", DTYPE)
    parallel.apply(model)
    with record_routing(model) as record:
        model(**parallel.shard(**BATCH, lengths=(20, 13)).inputs)
    return told(model, record, parallel.shard(**BATCH, lengths=(0, 33)).inputs)


def test_what_one_rank_lacks_is_told_on_all(rank_threads: RankThreads) -> None:
    text = (
        f"rank 1: the record lacks 40 of the 66 tokens of this rank in forward 0 of {NAMES[0]}; put together what "
        "all ranks recorded, by record.gather(group)"
    )
    assert rank_threads.run(not_gathered, 2) == [text] * 2


def test_a_layer_replays_one_record(record: RoutingRecord) -> None:
    model = new_model("mixtral", DTYPE)
    with replay_routing(model, record):
        model(**BATCH, use_cache=False)
        assert told(model, record, {}) == f"{NAMES[0]} replays a record already; end that context first"


def another_router(rank: int) -> str:
    config = AutoConfig.for_model(
        "phimoe", **COMMON, intermediate_size=24, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    parallel = Parallel(sp=2, ep=2, device_type="cpu")
    parallel.apply(model)
    step = parallel.shard(**BATCH, lengths=(20, 13))
    with record_routing(model) as record:
        model(**step.inputs)
    return told(model, record, step.inputs)


def test_routers_that_choose_in_another_way_are_refused_on_every_rank(rank_threads: RankThreads) -> None:
    text = (
        f"{NAMES[0]} cannot replay a record: the router of PhimoeSparseMoeBlock does not choose its 2 experts by one "
        "topk of all 8 scores, so nothing can choose in its place"
    )
    assert rank_threads.run(another_router, 2) == [f"rank 0: {text}; rank 1: {text}"] * 2


class Remapped(torch.nn.Module):
    """A router whose ids are changed behind its topk."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weight_TK, ids_TK = self.router(x_TD)
        return logits_TE, weight_TK, 7 - ids_TK


def test_ids_that_are_changed_behind_the_choice(record: RoutingRecord) -> None:
    model = new_model("mixtral", DTYPE)
    model.model.layers[0].mlp.gate = Remapped(model.model.layers[0].mlp.gate)
    assert told(model, record, {**BATCH, "use_cache": False}) == (
        f"{NAMES[0]} cannot replay a record: MixtralSparseMoeBlock sends tokens to other experts than its router's "
        "topk chose"
    )


def test_tokens_that_cannot_be_numbered() -> None:
    mlp: Any = new_model("mixtral", DTYPE).model.layers[0].mlp
    block = torch.nn.ModuleDict({"mlp": mlp})
    x_BLD = torch.randn(2, 3, 32)
    text = (
        "mlp.experts: experts got 6 rows, and their layer tokens of shape unknown, so nothing tells which row is "
        "which token of a (B, L) batch; only layers of all tokens, (B, L, D), have a record"
    )

    def alone() -> None:
        with record_routing(block):
            mlp.experts(x_BLD.flatten(0, 1), torch.zeros(6, 2, dtype=torch.int64), torch.ones(6, 2))

    assert refusal(alone) == text
    del mlp.gate.top_k, mlp.top_k
    assert refusal(lambda: record_routing(block).__enter__()) == (
        "mlp.experts: the router of MixtralSparseMoeBlock does not tell how many experts a token goes to; modules "
        "there have top_k = ['None'], and one number is needed"
    )


def test_a_forward_that_could_not_be_replayed_again(record: RoutingRecord) -> None:
    model = new_model("mixtral", DTYPE)
    block = model.model.layers[0].mlp
    inside = block.forward

    def forward(x_BLD: Tensor) -> Tensor:
        with save_on_cpu():
            return inside(x_BLD)

    block.forward = lambda x_BLD: checkpoint(forward, x_BLD, use_reentrant=False)
    assert "hide which forward is recomputed" in told(model, record, {**BATCH, "use_cache": False})
