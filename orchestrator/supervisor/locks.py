"""The two kinds of lock: one supervisor for each topology, one process for each slot. The kernel drops them when
their holder dies, however it dies.

A supervisor's is an flock, which binds two supervisors inside one process too. A slot's is a record lock, since that
kind is not inherited by what a handler forks: it says "this very process lives".
"""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from orchestrator.errors import LockedError
from orchestrator.worker import journal


class SupervisorLock:
    """Exclusive for one state folder; the file holds the pid of its holder."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / "supervisor.lock"
        self._fd = -1

    def acquire(self, topology: str) -> None:
        """Raises LockedError, naming the holder, when another supervisor runs."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode().strip() or "unknown"
            os.close(fd)
            raise LockedError(
                f"a supervisor already runs the topology {topology!r} (pid {pid})",
                hint="orchestrator apply hands a change over to it; orchestrator stop ends it",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Does nothing when it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def held(self) -> bool:
        """Whether some process holds it now."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False


def hold_slot(run_dir: str, agent: str, slot: int) -> None:
    """Takes the slot's lock for as long as this process lives. Raises LockedError when another process has it."""
    fd = os.open(lock_path(run_dir, agent, slot), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LockedError(f"another process holds {agent}.{slot}", hint="wait until it has ended") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)


def lock_path(run_dir: str | Path, agent: str, slot: int) -> str:
    return f"{run_dir}/{agent}.{slot}.lock"


def holder(path: str | Path) -> int | None:
    """The pid of the live process that holds the slot lock `path`; None when nobody does (0: not told yet)."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(fd, 32, 0).decode()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(fd)
    return None


def holders(run_dir: Path) -> dict[Path, int]:
    """Every slot lock that a live process holds, with its pid."""
    found = {path: holder(path) for path in run_dir.glob("*.lock")}
    return {path: pid for path, pid in found.items() if pid is not None}


def left_behind(run_dir: Path) -> set[tuple[str, int]]:
    """The slots (agent, number) whose journal names an event that was not settled."""
    found = set()
    for path in run_dir.glob("*.journal"):
        match = re.fullmatch(r"(.+)\.(\d+)\.journal", path.name)
        if match is not None and journal.read(path):
            found.add((match[1], int(match[2])))
    return found


def leaves_something(run_dir: Path, agent: str, slot: int) -> bool:
    """Whether the worker that ended there had events that it did not settle; an empty journal is removed."""
    path = run_dir / f"{agent}.{slot}.journal"
    if journal.read(path):
        return True
    path.unlink(missing_ok=True)
    return False
