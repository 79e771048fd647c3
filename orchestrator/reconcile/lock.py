"""One apply at a time (walk "apply"): a lock file beside the topology, which says who holds it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from orchestrator.errors import LockedError


@contextlib.asynccontextmanager
async def apply_lock(state_dir: Path, *, patience: float = 30.0) -> AsyncIterator[None]:
    """Holds `<state_dir>/apply.lock`, waiting up to `patience` seconds. The kernel frees it with the process, however
    that ends. Raises LockedError naming the holder."""
    path = state_dir / "apply.lock"
    handle = _open(path)
    try:
        await _take(handle, path, patience)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} since {time.strftime('%H:%M:%S')}".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _open(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


async def _take(handle: int, path: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                raise LockedError(
                    f"another apply works on this topology: {holder} holds {path}",
                    hint="wait for it to end, or answer its question; then try again",
                ) from None
            await asyncio.sleep(0.05)
        else:
            return
