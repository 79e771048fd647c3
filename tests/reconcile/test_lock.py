"""The apply lock, held by another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import LockedError
from orchestrator.reconcile.lock import apply_lock

HOLD = """
import asyncio, sys
from pathlib import Path
from orchestrator.reconcile.lock import apply_lock

async def main():
    async with apply_lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()

asyncio.run(main())
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "state")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


async def test_who_waits_too_long_is_told_who_holds_it(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    with pytest.raises(LockedError, match=f"process {holder.pid} since"):
        async with apply_lock(tmp_path / "state", patience=0.2):
            pytest.fail("two held the lock")
    holder.communicate()
    async with apply_lock(tmp_path / "state", patience=5.0):
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


async def test_a_holder_that_is_killed_holds_nothing(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    holder.communicate()
    async with apply_lock(tmp_path / "state", patience=0.0):
        assert (tmp_path / "state").is_dir()
