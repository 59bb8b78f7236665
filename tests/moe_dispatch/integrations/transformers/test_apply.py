"""Experts of Transformers' models over ranks, without sequence parallelism, and beside the rest of the library."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_dispatch import (
    DisagreementError,
    GroupError,
    Partition,
    build_mesh,
    clip_grad_norm,
    leave_experts_to_ranks,
    share_of_state_dict,
    sum_gradients,
    whole_state_dict,
)
from moe_dispatch.integrations.transformers import apply_expert_parallel
from moe_dispatch.testing import RankThreads
from tests.support.ranks import world
from tests.support.transformers.cases import whole_gradients
from tests.support.transformers.models import CONFIGS, new_model
from tests.support.transformers.strict import strict_float64

STRICT = 1e-12
DTYPE = torch.float64


def ids_of(rows: int) -> Tensor:
    return torch.randint(0, 64, (rows, 9), generator=torch.Generator().manual_seed(1))


def reference(name: str) -> tuple[Tensor, dict[str, Tensor], float]:
    model = new_model(name, DTYPE)
    logits = model(input_ids=ids_of(4), use_cache=False).logits
    logits.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return logits.detach(), gradients, float(norm)


def data_parallel(rank: int, name: str, sizes: tuple[int, ...] | None, rows: tuple[int, ...]) -> dict[str, Any]:
    """Each rank's own rows, as any training loop of Transformers feeds them."""
    mesh, model = build_mesh(dp=4, ep=4, device_type="cpu"), new_model(name, DTYPE)
    apply_expert_parallel(model, mesh, experts=None if sizes is None else Partition(sizes))
    held = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    start = sum(rows[:rank])
    logits = model(input_ids=ids_of(4)[start : start + rows[rank]], use_cache=False).logits
    logits.square().sum().backward()
    sum_gradients(model, group=world())
    norm = float(clip_grad_norm(model, 1e9))
    return {"logits": logits.detach(), "held": held, "norm": norm, "gradients": whole_gradients(model)}


@pytest.mark.parametrize(
    ("name", "sizes", "rows"),
    [
        ("deepseek_v3", (9, 0, 6, 1), (1, 1, 1, 1)),
        ("qwen3_moe", None, (1, 1, 1, 1)),
        ("mixtral", (0, 0, 8, 0), (1, 1, 1, 1)),
        ("gpt_oss", (3, 0, 4, 1), (1, 1, 1, 1)),
    ],
)
def test_experts_of_any_partition_are_those_of_one_process(
    rank_threads: RankThreads, name: str, sizes: tuple[int, ...] | None, rows: tuple[int, ...]
) -> None:
    with strict_float64():
        logits_BLV, gradients, norm = reference(name)
        found = rank_threads.run(data_parallel, 4, name, sizes, rows)
    total = sum(g.numel() for n, g in gradients.items() if ".experts." in n)
    num_experts = sum(sizes) if sizes else 16
    for rank, mine in enumerate(found):
        size = sizes[rank] if sizes else 4
        assert mine["held"] == total // num_experts * size  # experts are really cut
        assert float((mine["logits"] - logits_BLV[rank]).abs().max()) <= STRICT
        assert abs(mine["norm"] - norm) <= STRICT * norm
        for what, gradient in gradients.items():
            assert float((mine["gradients"][what] - gradient).norm()) <= STRICT * float(gradient.norm()), what


def experts_alone(rank: int) -> Tensor:
    """K = 2 choices of one expert, whose weights nearly cancel."""
    model = new_model("mixtral", torch.bfloat16)
    apply_expert_parallel(model, build_mesh(dp=2, ep=2, device_type="cpu"))
    experts = model.model.layers[0].mlp.experts
    x_TD = torch.ones(1, 32, dtype=torch.bfloat16)
    return experts(x_TD, torch.tensor([[5, 5]]), torch.tensor([[1 + 2**-12, -1.0]]))


def test_float32_weights_stay_so_beside_bfloat16_rows(rank_threads: RankThreads) -> None:
    experts = new_model("mixtral", torch.bfloat16).model.layers[0].mlp.experts
    one_TD = experts(torch.ones(1, 32, dtype=torch.bfloat16), torch.tensor([[5]]), torch.ones(1, 1))
    for y_TD in rank_threads.run(experts_alone, 2):
        assert y_TD.dtype == torch.bfloat16
        assert torch.equal(y_TD, one_TD * 2**-12)


