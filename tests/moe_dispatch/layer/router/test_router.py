"""The router against a loop over tokens: scores, choices, weights, precision, gradients."""

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor

from moe_dispatch import TopKRouter
from moe_dispatch.reference import token_experts, token_scores, token_weights
from tests.support.dispatch.routers import (
    DIM,
    EXPERTS,
    SETTINGS,
    Setting,
    experts_by_hand,
    scores_by_hand,
    tokens,
    weights_by_hand,
)


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
