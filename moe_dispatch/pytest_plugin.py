"""The ``rank_pool`` fixture: put ``pytest_plugins = ["moe_dispatch.pytest_plugin"]`` in conftest.py."""

from collections.abc import Iterator

import pytest

from moe_dispatch.testing import RankPool


@pytest.fixture(scope="session")
def rank_pool() -> Iterator[RankPool]:
    """Ranks that live as long as the test session: ``rank_pool.run(fn, ranks, *args, timeout=60)``."""
    with RankPool() as pool:
        yield pool
