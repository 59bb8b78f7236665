"""What each parameter of a model is, and which device a group can send from."""

from unittest.mock import patch

import pytest
import torch
from torch import nn

from moe_dispatch.testing import RankThreads
from moe_dispatch.training.parameters import Parameters, device_of, within_reach
from tests.support.dispatch.training import LAYOUTS
from tests.support.ranks import world


@pytest.mark.parametrize(
    ("backend", "accelerator", "device"),
    [
        ("gloo", "cuda", "cpu"),
        ("nccl", "cuda", "cuda"),
        ("xccl", "xpu", "xpu"),
        ("cpu:gloo,cuda:nccl", "cuda", "cpu"),
        ("cpu:threaded", None, "cpu"),
        ("something", None, "cpu"),
    ],
)
def test_words_travel_from_the_cpu_where_the_group_can(backend: str, accelerator: str | None, device: str) -> None:
    found = None if accelerator is None else torch.device(accelerator)
    with (
        patch("torch.distributed.get_backend", return_value=backend),
        patch("torch.accelerator.current_accelerator", return_value=found),
    ):
        assert device_of(None).type == device  # type: ignore[arg-type]


def test_only_what_is_on_the_cpu_may_have_to_move() -> None:
    with patch("moe_dispatch.training.parameters.device_of", return_value=torch.device("meta")):
        assert within_reach(torch.zeros(2), None).is_meta  # type: ignore[arg-type]
    with patch("moe_dispatch.training.parameters.device_of", return_value=torch.device("cpu")):
        assert within_reach(torch.zeros(2, device="meta"), None).is_meta  # type: ignore[arg-type]


def kinds(rank: int) -> tuple[list[str], list[str]]:
    """Of a model in which a weight of the experts is also used elsewhere, and one weight is used twice."""
    model = LAYOUTS[2].part(world())
    experts = model.moe.get_submodule("experts")
    model.last.register_parameter("tied", nn.Parameter(model.first.weight.detach()))
    model.last.weight = model.first.weight
    model.first.register_parameter("from_experts", experts.get_parameter("gate_eDF"))
    found = Parameters.of(model)
    return list(found.replicated), list(found.experts)


def test_each_parameter_is_found_once_and_experts_by_what_they_are(rank_threads: RankThreads) -> None:
    """Not by their names; what has no elements is left out."""
    replicated = ["first.weight", "first.bias", "moe.router.weight_ED"]
    replicated += [f"moe.shared.{name}.weight" for name in ("gate", "up", "down")] + ["last.bias", "last.tied"]
    experts = ["first.from_experts", "moe.experts.up_eDF", "moe.experts.down_eFD"]
    found = rank_threads.run(kinds, 3)
    assert [names for names, _ in found] == [replicated] * 3
    assert [names for _, names in found] == [experts, [], experts]
