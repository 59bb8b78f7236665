"""Every known bug is caught, and leaves nothing behind."""

from dataclasses import replace

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.lab.validate.matrix import run_mutants
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS, mutated
from moe_dispatch.lab.validate.sources import debug_rows
from moe_dispatch.testing import RankPool
from tests.support.lab.small_matrix import PACKED, QuietWatcher, UncoveredRanks, default_corpus, row, small_config

MUTANTS_OF_SCHEMES = (
    "lse-left-out",
    "closed-row-believed",
    "remote-dkv-dropped",
    "block-twice",
    "padding-attended-in-ring",
    "chunk-border-off-by-one",
)

pytestmark = pytest.mark.usefixtures("uncovered")


@pytest.mark.sweep
def test_every_mutant_is_caught(rank_pool: RankPool) -> None:
    """On as few ranks and layers as show all of them: each mutant takes a run, and each control."""
    rows = (
        row("tp2 ep2", tp=2, ep=2),
        row("sp2 ep2, window", sp=2, ep=2, window=6),
        row("sp2 ep2, packed, zigzag", sp=2, ep=2, order="zigzag", **PACKED),
        row("ring2 ep2, packed, zigzag, chunk", sp=2, ep=2, scheme="ring", chunk=2, order="zigzag", **PACKED),
        row(
            "gather2 ep2, mask", sp=2, ep=2, scheme="gather", documents_as="mask", order="striped", stripe=4, **PACKED
        ),
    )
    config = small_config(*rows, ranks=2)
    config = replace(config, model=replace(config.model, layers=1, dense_layers=0))
    found = run_mutants(
        config,
        debug_rows(config),
        default_corpus(config),
        mutants=MUTANTS,
        ranks=UncoveredRanks(rank_pool, 2),
        watcher=QuietWatcher(),
    )
    assert {control.name for control in found.controls} == {row.name for row in rows}
    assert all(control.agrees for control in found.controls)
    quantities = {run.name: set(run.rows[-1].disagreeing) for run in found.mutants}
    assert set(quantities) == set(MUTANTS)
    assert [run.name for run in found.mutants if not run.caught] == []
    for name in ("gradients-averaged", "remote-dkv-dropped"):
        assert "gradients" in quantities[name]
        assert "logits" not in quantities[name]
    assert {run.rows[-1].name for run in found.mutants if run.name in MUTANTS_OF_SCHEMES} == {
        rows[3].name,
        rows[4].name,
    }
    assert quantities["stale-plan"] == {"loss curve"}
    assert all(
        "logits" in quantities[name]
        for name in ("positions-from-zero", "contiguous-positions", "exchange-transposed")
    )


def test_a_mutant_leaves_nothing_behind() -> None:
    sharding = TokenSharding(batch=2, seq=Partition((2, 1)))
    with mutated("offset-without-batch"):
        assert sharding.global_token(torch.arange(2), 1).tolist() == [2, 3]
    assert sharding.global_token(torch.arange(2), 1).tolist() == [2, 5]
    with (
        pytest.raises(ValueError, match="there is no mutant 'nope'; the mutants are offset-without-batch, "),
        mutated("nope"),
    ):
        pass
