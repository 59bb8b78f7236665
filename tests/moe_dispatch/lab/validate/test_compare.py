"""How far two runs are apart."""

from dataclasses import replace

import pytest
import torch

from moe_dispatch.lab.validate.compare import compare, difference
from moe_dispatch.lab.validate.config.tables import ToleranceConfig
from moe_dispatch.lab.validate.results import Reference


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


def test_a_parameter_without_gradient_is_the_worst() -> None:
    gradients = {"a": torch.ones(2), "b": torch.ones(2)}
    reference = Reference(logits_BLV=torch.ones(1, 1, 1), losses=(1.0,), gradients=gradients)
    found = replace(reference, gradients={"a": torch.full((2,), torch.nan), "b": torch.ones(2) * 1.5})
    tolerance = ToleranceConfig(logits=1e-9, loss=1e-9, gradients=1.0, loss_curve=1e-9)
    logits, loss, gradient, curve = compare(found, reference, tolerance)
    assert logits.agrees
    assert loss.agrees
    assert curve.agrees
    assert gradient.where == "a"
    assert not gradient.agrees
