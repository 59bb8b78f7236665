"""Compiling in tests that coverage watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def untraced() -> Iterator[None]:
    """Without coverage: it follows each line of torch's compiler, which then takes twice as long. What the library
    does in here is covered by the same calls uncompiled. Around a function of a rank: ``@untraced()``.
    """
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
