"""What is around a forward of a Transformers model: hooks that stay and go, copies, wrappers, contexts, modes."""

import copy
import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_dispatch import RoutingRecord, build_mesh, sum_gradients
from moe_dispatch.integrations.transformers import apply_expert_parallel, record_routing, replay_routing
from moe_dispatch.integrations.transformers.routing.hooks import RoutingHooks
from moe_dispatch.testing import RankThreads
from sp_attention.integrations.transformers import Parallel, apply_sequence_parallel
from tests.support.ranks import comes_true, refusal, world
from tests.support.tensors import grad_of
from tests.support.transformers.cases import batch_of, whole_gradients
from tests.support.transformers.models import new_model
from tests.support.transformers.routing import forced, model_of, move, record_of, routers
from tests.support.transformers.sharded import shard_by_transformers, whole_gradients_of_dtensors
from tests.support.transformers.strict import strict_float64

DTYPE = torch.float32
BATCH = batch_of("plain")


def is_left_alone(model: nn.Module) -> bool:
    """Nothing of a context is left: no hook, no attribute."""
    hooks = [hook for x in model.modules() for hook in (*x._forward_pre_hooks.values(), *x._forward_hooks.values())]
    ours = [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), RoutingHooks)]
    return not ours and not any({"routing_hooks", "forward"} & vars(x).keys() for x in model.modules())


def chosen(model: Any) -> RoutingRecord:
    with record_routing(model) as record:
        model(**BATCH, use_cache=False)
    return record


@pytest.fixture
def model() -> Any:
    return model_of("qwen3_moe", DTYPE, moved=False)


@pytest.fixture(scope="module")
def other() -> RoutingRecord:
    """Other experts than those that the model chooses."""
    return record_of("qwen3_moe", DTYPE, BATCH, moved=True)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_hooks_stay_for_a_graph_that_will_recompute_and_no_longer(
    model: Any, other: RoutingRecord, use_reentrant: bool
) -> None:
    with replay_routing(model, other), record_routing(model):
        model(**BATCH, use_cache=False)
    assert is_left_alone(model)
    model.train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with replay_routing(model, other):
        loss = model(**BATCH, use_cache=False).loss
    assert not is_left_alone(model)
    free = chosen(model)  # a forward meanwhile
    assert free != other
    loss.backward()
    del loss
    assert comes_true(lambda: is_left_alone(model))
    with replay_routing(model, other):
        loss = model(**BATCH, use_cache=False).loss
    del loss  # a graph without a backward
    assert comes_true(lambda: is_left_alone(model))
    assert chosen(model) == free


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_before_the_context_is_recomputed_as_it_was(
    model: Any, other: RoutingRecord, use_reentrant: bool
) -> None:
    model.train()
    model(**BATCH, use_cache=False).loss.backward()
    wanted = {name: x.grad.clone() for name, x in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss = model(**BATCH, use_cache=False).loss
    with replay_routing(model, other):
        model(**BATCH, use_cache=False)
        loss.backward()
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, wanted[name])


def test_an_exception_ends_a_context(model: Any, other: RoutingRecord) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("mine")

    block = model.model.layers[0].mlp
    for place in (block.experts, block.gate, block):  # before the experts, in the router, behind all
        handle = place.register_forward_hook(fail)
        with pytest.raises(KeyError, match="mine"), record_routing(model) as record, replay_routing(model, other):
            model(**BATCH, use_cache=False)
        handle.remove()
        assert record == RoutingRecord({})
        assert is_left_alone(model)
        assert not torch.overrides._get_current_function_mode_stack()


def test_what_ctrl_c_ends_leaves_nothing(model: Any, other: RoutingRecord) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[0].mlp.gate.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), replay_routing(model, other):
        model(**BATCH, use_cache=False)
    handle.remove()
    assert is_left_alone(model)
    assert not torch.overrides._get_current_function_mode_stack()


def test_copies_files_and_other_models_are_left_alone(model: Any, other: RoutingRecord) -> None:
    mine, second = chosen(model), model_of("qwen3_moe", DTYPE, moved=True)
    with record_routing(model) as record, replay_routing(model, other), record_routing(second) as of_second:
        copied, file = copy.deepcopy(model), io.BytesIO()
        torch.save(model, file)
        model(**BATCH, use_cache=False)
        assert chosen(copied) == mine
        with replay_routing(second, mine):
            second(**BATCH, use_cache=False)
    assert record == other
    assert of_second == mine
    file.seek(0)
    for twin in (copied, torch.load(file, weights_only=False)):
        twin(**BATCH, use_cache=False)
        assert is_left_alone(twin)
        with replay_routing(twin, other):
            assert chosen(twin) == other
        assert is_left_alone(twin)


def test_contexts_in_contexts(model: Any, other: RoutingRecord) -> None:
    with record_routing(model) as both:
        with record_routing(model) as first, replay_routing(model, other):
            model(**BATCH, use_cache=False)
        model(**BATCH, use_cache=False)
    assert first == other
    assert {len(forwards) for forwards in both.layers.values()} == {2}
    assert is_left_alone(model)


