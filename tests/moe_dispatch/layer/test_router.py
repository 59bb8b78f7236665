"""The router against a loop over tokens in plain Python floats, written from the papers and not from the code."""

import copy
import io
import math
import re
from dataclasses import dataclass, fields
from typing import Literal

import pytest
import torch
from torch import Tensor

from moe_dispatch import TopKRouter
from moe_dispatch.reference import token_experts, token_scores, token_weights

DIM, EXPERTS = 6, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The arguments of a router over 8 experts."""

    score: Literal["softmax", "sigmoid"] = "sigmoid"
    top_k: int = 3
    groups: int = 1
    limited_groups: int = 1
    judged_by: int = 2
    normalize: bool = True
    route_scale: float = 1.0

    def __str__(self) -> str:
        values = {part.name: (getattr(self, part.name), part.default) for part in fields(self)}
        return ", ".join(f"{name}={value}" for name, (value, default) in values.items() if value != default)

    def router(self, dtype: torch.dtype = torch.float64) -> TopKRouter:
        """A router with a bias large enough to change most choices."""
        torch.manual_seed(0)
        router = TopKRouter(
            DIM,
            EXPERTS,
            self.top_k,
            score=self.score,
            groups=self.groups,
            limited_groups=self.limited_groups,
            judged_by=self.judged_by,
            normalize=self.normalize,
            route_scale=self.route_scale,
        ).to(dtype)
        router.expert_bias_E.copy_(torch.randn(EXPERTS) / 4)
        return router


SETTINGS = [
    Setting(),
    Setting(score="softmax"),
    Setting(normalize=False),
    Setting(score="softmax", normalize=False, route_scale=16.0),
    Setting(route_scale=2.5),
    Setting(top_k=1),
    Setting(top_k=1, normalize=False),
    Setting(top_k=8),
    Setting(groups=4, limited_groups=2, judged_by=1, score="softmax"),
    Setting(groups=4, limited_groups=2, judged_by=2, route_scale=2.5),
    Setting(groups=2, limited_groups=1, judged_by=1),
    Setting(groups=2, limited_groups=1, judged_by=3, top_k=4),
    Setting(groups=4, limited_groups=4, judged_by=2, normalize=False),
    Setting(groups=8, limited_groups=3, judged_by=1),
]


def tokens(shape: tuple[int, ...] = (2, 5), dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(dtype)


# ---- the loop: one token at a time, in Python floats -----------------------------------------------


def scores_by_hand(x: list[float], gate: list[list[float]], score: str) -> list[float]:
    logits = [math.fsum(a * b for a, b in zip(x, row, strict=True)) for row in gate]
    if score == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    total = math.fsum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


def experts_by_hand(scores: list[float], bias: list[float], setting: Setting) -> list[int]:
    """Greedy: strike the worst group until enough are left, then take the best expert K times."""
    size = len(scores) // setting.groups
    worth = {}
    for group in range(setting.groups):
        members = [scores[group * size + i] + bias[group * size + i] for i in range(size)]
        worth[group] = sum(sorted(members)[-setting.judged_by :])
    while len(worth) > setting.limited_groups:
        del worth[min(worth, key=lambda group: worth[group])]
    open_ids = [expert for expert in range(len(scores)) if expert // size in worth]
    chosen: list[int] = []
    while len(chosen) < setting.top_k:
        chosen.append(max(set(open_ids) - set(chosen), key=lambda expert: scores[expert] + bias[expert]))
    return chosen


def weights_by_hand(scores: list[float], chosen: list[int], setting: Setting) -> list[float]:
    total = math.fsum(scores[expert] for expert in chosen) if setting.normalize else 1.0
    return [setting.route_scale * scores[expert] / total for expert in chosen]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_scores_choice_and_weights_equal_a_loop_over_tokens(setting: Setting) -> None:
    router, x_BLD = setting.router(), tokens((3, 7))
    scores_BLE = router(x_BLD)
    expert_BLK = router.choose(scores_BLE)
    weight_BLK = router.weigh(scores_BLE, expert_BLK)
    assert expert_BLK.dtype == torch.int64
    assert not expert_BLK.requires_grad
    gate, bias = router.weight_ED.tolist(), router.expert_bias_E.tolist()
    for token, x in enumerate(x_BLD.flatten(0, 1).tolist()):
        scores = scores_by_hand(x, gate, setting.score)
        chosen = experts_by_hand(scores, bias, setting)
        assert expert_BLK.flatten(0, 1)[token].tolist() == chosen
        assert scores_BLE.flatten(0, 1)[token].tolist() == pytest.approx(scores, rel=1e-12)
        assert weight_BLK.flatten(0, 1)[token].tolist() == pytest.approx(
            weights_by_hand(scores, chosen, setting), rel=1e-12
        )


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_reference_of_the_library_equals_the_same_loop(setting: Setting) -> None:
    router = setting.router()
    gate, bias = router.weight_ED.tolist(), router.expert_bias_E.tolist()
    for x_D in tokens().flatten(0, 1):
        scores_E = token_scores(x_D, router)
        scores = scores_by_hand(x_D.tolist(), gate, setting.score)
        chosen = experts_by_hand(scores, bias, setting)
        assert scores_E.tolist() == pytest.approx(scores, rel=1e-12)
        assert token_experts(scores_E, router) == chosen
        weights = [weight.item() for weight in token_weights(scores_E, chosen, router)]
        assert weights == pytest.approx(weights_by_hand(scores, chosen, setting), rel=1e-12)


# ---- the choice ------------------------------------------------------------------------------------

# Three groups of two: {.9 .0} has the best expert, {.5 .5} the best sum of two, {.6 .1} is second by its best one.
GROUPED_SCORES = [0.9, 0.0, 0.5, 0.5, 0.6, 0.1]


@pytest.mark.parametrize(
    ("limited_groups", "judged_by", "chosen"),
    [(1, 1, {0, 1}), (1, 2, {2, 3}), (2, 1, {0, 4}), (3, 1, {0, 4})],
)
def test_a_token_stays_in_its_best_groups(limited_groups: int, judged_by: int, chosen: set[int]) -> None:
    router = TopKRouter(DIM, 6, 2, score="softmax", groups=3, limited_groups=limited_groups, judged_by=judged_by)
    assert set(router.choose(torch.tensor([[GROUPED_SCORES]])).flatten().tolist()) == chosen


def test_the_bias_decides_between_groups_too() -> None:
    router = TopKRouter(DIM, 6, 2, score="softmax", groups=3, limited_groups=1, judged_by=1)
    router.expert_bias_E[5] = 2.0
    assert router.choose(torch.tensor([[GROUPED_SCORES]])).flatten().tolist() == [5, 4]


def test_the_bias_changes_ids_and_never_scores_or_weights() -> None:
    router, x_BLD = Setting(normalize=False).router(), tokens()
    with torch.no_grad():
        router.expert_bias_E.zero_()
        scores_BLE = router(x_BLD)
        plain_BLK = router.choose(scores_BLE)
        router.expert_bias_E.copy_(torch.arange(EXPERTS) * 10.0)
        biased_BLK = router.choose(scores_BLE)
        assert torch.equal(router(x_BLD), scores_BLE)
    assert biased_BLK.flatten(0, 1).tolist() == [[7, 6, 5]] * 10
    assert not torch.equal(plain_BLK, biased_BLK)
    assert torch.equal(router.weigh(scores_BLE, biased_BLK), scores_BLE.gather(-1, biased_BLK))


def test_any_leading_shape_also_an_empty_one() -> None:
    router = Setting(groups=4, limited_groups=2).router()
    for shape in ((4,), (0, 5), (2, 0), (2, 1, 3)):
        scores_BLE = router(tokens(shape))
        expert_BLK = router.choose(scores_BLE)
        assert scores_BLE.shape == (*shape, EXPERTS)
        assert router.weigh(scores_BLE, expert_BLK).shape == expert_BLK.shape == (*shape, 3)


# ---- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 3])
def test_normalized_weights_sum_to_the_route_scale(top_k: int) -> None:
    router = Setting(top_k=top_k, route_scale=2.5).router()
    scores_BLE = router(tokens())
    sum_BL = router.weigh(scores_BLE, router.choose(scores_BLE)).sum(-1)
    torch.testing.assert_close(sum_BL, torch.full_like(sum_BL, 2.5), rtol=1e-12, atol=0)


def test_with_one_choice_normalization_leaves_the_router_without_gradient() -> None:
    for normalize in (True, False):
        router = Setting(top_k=1, normalize=normalize).router()
        scores_BLE = router(tokens())
        router.weigh(scores_BLE, router.choose(scores_BLE)).sum().backward()
        grad_ED = router.weight_ED.grad
        assert grad_ED is not None
        assert (grad_ED.abs().max() < 1e-12) == normalize


def test_no_expert_has_weight_0_and_no_gradient() -> None:
    router = Setting(score="softmax", normalize=False).router()
    scores_TE = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0]] * 3, dtype=torch.float64, requires_grad=True)
    expert_TK = torch.tensor([[-1, 2, 3], [0, -1, -1], [-1, -1, -1]])
    weight_TK = router.weigh(scores_TE, expert_TK)
    assert weight_TK.tolist() == [[0, 0.3, 0.4], [0.1, 0, 0], [0, 0, 0]]
    weight_TK.sum().backward()
    assert scores_TE.grad is not None
    # Expert 0 is where a careless gather of id -1 would land.
    assert scores_TE.grad.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8]


def test_normalization_leaves_out_no_expert() -> None:
    router = Setting(score="softmax").router()
    scores_TE = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0]] * 2, dtype=torch.float64, requires_grad=True)
    weight_TK = router.weigh(scores_TE, torch.tensor([[-1, 1, 2], [-1, -1, -1]]))
    torch.testing.assert_close(weight_TK.detach(), torch.tensor([[0, 0.4, 0.6], [0, 0, 0]], dtype=torch.float64))
    weight_TK[:, 1].sum().backward()
    assert scores_TE.grad is not None
    assert torch.isfinite(scores_TE.grad).all()
    assert scores_TE.grad[:, 0].tolist() == [0, 0]
    assert scores_TE.grad[1].tolist() == [0] * 8


# ---- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype, score: Literal["softmax", "sigmoid"]) -> None:
    router, x_BLD = Setting(score=score).router(dtype), tokens((4, 25), dtype)
    gate = router.weight_ED.double().tolist()
    scores_BLE = router(x_BLD)
    assert scores_BLE.dtype == torch.float32
    want = [scores_by_hand(x, gate, score) for x in x_BLD.double().flatten(0, 1).tolist()]
    error = (scores_BLE.flatten(0, 1).double() - torch.tensor(want, dtype=torch.float64)).abs().max().item()
    assert error < 1e-6  # measured 1e-7; a product in bfloat16 is off by 4e-3, one in float16 by 4e-4


def test_float64_stays_float64() -> None:
    router = Setting().router()
    scores_BLE = router(tokens())
    assert scores_BLE.dtype == torch.float64
    assert router.weigh(scores_BLE, router.choose(scores_BLE)).dtype == torch.float64
    assert Setting().router(torch.float32)(tokens()).dtype == torch.float64


def test_autocast_does_not_lower_the_precision() -> None:
    router, x_BLD = Setting().router(torch.float32), tokens(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside_BLE = router(x_BLD)
    assert inside_BLE.dtype == torch.float32
    assert torch.equal(inside_BLE, router(x_BLD))


# ---- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients_equal_finite_differences(setting: Setting) -> None:
    router = setting.router()
    expert_BLK = router.choose(router(tokens()))

    def weights_and_scores(x_BLD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
        scores_BLE = torch.func.functional_call(router, {"weight_ED": weight_ED}, (x_BLD,))
        return router.weigh(scores_BLE, expert_BLK), scores_BLE

    inputs = (tokens().requires_grad_(), router.weight_ED.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(weights_and_scores, inputs)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradients_equal_those_of_the_reference(setting: Setting) -> None:
    router, pull_TK = setting.router(), torch.randn(10, setting.top_k, dtype=torch.float64)
    reference = copy.deepcopy(router)
    x_TD, reference_x_TD = tokens((10,)).requires_grad_(), tokens((10,)).requires_grad_()
    scores_TE = router(x_TD)
    (router.weigh(scores_TE, router.choose(scores_TE)) * pull_TK).sum().backward()
    loss = torch.zeros((), dtype=torch.float64)
    for x_D, pull_K in zip(reference_x_TD, pull_TK, strict=True):
        scores_E = token_scores(x_D, reference)
        loss = (
            loss
            + (torch.stack(token_weights(scores_E, token_experts(scores_E, reference), reference)) * pull_K).sum()
        )
    loss.backward()
    torch.testing.assert_close(x_TD.grad, reference_x_TD.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(router.weight_ED.grad, reference.weight_ED.grad, rtol=1e-12, atol=1e-12)
    assert router.expert_bias_E.grad is None


# ---- bias update -----------------------------------------------------------------------------------


def test_the_bias_moves_one_step_towards_the_mean_load() -> None:
    router = TopKRouter(DIM, 4, 2, score="sigmoid")
    router.expert_bias_E.fill_(1.0)
    router.update_bias(torch.tensor([10, 0, 4, 2]), rate=0.125)  # mean 4
    assert router.expert_bias_E.tolist() == [0.875, 1.125, 1.0, 1.125]
    router.update_bias(torch.tensor([3, 3, 3, 3]), rate=0.125)
    assert router.expert_bias_E.tolist() == [0.875, 1.125, 1.0, 1.125]


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
    router = TopKRouter(DIM, 4, 2, score="sigmoid").bfloat16()
    with pytest.raises(
        ValueError, match=r"torch\.bfloat16, in which small steps are lost; keep it in float32"
    ) as caught:
        router.update_bias(torch.tensor([1, 0, 0, 0]), rate=0.001)
    assert "router.expert_bias_E = router.expert_bias_E.float()" in str(caught.value)
    router.expert_bias_E = router.expert_bias_E.float()  # the remedy of the message
    router.update_bias(torch.tensor([1, 0, 0, 0]), rate=0.001)
    assert router.expert_bias_E.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])
    router.double().update_bias(torch.tensor([1, 0, 0, 0]), rate=0.001)


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