def idle_in_backward(tokens_learn: bool) -> bool:
    """No row for the experts of rank 1."""
    model = new_model("mixtral", DTYPE)
    apply_expert_parallel(model, build_mesh(dp=2, ep=2, device_type="cpu"))
    experts = model.model.layers[0].mlp.experts
    x_TD = torch.randn(3, 32, dtype=DTYPE, requires_grad=tokens_learn)
    experts(x_TD, torch.tensor([[0, 1]] * 3), torch.ones(3, 2, dtype=DTYPE)).sum().backward()
    return experts.down_proj.grad is not None


@pytest.mark.parametrize("tokens_learn", [True, False])
def test_a_rank_without_rows_takes_part_in_backward(rank_threads: RankThreads, tokens_learn: bool) -> None:
    assert rank_threads.run(idle_in_backward, 2, tokens_learn) == [True, True]


def states(rank: int) -> list[bool]:
    mesh, whole = build_mesh(dp=2, ep=2, device_type="cpu"), new_model("qwen3_tied_aux", DTYPE).state_dict()
    with torch.device("meta"):
        model = new_model_on_meta("qwen3_tied_aux")
    apply_expert_parallel(model, mesh, experts=Partition((11, 5)))
    on_meta = all(p.is_meta for p in model.parameters())
    model.load_state_dict(share_of_state_dict(whole, model), assign=True)
    back = whole_state_dict(model)
    same = all(torch.equal(whole[name], back[name]) for name in whole)
    copied = copy.deepcopy(model)
    leave_experts_to_ranks(copied)
    ignored = copied._ddp_params_and_buffers_to_ignore
    own = {n for n, _ in model.named_parameters() if ".experts." in n}
    twin = copied.model.layers[0].mlp.experts.experts_of_ranks
    return [on_meta, same, set(ignored) == own, twin.group is mesh.expert.get_group("ep")]


def new_model_on_meta(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = CONFIGS[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


def test_meta_state_dicts_copies_and_ddp_know_the_experts(rank_threads: RankThreads) -> None:
    assert rank_threads.run(states, 2) == [[True] * 4] * 2


def refusals(rank: int) -> list[str]:
    mesh, texts = build_mesh(dp=2, ep=2, device_type="cpu"), list[str]()

    def told(model: Any, kind: type[Exception] = GroupError, **arguments: Any) -> None:
        with pytest.raises(kind) as error:
            apply_expert_parallel(model, mesh, **arguments)
        texts.append(str(error.value))

    told(nn.Linear(2, 2))
    told(new_model_on_meta_of("llama", num_key_value_heads=2))
    told(new_model("mixtral", DTYPE), experts=Partition((8,)))
    told(new_model("mixtral", DTYPE), experts=Partition((5, 4)))
    model = new_model("mixtral", DTYPE)
    told(model if rank else new_model("gpt_oss", DTYPE), DisagreementError)
    apply_expert_parallel(model, mesh)
    told(model)
    broken = new_model("mixtral", DTYPE)
    if rank:
        broken.model.layers[1].mlp.experts.has_post_expert_norm = True
    told(broken)
    return texts


def new_model_on_meta_of(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**CONFIGS["mixtral"][1], **settings})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_what_cannot_be_cut_is_refused_on_every_rank(rank_threads: RankThreads) -> None:
    first, second = rank_threads.run(refusals, 2)
    assert first == second
    wanted = (
        "Linear is no PreTrainedModel",
        "LlamaForCausalLM has no experts that follow Transformers' ExpertsInterface",
        "is for 1 ranks, but ep is 2",
        "model.layers.0.mlp.experts has 8 experts, but",
        "the ranks disagree",
        "model.layers.0.mlp.experts is cut over ranks already",
        "rank 1: model.layers.1.mlp.experts: MixtralExperts normalises",
    )
    for text, part in zip(first, wanted, strict=True):
        assert part in text


def frozen(rank: int) -> list[bool]:
    mesh, model = build_mesh(dp=2, ep=2, device_type="cpu"), new_model("qwen3_moe", DTYPE)
    experts = model.model.layers[0].mlp.experts
    model.model.layers[1].mlp.experts.down_proj = experts.down_proj  # one tensor in two layers
    experts.gate_up_proj.requires_grad_(False)
    apply_expert_parallel(model, mesh)
    second = model.model.layers[1].mlp.experts
    return [experts.down_proj is second.down_proj, experts.gate_up_proj.requires_grad, len(experts.down_proj) == 8]


def test_frozen_and_shared_experts_stay_so(rank_threads: RankThreads) -> None:
    assert rank_threads.run(frozen, 2) == [[True, False, True]] * 2
