"""Small rows of `validate`, for runs on the living ranks of the session."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self, TypeVar

from moe_dispatch.lab.validate.config.load import load_config
from moe_dispatch.lab.validate.config.tables import DebugRowConfig, ValidateConfig
from moe_dispatch.lab.validate.text import Corpus, batches_of_bytes, default_text
from moe_dispatch.testing import RankPool
from tests.support.compile import untraced
from tests.support.lab.configs import CONFIGS

T = TypeVar("T")
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

    def at(self, place: str) -> None:
        pass

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        return self.pool.run(fn, self.size, *args, timeout=120)[0]


class UncoveredRanks(PoolRanks):
    """Ranks without coverage, for rows of what other tests cover."""

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        return super().run(run_untraced, fn, *args)


@untraced()
def run_untraced(fn: Callable[..., T], *args: Any) -> T:
    return fn(*args)


def default_corpus(config: ValidateConfig) -> Corpus:
    """The text that Python ships, for all rows of ``config``."""
    shapes = [(row.batch, row.seq) for row in config.rows]
    return batches_of_bytes(default_text(), shapes, steps=config.train.steps)


def row(name: str, **values) -> DebugRowConfig:
    keep = "scheme" not in values
    return DebugRowConfig(**{"name": name, "batch": 3, "seq": 17, "heads": 2, "keep": keep, **values})


def small_config(*rows: DebugRowConfig, ranks: int = 4, dtypes: tuple[str, ...] = ("float64",)) -> ValidateConfig:
    config = load_config(CONFIGS / "validate" / "tiny.toml")
    return replace(config, ranks=ranks, rows=rows, dtypes=dtypes)
