import threading
from collections.abc import Iterator

import pytest
import torch

from tests.support.compile import untraced

pytest_plugins = ["moe_dispatch.pytest_plugin"]


def pytest_configure() -> None:
    """One thread per process, as on a rank: tensors are tiny here, and threads of OpenMP that wait for each other
    took up to ten times as long."""
    torch.set_num_threads(1)


@pytest.fixture
def uncovered() -> Iterator[None]:
    """Without coverage, here and on ranks that are threads: for many cases of what other tests cover. With it they
    take half as long again."""
    tracer = threading.gettrace()
    threading.settrace(None)  # pyright: ignore[reportArgumentType]  (None ends it)
    try:
        with untraced():
            yield
    finally:
        threading.settrace(tracer)  # pyright: ignore[reportArgumentType]
