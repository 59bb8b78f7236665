"""Our exchange in Transformers' own expert parallelism: its sharding and kernels, and ranks tell their tokens."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dispatch import build_mesh
from moe_dispatch.integrations.transformers import apply_expert_parallel
from moe_dispatch.testing import RankThreads
from tests.support.ranks import refusal
from tests.support.tensors import grad_of
from tests.support.transformers.models import FAMILIES, new_model
from tests.support.transformers.sharded import shard_by_transformers, whole_gradients_of_dtensors
from tests.support.transformers.strict import strict_float64

DTYPE = torch.float64
STRICT = 1e-12
ROWS = ((0, 3), (3, 4), (4, 5), (5, 6))


def ids_of() -> Tensor:
    return torch.randint(0, 64, (6, 9), generator=torch.Generator().manual_seed(1))


def answers(model: Any, rows: slice, ways: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    if "use_reentrant" in ways:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=ways)
        model.train()
    logits = model(input_ids=ids_of()[rows], use_cache=False).logits
    logits.square().sum().backward()
    return logits.detach(), whole_gradients_of_dtensors(model)


def data_parallel(rank: int, name: str, ways: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model = new_model(name, DTYPE)
    shard_by_transformers(model, ep=4)
    assert len(model.model.layers[-1].mlp.experts.down_proj.to_local()) == model.config.num_local_experts // 4
    return answers(model, slice(*ROWS[rank]), ways)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("ways", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_data_parallel_ranks_are_those_of_one_process(
    rank_threads: RankThreads, name: str, ways: dict[str, Any]
) -> None:
    with strict_float64():
        logits_BLV, gradients = answers(new_model(name, DTYPE), slice(6), {})
        found = rank_threads.run(data_parallel, 4, name, ways)
    for (start, stop), (mine_BlV, _) in zip(ROWS, found, strict=True):
        assert float((mine_BlV - logits_BLV[start:stop]).abs().max()) <= STRICT
    for what, gradient in gradients.items():
        parts = [of_rank[what] for _, of_rank in found]  # experts are whole on each, and the rest is a sum
        mine = parts[0] if ".experts." in what else torch.stack(parts).sum(0)
        assert float((mine - gradient).norm()) <= STRICT * float(gradient.norm()), what


def idle(tokens_learn: bool, kernels: str) -> tuple[bool, float]:
    """No row for the experts of rank 1, and no token on it."""
    model = new_model("mixtral", torch.float32)
    model.set_experts_implementation(kernels)
    shard_by_transformers(model, ep=2)
    experts = model.model.layers[0].mlp.experts
    length = 3 if experts.moe_dispatch_implementation.held.group.rank() == 0 else 0
    x_TD = torch.randn(length, 32, requires_grad=tokens_learn)
    experts(
        x_TD, torch.tensor([[0, 1]] * length, dtype=torch.int64).view(length, 2), torch.ones(length, 2)
    ).sum().backward()
    return experts.down_proj.grad is not None, float(grad_of(experts.down_proj).to_local().abs().sum())  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernels", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tokens_learn", [True, False])
def test_an_idle_rank_takes_part_in_backward(rank_threads: RankThreads, tokens_learn: bool, kernels: str) -> None:
    (_, busy), (learns, nothing) = rank_threads.run(idle, 2, tokens_learn, kernels)
    assert busy > 0
    assert learns
    assert nothing == 0


def experts_alone(kernels: str) -> Tensor:
    """K = 2 choices of one expert, whose weights nearly cancel."""
    model = new_model("mixtral", torch.bfloat16)
    model.set_experts_implementation(kernels)
    shard_by_transformers(model, ep=2)
    experts = model.model.layers[0].mlp.experts
    x_TD = torch.ones(1, 32, dtype=torch.bfloat16)
    return experts(x_TD, torch.tensor([[5, 5]]), torch.tensor([[1 + 2**-12, -1.0]]))


def test_float32_weights_stay_so_beside_bfloat16_rows(rank_threads: RankThreads) -> None:
    experts = new_model("mixtral", torch.bfloat16).model.layers[0].mlp.experts
    one_TD = experts(torch.ones(1, 32, dtype=torch.bfloat16), torch.tensor([[5]]), torch.ones(1, 1))
    for y_TD in rank_threads.run(experts_alone, 2, "eager"):
        assert y_TD.dtype == torch.bfloat16
        assert torch.equal(y_TD, one_TD * 2**-12)


def refusals() -> list[str]:
    model = new_model("mixtral", DTYPE)
    texts = [refusal(lambda: shard_by_transformers(model, ep=1, tp=2))]
    model = new_model("mixtral", DTYPE)
    shard_by_transformers(model, ep=2)
    texts.append(refusal(lambda: copy.deepcopy(model)))
    return [*texts, refusal(lambda: apply_expert_parallel(model, build_mesh(dp=2, ep=2, device_type="cpu")))]


def test_what_does_not_fit_is_refused_on_every_rank(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(refusals, 2)
    assert first == second
    assert first[0].startswith(
        "ep_implementation='moe_dispatch' with tp_size=2: ranks of a tensor-parallel group share"
    )
    assert first[1].startswith("a model whose experts DistributedConfig sharded cannot be copied")
    assert "gate_up_proj of MixtralExperts is a DTensor" in first[2]
