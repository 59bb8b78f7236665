"""The router's bias, its parameters, and the numbers that it refuses."""

import io
import re

import pytest
import torch

from moe_dispatch import TopKRouter
from tests.support.dispatch.routers import (
    DIM,
    Setting,
)

# ---- bias update -----------------------------------------------------------------------------------


def test_the_bias_moves_one_step_towards_the_mean_load() -> None:
    router = TopKRouter(DIM, 4, 2, score="sigmoid")
    router.expert_bias_E.fill_(1.0)
    router.update_bias(torch.tensor([10, 0, 4, 2]), rate=0.125)  # mean 4
    assert router.expert_bias_E.tolist() == [0.875, 1.125, 1.0, 1.125]
    router.update_bias(torch.tensor([3, 3, 3, 3]), rate=0.125)
    assert router.expert_bias_E.tolist() == [0.875, 1.125, 1.0, 1.125]


@pytest.mark.parametrize(
    "load",
    [
        [2**24 + 1, 2**24 - 1, 2**24, 2**24],
        [50_000_003, 49_999_999, *[50_000_001] * 998],
        [1_900_074] * 160,
    ],
    ids=["close to 2 ** 24", "1000 experts", "all alike"],
)
def test_loads_are_compared_in_integers(load: list[int]) -> None:
    router = TopKRouter(DIM, len(load), 2, score="sigmoid")
    router.update_bias(torch.tensor(load), rate=0.5)
    mean = sum(load) // len(load)
    assert mean * len(load) == sum(load)
    assert router.expert_bias_E.tolist() == [0.5 * ((count < mean) - (count > mean)) for count in load]


def test_the_bias_is_moved_in_place_and_saved() -> None:
    router = TopKRouter(DIM, 4, 2, score="sigmoid")
    bias_E, version = router.expert_bias_E, router.state_dict()["expert_bias_E"]
    router.update_bias(torch.tensor([1, 0, 0, 0]), rate=0.5)
    assert router.expert_bias_E is bias_E
    assert version.tolist() == [-0.5, 0.5, 0.5, 0.5]
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    loaded = TopKRouter(DIM, 4, 2, score="sigmoid")
    loaded.load_state_dict(torch.load(file))
    assert loaded.expert_bias_E.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert torch.equal(loaded.weight_ED, router.weight_ED)


def test_small_steps_add_up() -> None:
    router = TopKRouter(DIM, 2, 1, score="sigmoid")
    router.expert_bias_E.fill_(1.0)
    for _ in range(100):
        router.update_bias(torch.tensor([1, 0]), rate=0.001)
    assert router.expert_bias_E.tolist() == pytest.approx([0.9, 1.1], rel=1e-5)


def test_a_bias_in_low_precision_is_refused() -> None:
    router = TopKRouter(DIM, 4, 2, score="sigmoid")
    router.load_state_dict({name: x.bfloat16() for name, x in router.state_dict().items()}, assign=True)
    with pytest.raises(
        ValueError, match=r"torch\.bfloat16, in which small steps are lost; keep it in float32"
    ) as caught:
        router.update_bias(torch.tensor([1, 0, 0, 0]), rate=0.001)
    assert "router.expert_bias_E = router.expert_bias_E.float()" in str(caught.value)
    router.expert_bias_E = router.expert_bias_E.float()  # the remedy of the message
    router.update_bias(torch.tensor([1, 0, 0, 0]), rate=0.001)
    assert router.expert_bias_E.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])
    router.double().update_bias(torch.tensor([1, 0, 0, 0]), rate=0.001)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to", "to_empty"])
def test_a_cast_of_the_model_leaves_the_bias_in_float32(cast: str) -> None:
    """Rounded to bfloat16, 1 + 1e-3 and 1 would be the same, and tokens went to other experts."""
    bias_E = torch.tensor([1.0, 1.0 + 1e-3, 1.0, 1.0])
    router = TopKRouter(DIM, 4, 2, score="sigmoid")
    router.expert_bias_E.copy_(bias_E)
    model = torch.nn.ModuleDict({"router": router})
    if cast == "to_empty":
        model.to("meta").bfloat16().to_empty(device="cpu")
    else:
        model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
        assert torch.equal(router.expert_bias_E, bias_E)
    assert router.expert_bias_E.dtype == torch.float32
    assert router.weight_ED.dtype == (torch.float16 if cast == "half" else torch.bfloat16)
    assert model.double()["router"].expert_bias_E.dtype == torch.float64


# ---- construction ----------------------------------------------------------------------------------

DIVIDE = "groups have to divide the experts, and limited_groups has to be 1 to"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            {"score": "tanh"},
            """score is 'tanh'; use "softmax" or "sigmoid\"""",
        ),
        ({"groups": 3}, f"8 experts in 3 groups of which a token uses 1; {DIVIDE} 3"),
        ({"groups": 4, "limited_groups": 5}, f"8 experts in 4 groups of which a token uses 5; {DIVIDE} 4"),
        ({"groups": 4, "limited_groups": 0}, f"8 experts in 4 groups of which a token uses 0; {DIVIDE} 4"),
        ({"groups": 4, "judged_by": 3}, "groups of 2 experts judged by their 3 best; use 1 to 2"),
        ({"groups": 4, "judged_by": 0}, "groups of 2 experts judged by their 0 best; use 1 to 2"),
        (
            {"top_k": 9},
            "top_k is 9, but a token can choose among 8 experts (1 groups of 8); use 1 to 8",
        ),
        (
            {"top_k": 0},
            "top_k is 0, but a token can choose among 8 experts (1 groups of 8); use 1 to 8",
        ),
        (
            {"top_k": 5, "groups": 4, "limited_groups": 2},
            "top_k is 5, but a token can choose among 4 experts (2 groups of 2); use 1 to 4",
        ),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(arguments: dict[str, object], text: str) -> None:
    defaults: dict[str, object] = {"top_k": 2, "score": "sigmoid"}
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        TopKRouter(DIM, 8, **(defaults | arguments))  # pyright: ignore[reportArgumentType]


def test_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="8 experts in 0 groups"):
        TopKRouter(DIM, 8, 2, score="sigmoid", groups=0)


def test_one_group_is_not_judged() -> None:
    assert TopKRouter(DIM, 1, 1, score="sigmoid").choose(torch.ones(2, 1)).tolist() == [[0], [0]]


def test_parameters_at_the_start() -> None:
    torch.manual_seed(0)
    router = TopKRouter(64, 512, 2, score="sigmoid")
    assert router.weight_ED.std().item() == pytest.approx(64**-0.5, rel=0.05)
    assert router.expert_bias_E.tolist() == [0.0] * 512
    assert router.expert_bias_E.dtype == torch.float32
    router.expert_bias_E.fill_(1.0)
    router.reset_parameters()
    assert router.expert_bias_E.tolist() == [0.0] * 512
    assert set(router.state_dict()) == {"weight_ED", "expert_bias_E"}


def test_its_text_names_the_settings() -> None:
    assert repr(Setting(groups=4, limited_groups=2).router()) == (
        "TopKRouter(dim=6, num_experts=8, top_k=3, score='sigmoid', groups=4, limited_groups=2, normalize=True, "
        "route_scale=1.0)"
    )
