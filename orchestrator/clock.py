"""Wall time, asked for in one place, so that a test may put another clock below the same code.

Everything that compares or stores Unix seconds (History, leases, retention, timestamps) calls now(); what only
measures or waits uses the event loop's own time. orchestrator.testing drives both from one virtual clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_source: Callable[[], float] = time.time


def now() -> float:
    """Unix seconds."""
    return _source()


@contextmanager
def driven_by(source: Callable[[], float]) -> Iterator[None]:
    """now() answers `source()` until the block ends; for the whole process, threads of handlers included."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before
