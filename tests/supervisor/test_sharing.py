"""What the warm parent does so that its workers share more of its memory."""

from __future__ import annotations

import gc
import logging
import sys

import pytest

from orchestrator.supervisor import sharing
from orchestrator.worker import logs


def _private(kib: int) -> int:
    """How many pages one has to oneself that makes as many small objects of many sizes."""
    made: list[object] = []
    pages = set()
    for n in range(kib * 1024 // 272):
        made.append(bytes(n % 464 + 1))
        pages.add(id(made[-1]) >> 12)
    return len(pages)


def test_what_a_worker_makes_lies_together() -> None:
    """Some small objects are given up, which leaves holes everywhere; once they are filled, new ones lie close."""
    litter = [bytes(n % 464 + 1) for n in range(40_000)]
    del litter[::17]
    with_holes = _private(200)
    filling = sharing._fill()
    try:
        assert _private(200) < with_holes / 2
    finally:
        filling.clear()
    assert litter


def test_the_filling_is_given_up_and_stays_small() -> None:
    """Settled again and again, as in a session of many edits, the parent does not grow."""
    try:
        sizes = []
        filling: list[object] = []
        for _ in range(6):
            filling.clear()
            filling = sharing.settle()
            sizes.append(sum(map(sys.getsizeof, filling)))
        assert max(sizes) < sharing._MOST * 32
        assert sizes[-1] <= sizes[0] + 500_000
    finally:
        filling.clear()
        gc.unfreeze()


def test_before_there_is_a_worker_only_warnings_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A rehearsal imports handlers too; what they log then is said again by the worker."""
    for level in (logging.INFO, logging.WARNING):
        logs._Forward().handle(logging.makeLogRecord({"msg": logging.getLevelName(level), "levelno": level}))
    assert capsys.readouterr().err == "WARNING\n"
