"""The main job for real, small: every kind of parallelism agrees with one process, and every known bug is caught."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeVar
from unittest.mock import patch

import pytest
import torch

from moe_dispatch import Partition, TokenSharding
from moe_dispatch.lab.validate import run
from moe_dispatch.lab.validate.compare import compare, difference
from moe_dispatch.lab.validate.config import RowConfig, ToleranceConfig, ValidateConfig, load_config
from moe_dispatch.lab.validate.matrix import run_matrix, run_mutants
from moe_dispatch.lab.validate.mutants.mutants import MUTANTS, mutated
from moe_dispatch.lab.validate.results import QUANTITIES, Reference, RowResult
from moe_dispatch.lab.validate.run import reference_targets, run_reference, run_row
from moe_dispatch.lab.validate.text import default_text
from moe_dispatch.testing import RankPool

T = TypeVar("T")

CONFIGS = Path(__file__).parents[4] / "configs"
PACKED = {"batch": 1, "seq": 17, "documents": ((5, 6), (1, 1), (0, 2), (6, 8))}


class QuietWatcher:
    def started(self, what: str) -> None:
        pass

    def finished(self, what: str, outcome: str) -> None:
        pass


class PoolRanks:
    """The session's living ranks as ``validate`` wants them."""

    is_main = True

    def __init__(self, pool: RankPool, size: int) -> None:
        self.pool, self.size = pool, size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        return self.pool.run(fn, self.size, *args, timeout=120)[0]


def row(name: str, **values) -> RowConfig:
    return RowConfig(**{"name": name, "batch": 3, "seq": 17, "heads": 2, **values})


def small_config(*rows: RowConfig, dtypes: tuple[str, ...] = ("float64",)) -> ValidateConfig:
    config = load_config(CONFIGS / "tiny.toml")
    return replace(config, ranks=4, rows=rows, dtypes=dtypes)


ROWS = (
    row("FSDP2 x4", dp=4),
    row("dp2 tp2 ep4", dp=2, tp=2, ep=4),
    row("dp2 tp2 ep4, B = 1", dp=2, tp=2, ep=4, batch=1),
    row("sp2 tp2 ep4", sp=2, tp=2, ep=4),
    row("sp4 ep2, L = 3", sp=4, ep=2, seq=3),
    row("dp2 sp2 ep4, packed", dp=2, sp=2, ep=4, **PACKED),
    row("sp4 ep4, 1 head, window", sp=4, ep=4, heads=1, window=6),
)


def test_every_kind_of_parallelism_agrees_with_one_process_in_float64(rank_pool: RankPool) -> None:
    config = small_config(*ROWS)
    ranks = PoolRanks(rank_pool, 4)
    found = run_matrix(config, ROWS, default_text(), mutant="", ranks=ranks, watcher=QuietWatcher())
    for result in found.rows:
        assert result.agrees, (result.name, result.differences)
        assert [difference.quantity for difference in result.differences] == list(QUANTITIES)
        assert max(difference.value for difference in result.differences) < 1e-13, result  # measured: 3e-15
        assert all(loss > 0 for loss in result.losses)
        assert sum(map(sum, result.rows_sent_PP)) > 0


def test_float32_agrees_within_ten_times_what_was_measured(rank_pool: RankPool) -> None:
    config = small_config(ROWS[1], dtypes=("float32",))
    found = run_matrix(
        config, config.rows, default_text(), mutant="", ranks=PoolRanks(rank_pool, 4), watcher=QuietWatcher()
    )
    worst = max(difference.value for difference in found.rows[0].differences)
    assert 1e-9 < worst < 1e-5  # measured: 8e-7; exactly 0 would be float64 in disguise


def test_every_mutant_is_caught(rank_pool: RankPool) -> None:
    rows = (
        row("dp2 tp2 ep4", dp=2, tp=2, ep=4),
        row("dp2 sp2 ep4", dp=2, sp=2, ep=4),
        row("dp2 sp2 ep4, packed", dp=2, sp=2, ep=4, **PACKED),
        row("sp4 ep4, window", sp=4, ep=4, window=6),
    )
    config = small_config(*rows)
    found = run_mutants(
        config, rows, default_text(), mutants=MUTANTS, ranks=PoolRanks(rank_pool, 4), watcher=QuietWatcher()
    )
    assert all(control.agrees for control in found.controls)
    quantities = {run.name: set(run.rows[-1].disagreeing) for run in found.mutants}
    assert set(quantities) == set(MUTANTS)
    assert [run.name for run in found.mutants if not run.caught] == []
    assert "gradients" in quantities["gradients-averaged"]
    assert "logits" not in quantities["gradients-averaged"]
    assert quantities["stale-plan"] == {"loss curve"}
    assert "logits" in quantities["positions-from-zero"] & quantities["exchange-transposed"]


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


def test_targets_of_the_reference_stop_at_documents_and_padding() -> None:
    assert reference_targets([[10, 11, 12]], ()) == [11, 12, -100]
    documents = ((2, 3), (1, 1), (0, 1), (2, 2))
    assert reference_targets([[10, 11, 99, 12, 99, 13, 14]], documents) == [11, -100, -100, -100, -100, 14, -100]


def test_the_reference_of_one_process_learns_and_is_reproducible() -> None:
    config = small_config(ROWS[0])
    first = run_reference(config, ROWS[0], "float64", default_text())
    again = run_reference(config, ROWS[0], "float64", default_text())
    assert first.losses == again.losses
    assert first.losses[-1] < first.losses[0]
    assert all(torch.equal(gradient, again.gradients[name]) for name, gradient in first.gradients.items())


def run_row_with_one_rank_out_of_order(rank: int, config: ValidateConfig, row: RowConfig, *args: Any) -> RowResult:
    """Rank 2 fails in the first row, in the middle of it."""
    out_of_order = rank == 2 and row.name == config.rows[0].name
    broken = patch.object(run, "gather_tokens", side_effect=RuntimeError("this rank is out of order"))
    with broken if out_of_order else nullcontext():
        return run_row(config, row, *args)


class OneRankOutOfOrder(PoolRanks):
    def run(self, fn: Callable[..., T], *args: Any) -> T:
        assert fn is run_row
        return super().run(run_row_with_one_rank_out_of_order, *args)  # type: ignore[return-value]


def test_a_row_that_breaks_off_is_told_and_the_next_one_runs(rank_pool: RankPool) -> None:
    config = small_config(ROWS[1], ROWS[2])
    ranks = OneRankOutOfOrder(rank_pool, 4)
    found = run_matrix(config, config.rows, default_text(), mutant="", ranks=ranks, watcher=QuietWatcher())
    broken, next_row = found.rows
    assert "rank 2 raised" in broken.error
    assert "this rank is out of order" in broken.error
    assert not broken.agrees
    assert next_row.agrees


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
