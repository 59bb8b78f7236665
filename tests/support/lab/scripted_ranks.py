"""Ranks that run nothing: a script says what each row of `validate` finds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from moe_dispatch.lab.validate.config.tables import MatrixConfig
from moe_dispatch.lab.validate.results import RowResult
from moe_dispatch.lab.validate.rows import Row
from moe_dispatch.testing import RankError
from tests.support.lab.made_up_results import AGREEING, differing


@dataclass
class Script:
    """Stands in for the ranks: what each row finds, and what was asked of it."""

    results: dict[tuple[str, str], str] = field(default_factory=dict)  # (row, mutant) -> quantity, or "raise"
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # (row, dtype, mutant)
    references: list[tuple[int, int, str]] = field(default_factory=list)
    launches: set[tuple[int, float]] = field(default_factory=set)  # (ranks, timeout)

    def run_reference(self, config: MatrixConfig, row: Row, dtype: str, token_SBL: Tensor) -> str:
        self.references.append((*row.layout.shape, dtype))
        return f"reference {row.layout.shape} {dtype}"

    def run_row(
        self, config: MatrixConfig, row: Row, dtype: str, token_SBL: Tensor, reference: str, mutant: str
    ) -> RowResult:
        assert reference == f"reference {row.layout.shape} {dtype}"
        self.calls.append((row.name, dtype, mutant))
        result = replace(AGREEING, name=row.name, dtype=dtype, mesh=row.layout.mesh, shape=row.layout.shape)
        found = self.results.get((row.name, mutant), "")
        if found == "raise":
            raise RankError("rank 1 raised\nsomething")
        return differing(result, found, 0.5) if found else result


@dataclass
class PoolInProcess:
    """A RankPool without ranks."""

    script: Script

    def __enter__(self) -> "PoolInProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, fn: Callable[..., Any], ranks: int, *args: Any, timeout: float) -> list[Any]:
        self.script.launches.add((ranks, timeout))
        return [fn(*args)] * ranks
