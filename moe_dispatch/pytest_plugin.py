"""Fixtures of ranks: put ``pytest_plugins = ["moe_dispatch.pytest_plugin"]`` in conftest.py.

``rank_threads`` for numbers: any number of ranks, in milliseconds. ``rank_pool`` for what needs processes: gloo, a
rank that dies or hangs, what a process has one of. :mod:`moe_dispatch.testing` says more.
"""

from collections.abc import Iterator

import pytest

from moe_dispatch.testing import RankPool, RankThreads


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Ranks that live as long as the test session: ``rank_pool.run(fn, ranks, *args, timeout=60)``."""
    with RankPool() as pool:
        yield pool


@pytest.fixture(scope="session")
def rank_threads() -> Iterator[RankThreads]:
    """Ranks as threads of the test's process: ``rank_threads.run(fn, ranks, *args, timeout=60)``."""
    with RankThreads() as threads:
        yield threads
