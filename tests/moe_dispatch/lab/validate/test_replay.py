"""The routing of one process, replayed in rows of the matrix after routers moved: the same experts, and gradients of
one process whose plain loops are given these experts."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from moe_dispatch import ParallelMesh, RoutingRecord, record_routing, replay_routing
from moe_dispatch.judge.compare import compare
from moe_dispatch.judge.layout import Layout
from moe_dispatch.judge.results import Difference, Tolerance
from moe_dispatch.judge.subject import Outcome, Subject
from moe_dispatch.judge.train import run_on_mesh, run_reference
from moe_dispatch.lab.validate.config.load import load_config
from moe_dispatch.lab.validate.config.tables import ValidateConfig
from moe_dispatch.lab.validate.run import quiet, settings_of
from moe_dispatch.lab.validate.sources import debug_rows
from moe_dispatch.reference import ReferenceMoE
from moe_dispatch.testing import RankPool
from tests.support.compile import untraced
from tests.support.lab.configs import CONFIGS
from tests.support.lab.small_matrix import default_corpus, row, small_config
from tests.support.ranks import world

pytestmark = pytest.mark.usefixtures("uncovered")

STRICT = Tolerance(logits=1e-12, loss=1e-12, gradients=1e-12, loss_curve=1e-12)
ROW = row("dp2 tp2 ep4", dp=2, tp=2, ep=4)


class Replaying:
    """The debug model, with the experts of a record wherever it runs."""

    def __init__(self, subject: Subject, path: Path) -> None:
        self.subject, self.path = subject, path
        self.whole, self.share, self.whole_gradient = subject.whole, subject.share, subject.whole_gradient

    def step_whole(self, model: nn.Module, token_BL: Tensor, layout: Layout) -> Outcome:
        """The loops of the reference know no records."""
        for name, [choices] in RoutingRecord.load(self.path).layers.items():
            moe = cast(ReferenceMoE, model.get_submodule(name))
            expert_BLK = choices.expert_NK.to(torch.int64).unflatten(0, choices.grid)
            moe.forward = partial(ReferenceMoE.forward, moe, expert_BLK=expert_BLK)
        return self.subject.step_whole(model, token_BL, layout)

    def step_share(self, model: nn.Module, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        record = RoutingRecord.load(self.path)
        with record_routing(model) as again, replay_routing(model, record):
            outcome = self.subject.step_share(model, token_BL, layout, mesh)
        assert again.gather(world()) == record
        return outcome


class Recording(Replaying):
    """With routers that choose otherwise."""

    def step_share(self, model: nn.Module, token_BL: Tensor, layout: Layout, mesh: ParallelMesh) -> Outcome:
        for name, x in model.named_parameters():
            if name.endswith("router.weight_ED"):
                x.data.neg_()
        with record_routing(model) as record:
            outcome = self.subject.step_share(model, token_BL, layout, mesh)
        record.save(self.path)
        return outcome


def on_mesh(kind: Any, source: Any, layout: Layout, path: Path, token_SBL: Tensor, settings: Any) -> Any:
    with untraced(), quiet():
        return run_on_mesh(kind(source.load(), path), layout, torch.float64, token_SBL, settings)


def differences_of_rows(config: ValidateConfig, pool: RankPool, folder: Path) -> dict[str, tuple[Difference, ...]]:
    references: dict[Any, Any] = {}
    found = {}
    corpus = default_corpus(config)
    for one in debug_rows(config):
        token_SBL = corpus.token_SBL_of_shape[one.layout.shape][:1]
        path, settings = folder / f"{len(references)}.safetensors", settings_of(config)
        if one.data not in references:
            alone = replace(one.layout, dp=1, sp=1, tp=1, ep=1)
            pool.run(on_mesh, 1, Recording, one.source, alone, path, token_SBL, settings, timeout=300)
            subject = Replaying(one.source.load(), path)
            references[one.data] = path, run_reference(subject, one.layout, torch.float64, token_SBL, settings)
        path, reference = references[one.data]
        [mine, *_] = pool.run(on_mesh, config.ranks, Replaying, one.source, one.layout, path, token_SBL, settings)
        found[one.name] = compare(mine.training, reference, STRICT)
    return found


@pytest.mark.parametrize(
    "config",
    [
        small_config(ROW),
        pytest.param(load_config(CONFIGS / "validate/deepseek_v3_debug.toml"), marks=pytest.mark.sweep, id="default"),
    ],
)
def test_a_record_of_one_process_replays_in_every_row(
    rank_pool: RankPool, tmp_path: Path, config: ValidateConfig
) -> None:
    for name, differences in differences_of_rows(config, rank_pool, tmp_path).items():
        assert max(difference.value for difference in differences) <= 1e-12, (name, differences)  # measured: 2.5e-15
