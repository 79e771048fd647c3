"""The journal outlives its process and tells a successor exactly what had started."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from orchestrator.brokers.base import Ended
from orchestrator.worker.journal import Journal, Record, State, forget, read


def test_a_killed_process_leaves_what_it_had_begun(tmp_path: Path) -> None:
    path = tmp_path / "a.0.journal"
    pid = os.fork()
    if pid == 0:
        journal = Journal.create(path, 8)
        for slot, state in enumerate(State):
            journal.begin(slot, state, 7, b"token-%d" % slot)
        journal.begin(6, State.STARTED, 7, b"settled")
        journal.set(6, State.FREE)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read(path) == [
        Record(Ended.STARTED, 7, b"token-1"),
        Record(Ended.STARTED_ALONE, 7, b"token-2"),
        Record(Ended.BLAMED, 7, b"token-3"),
        Record(Ended.RETURNED, 7, b"token-4"),
        Record(Ended.RETURNED, 7, b"token-5"),
    ]


def test_a_new_journal_replaces_the_old_whatever_its_size(tmp_path: Path) -> None:
    path = tmp_path / "a.0.journal"
    Journal.create(path, 64).begin(63, State.STARTED, 1, b"last")
    assert read(path) == [Record(Ended.STARTED, 1, b"last")]
    Journal.create(path, 2)
    assert read(path) == []


@pytest.mark.parametrize("content", [b"", b"OJRN", b"OJRN" + b"\xff" * 8, b"\0" * 4096, os.urandom(999)])
def test_a_file_that_is_no_journal_of_ours_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    assert read(tmp_path / "x") == []


def test_the_folder_of_a_journal_is_made(tmp_path: Path) -> None:
    Journal.create(tmp_path / "not" / "yet" / "a.0.journal", 1)
    assert [path.name for path in (tmp_path / "not" / "yet").iterdir()] == ["a.0.journal"]


def test_a_cut_journal_is_empty_and_a_missing_one_too(tmp_path: Path) -> None:
    path = tmp_path / "a.0.journal"
    Journal.create(path, 4).begin(0, State.STARTED, 1, b"x")
    path.write_bytes(path.read_bytes()[:-1])
    assert read(path) == []
    assert read(tmp_path / "none") == []


def test_a_token_has_400_bytes_at_most(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "j", 2)
    journal.begin(1, State.STARTED, 1, b"x" * 400)
    assert read(tmp_path / "j") == [Record(Ended.STARTED, 1, b"x" * 400)]
    with pytest.raises(ValueError, match="400"):
        journal.begin(0, State.STARTED, 1, b"x" * 401)


def test_what_was_told_is_not_told_again_but_still_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.0.journal"
    journal = Journal.create(path, 4)
    journal.begin(0, State.STARTED, 1, b"one")
    journal.begin(1, State.STARTED, 2, b"two")
    forget(path, 1)
    assert read(path) == [Record(Ended.STARTED, 1, b""), Record(Ended.STARTED, 2, b"two")]
