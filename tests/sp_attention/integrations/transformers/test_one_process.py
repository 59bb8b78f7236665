"""Transformers' models over ranks are the same model on one process, by Transformers' own eager code."""

from contextlib import nullcontext
from itertools import product

import pytest
import torch

from moe_dispatch.testing import RankThreads
from tests.support.transformers.cases import Layout, batch_of, differences, on_one_process, over_ranks
from tests.support.transformers.models import CONFIGS, FAMILIES
from tests.support.transformers.strict import strict_float64

LAYOUTS = (
    Layout(1, 4, 4, (17, 1, 10, 5)),
    Layout(1, 4, 4, (20, 0, 13, 0)),  # two ranks without tokens
    Layout(2, 2, 2, (21, 12)),  # experts twice
    Layout(2, 2, 4, (33, 0)),
    Layout(4, 1, 4, (33,)),  # of two rows: two ranks without any
)
STRICT = 1e-12
FLOAT32 = {"logits": 5e-5, "loss": 1e-5, "gradients": 5e-5}


def check(threads: RankThreads, name: str, kind: str, dtype: torch.dtype, layouts: tuple[Layout, ...]) -> None:
    batch = batch_of(kind)
    with strict_float64() if dtype == torch.float64 else nullcontext():
        reference = on_one_process(name, dtype, batch)
        assert min(float(gradient.norm()) for gradient in reference.gradients.values()) > 1e-4  # everything matters
        for layout in layouts:
            for run in threads.run(over_ranks, layout.ranks, name, dtype, batch, layout):
                for what, difference in differences(run, reference, batch.get("attention_mask")).items():
                    limit = STRICT if dtype == torch.float64 else FLOAT32.get(what, FLOAT32["gradients"])
                    assert difference <= limit, (layout, what)


@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # In a normal run each model meets two of the three.
        pytest.param(name, kind, marks=[pytest.mark.sweep] * ((i + j) % 3 == 0))
        for (i, name), (j, kind) in product(enumerate(CONFIGS), enumerate(("plain", "left", "packed")))
    ],
)
def test_logits_loss_and_gradients_in_strict_float64(rank_threads: RankThreads, name: str, kind: str) -> None:
    check(rank_threads, name, kind, torch.float64, LAYOUTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_loss_and_gradients_in_float32(rank_threads: RankThreads, name: str) -> None:
    check(rank_threads, name, "left", torch.float32, LAYOUTS[:1])


@pytest.mark.sweep
@pytest.mark.usefixtures("uncovered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_more_layouts(rank_threads: RankThreads, name: str, kind: str, dtype: torch.dtype) -> None:
    layouts = (
        *LAYOUTS,
        Layout(1, 1, 1, (33,)),
        Layout(1, 2, 1, (32, 1)),
        Layout(1, 8, 8, (5, 0, 9, 4, 4, 4, 7, 0)),
        Layout(2, 4, 8, (1, 30, 2, 0)),
        Layout(4, 2, 4, (0, 33)),
    )
    check(rank_threads, name, kind, dtype, layouts)
