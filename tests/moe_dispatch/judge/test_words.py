"""What numbers tell, of results that never ran."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dispatch.judge.compare import compare
from moe_dispatch.judge.layout import Layout
from moe_dispatch.judge.results import OnMesh, Reference, Tolerance, Training
from moe_dispatch.judge.words import words_of

LAYOUT = Layout(dp=2, sp=2, ep=4, batch=2, seq=4)
RANKS_BL = ((0, 0, 1, 1), (2, 2, 3, 3))
TOLERANCE = Tolerance(logits=1e-12, loss=1e-12, gradients=1e-12, loss_curve=1e-12)
DRAW = torch.Generator().manual_seed(0)
GRADIENTS = {name: torch.randn(3, 2, generator=DRAW, dtype=torch.float64) for name in ("a", "b", "experts.c")}
WANTED = Training(
    logits_BLV=torch.randn(2, 4, 5, generator=DRAW, dtype=torch.float64), losses=(3.0, 2.5), gradients=GRADIENTS
)
REFERENCE = Reference(training=WANTED, noise=dict.fromkeys(GRADIENTS, 7e-15), epsilon=2.0**-52)


def words(found: Training) -> list[str]:
    differences = compare(found, REFERENCE, TOLERANCE)
    return list(words_of(differences, OnMesh(training=found, rank_of_token_BL=RANKS_BL), REFERENCE, LAYOUT))


def with_gradients(**changed: Tensor) -> Training:
    return replace(WANTED, gradients={**GRADIENTS, **{name.replace("_", "."): x for name, x in changed.items()}})


def with_logits(*wrong: tuple[int, int]) -> Training:
    """Wrong at these places, or everywhere but at one dimension, -1."""
    logits_BLV = WANTED.logits_BLV.clone()
    for row, place in wrong:
        logits_BLV[row, place] += 1.0
    return replace(WANTED, logits_BLV=logits_BLV)


def test_nothing_is_said_of_what_agrees() -> None:
    assert words(WANTED) == []


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (
            with_gradients(a=GRADIENTS["a"] / 4, b=GRADIENTS["b"] / 4),
            "gradients of a, b are 1/4 (ep or ranks) of the ",
        ),
        (
            with_gradients(experts_c=GRADIENTS["experts.c"] * 2),
            "gradients of experts.c are 2 (dp or sp) times too large",
        ),
        (with_gradients(a=GRADIENTS["a"] * 3), "gradients of a are 3 times too large"),
        (with_gradients(a=GRADIENTS["a"] * -1.5), "gradients of a are -1.5 times the reference"),
        (with_gradients(a=GRADIENTS["a"] * 0), "gradients of a are 0: no gradient comes back to them"),
        (with_gradients(a=GRADIENTS["a"][:2]), "gradients of a are of another shape"),
        (
            with_gradients(a=GRADIENTS["a"] * torch.nan),
            "gradients of a are not there: nothing reached these parameters",
        ),
        (replace(WANTED, losses=(12.0, 2.5)), "the loss is 4 (ep or ranks) times that of one process"),
        (replace(WANTED, losses=(1.5, 2.5)), "the loss is 1/2 of that of one process"),
        (replace(WANTED, losses=(3.7, 2.5)), "logits agree and the loss does not: it counts targets, their mean or"),
        (replace(WANTED, losses=(3.0, 2.6)), "the first step agrees and later ones do not"),
        (with_logits((0, 2), (0, 3), (1, 3)), "logits agree on the tokens of ranks 0, 2 only"),
        (with_logits((0, 1), (0, 3), (1, 1), (1, 3)), "logits agree at the first 1 places of each row"),
        (with_logits((0, 0), (0, 2), (1, 1), (1, 2)), "logits agree at 4 of 8 tokens"),
        (replace(WANTED, logits_BLV=WANTED.logits_BLV + 1), "logits differ at every token"),
        (replace(WANTED, logits_BLV=WANTED.logits_BLV[:1]), "logits are (1, 4, 5), of one process (2, 4, 5)"),
    ],
)
def test_a_difference_that_tells_what_it_is(found: Training, told: str) -> None:
    (sentence,) = words(found)
    assert sentence.startswith(told)


def test_a_difference_that_tells_nothing() -> None:
    assert words(with_gradients(a=GRADIENTS["a"] + torch.eye(3, 2, dtype=torch.float64))) == []
    assert words(replace(WANTED, losses=(torch.nan, torch.nan))) == []
    (of_logits,) = words(replace(WANTED, logits_BLV=WANTED.logits_BLV + 1, losses=(3.7, 2.5)))
    assert of_logits == "logits differ at every token"


def test_a_model_that_is_random_is_told() -> None:
    reference = replace(REFERENCE, noise=dict.fromkeys(GRADIENTS, 0.5))
    found = OnMesh(training=with_logits((0, 0)), rank_of_token_BL=RANKS_BL)
    first, *_ = words_of(compare(found.training, reference, TOLERANCE), found, reference, LAYOUT)
    largest = max(gradient.abs().max().item() for gradient in GRADIENTS.values())
    assert first.startswith(f"gradients of one process move by {0.5 / largest:.0%} where its weights move by a unit")


def test_many_parameters_are_named_by_a_few() -> None:
    gradients = {f"w{i}": torch.ones(1, dtype=torch.float64) for i in range(6)} | {"x": torch.ones(1).double()}
    reference = Reference(
        training=replace(WANTED, gradients=gradients), noise=dict.fromkeys(gradients, 7e-15), epsilon=2.0**-52
    )
    found = replace(WANTED, gradients={name: x / (2 if name != "x" else 1) for name, x in gradients.items()})
    on_mesh = OnMesh(training=found, rank_of_token_BL=RANKS_BL)
    (sentence,) = words_of(compare(found, reference, TOLERANCE), on_mesh, reference, LAYOUT)
    assert sentence.startswith("gradients of w0, w1, w2 and 3 more are 1/2 (dp or sp) of the reference: ")
