"""How far two runs are apart."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dispatch.judge.compare import compare, difference
from moe_dispatch.judge.results import Reference, Tolerance, Training


def test_difference_is_relative_and_nan_disagrees() -> None:
    wanted = torch.tensor([[1.0, -4.0], [2.0, 0.0]])
    found = wanted + torch.tensor([[0.0, 0.0], [0.4, 0.0]])
    value, where = difference(found, wanted, 0.0)
    assert value == pytest.approx(0.1)
    assert where == (1, 0)
    assert difference(wanted * 1e-9, wanted * 0, 10.0)[0] == pytest.approx(4e-10)
    assert difference(wanted[:1], wanted, 0.0)[0] != difference(wanted[:1], wanted, 0.0)[0]  # NaN
    found[0, 1] = torch.nan
    value, where = difference(found, wanted, 0.0)
    assert value != value
    assert where == (0, 1)


TOLERANCE = Tolerance(logits=1e-12, loss=1e-12, gradients=1e-12, loss_curve=1e-12)


def reference_of(gradients: dict[str, Tensor], noise: dict[str, float]) -> Reference:
    training = Training(logits_BLV=torch.ones(1, 1, 1), losses=(1.0,), gradients=gradients)
    return Reference(training=training, noise=noise, epsilon=2.0**-52)


def off_by(error: float, gradient: float, noise: float, *, largest: float = 1.0) -> bool:
    """Whether a parameter with this gradient and noise, off by ``error``, agrees; beside one with the largest."""
    gradients = {
        "a": torch.tensor([gradient, 0.0], dtype=torch.float64),
        "b": torch.full((1,), largest, dtype=torch.float64),
    }
    reference = reference_of(gradients, {"a": noise, "b": 1e-15})
    found = replace(reference.training, gradients=gradients | {"a": gradients["a"] + error})
    return compare(found, reference, TOLERANCE)[2].agrees


def test_a_gradient_is_off_relative_to_itself_however_small_it_is() -> None:
    for size in (1.0, 1e-9, 1e-18):
        usual = 20 * 2.0**-52 * size
        assert off_by(0.9e-12 * size, size, usual)
        assert not off_by(1.1e-12 * size, size, usual)


def test_what_rounding_leaves_of_a_gradient_that_cancels_is_off_relative_to_its_noise() -> None:
    """Measured in float64: gradient 5e-19 with noise 6e-19, so terms of 1e-4."""
    assert off_by(2e-18, 5e-19, 6e-19)
    assert not off_by(1e-16, 5e-19, 6e-19)  # a bug of 1 in 10 ** 12 of the terms
    assert off_by(1e-17, 0.0, 0.0)  # e.g. of a query that sees one key: another kernel may round
    assert not off_by(1e-11, 0.0, 0.0)
    assert not off_by(1e-14, 0.0, 0.0, largest=1e-3)
    assert off_by(1e-10, 0.0, 0.0, largest=1e3)


def test_noise_hides_nothing_that_is_large_beside_the_largest_gradient() -> None:
    assert not off_by(1e-11, 1e-3, 1.0)
    assert not off_by(1e-11, 1e-3, torch.inf)


def test_a_parameter_without_gradient_is_the_worst() -> None:
    gradients = {"a": torch.ones(2), "b": torch.ones(2)}
    reference = reference_of(gradients, {"a": 0.0, "b": 0.0})
    found = replace(reference.training, gradients={"a": torch.full((2,), torch.nan), "b": torch.ones(2) * 1.5})
    logits, loss, gradient, curve = compare(found, reference, replace(TOLERANCE, gradients=1.0))
    assert logits.agrees
    assert loss.agrees
    assert curve.agrees
    assert gradient.where == "a"
    assert not gradient.agrees