def wrap_layers(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.experts = checkpoint_wrapper(layer.mlp.experts)
        layer.mlp = checkpoint_wrapper(layer.mlp)
    return model


def compiled(model: Any, backend: str = "eager") -> Any:
    """And run before the context: compiled code does not look for hooks again."""
    whole: Any = torch.compile(model, backend=backend)
    whole(**BATCH, use_cache=False).loss.backward()
    return whole


def compiled_by_inductor(model: Any) -> Any:
    return compiled(model, "inductor")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "wrapper", [wrap_layers, compiled, pytest.param(compiled_by_inductor, marks=pytest.mark.sweep)]
)
def test_names_are_those_without_wrappers(model: Any, other: RoutingRecord, wrapper: Any) -> None:
    mine, whole = chosen(model), wrapper(model)
    assert chosen(whole) == mine
    with record_routing(whole) as again, replay_routing(whole, other):
        whole(**BATCH, use_cache=False).loss.backward()
    assert again == other
    assert chosen(whole) == mine


def test_inference_and_the_inner_model(model: Any, other: RoutingRecord) -> None:
    """Recorded without gradients, replayed with them, and the other way round."""
    model.eval()
    with torch.inference_mode():
        mine = chosen(model)
    move(model)
    with replay_routing(model, mine), record_routing(model.model) as inner:
        x_BLD = model.get_input_embeddings()(BATCH["input_ids"])
        model.model(inputs_embeds=x_BLD, use_cache=False)
    assert [forwards[0].grid for forwards in inner.layers.values()] == [(2, 33)] * 2
    assert RoutingRecord({f"model.{name}": x for name, x in inner.layers.items()}) == mine
    with torch.no_grad(), replay_routing(model, mine):
        assert chosen(model) == mine


def test_bfloat16_rows_beside_float32_weights() -> None:
    record = record_of("mixtral", torch.bfloat16, BATCH)
    model = model_of("mixtral", torch.bfloat16, moved=True)
    dtypes = set()
    with record_routing(model) as again, replay_routing(model, record):
        model.model.layers[0].mlp.experts.register_forward_pre_hook(
            lambda experts, args: dtypes.add((args[0].dtype, args[2].dtype))
        )
        model(**BATCH, use_cache=False).loss.backward()
    assert again == record
    assert dtypes == {(torch.bfloat16, torch.float32)}
    assert all(grad_of(x.weight).any() for x in routers(model))


def data_parallel(rank: int, record: RoutingRecord, replay: bool, by_transformers: bool) -> tuple[RoutingRecord, Any]:
    """Each rank's own row, as any training loop of Transformers feeds it, without a step."""
    model = model_of("deepseek_v3", torch.float64, moved=replay)
    if by_transformers:
        shard_by_transformers(model, ep=4)
    else:
        apply_expert_parallel(model, build_mesh(dp=4, ep=4, device_type="cpu"))
    row = {"input_ids": batch_of("plain", rows=4, length=9)["input_ids"][rank : rank + 1], "use_cache": False}
    with record_routing(model) as again, replay_routing(model, record) if replay else nullcontext():
        logits_BLV = model(**row).logits
    logits_BLV.square().sum().backward()
    sum_gradients(model, group=world())
    gradients = whole_gradients_of_dtensors(model) if by_transformers else whole_gradients(model)
    return again.gather(world()), gradients


@pytest.mark.parametrize("by_transformers", [False, True])
def test_ranks_without_a_step_have_one_row_of_tokens(rank_threads: RankThreads, by_transformers: bool) -> None:
    with strict_float64():
        ran = rank_threads.run(data_parallel, 4, RoutingRecord({}), False, by_transformers)
        record, *_ = [record for record, _ in ran]
        model = forced("deepseek_v3", torch.float64, record)
        ids_BL = batch_of("plain", rows=4, length=9)["input_ids"]
        model(input_ids=ids_BL, use_cache=False).logits.square().sum().backward()
        wanted = {name: x.grad for name, x in model.named_parameters()}
        for again, gradients in rank_threads.run(data_parallel, 4, record, True, by_transformers):
            assert again == record
            for name, gradient in wanted.items():
                assert float((gradients[name] - gradient).norm()) <= 1e-12 * float(gradient.norm()), name


def with_a_step(record: RoutingRecord) -> RoutingRecord:
    parallel, model = Parallel(sp=2, ep=2, device_type="cpu"), model_of("qwen3_moe", DTYPE, moved=False)
    shard_by_transformers(model, ep=2)
    apply_sequence_parallel(model, parallel.mesh)
    with record_routing(model) as again, replay_routing(model, record):
        model(**parallel.shard(**BATCH, lengths=(33, 0)).inputs)
    return again.gather(world())


def test_experts_that_transformers_sharded_replay_by_the_step(
    rank_threads: RankThreads, other: RoutingRecord
) -> None:
    assert rank_threads.run(with_a_step, 2, other) == [other] * 2


def test_a_model_without_experts_is_refused() -> None:
    text = (
        "no layer of this Linear has experts that follow Transformers' ExpertsInterface; pass the model that holds "
        "them (layers of moe_dispatch.MoE have moe_dispatch.record_routing and replay_routing)"
    )
    assert refusal(lambda: record_routing(nn.Linear(2, 2)).__enter__()) == text
    model = new_model("mixtral", DTYPE)
    model.model.layers[1].mlp.experts._is_expert_parallel = True  # as Transformers' own expert parallelism has it
    assert "layers.1.mlp.experts is cut over ranks by Transformers" in refusal(lambda: chosen(model))
    assert is_left_alone(model)
