"""Whether this machine can hold so many workers: asked before any is started, so that what runs is not harmed."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from orchestrator.errors import SupervisorError

#: Descriptors of ours for each worker: its control socket and log pipe, and until it is forked their other ends.
_FILES = 4
#: Descriptors that stay free: for commands, log files, brokers.
_SPARE = 64
#: Bytes that each worker takes at the very least: about half of what an idle one has to itself.
_MEMORY = 4 << 20


def check(workers: int) -> None:
    """Raises SupervisorError when there is no room for so many more workers, of open files or of memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    if soft != resource.RLIM_INFINITY and used + _SPARE + _FILES * workers > soft:
        fit = max(0, soft - used - _SPARE) // _FILES
        raise SupervisorError(
            f"no room for {workers} more workers: the limit of {soft} open files allows {fit}; none was started",
            hint="fewer replicas; or stop, raise the limit (ulimit -n, LimitNOFILE=), and apply again",
        )
    free = _available()
    if free is not None and _MEMORY * workers > free:
        raise SupervisorError(
            f"no room for {workers} more workers: {free >> 20} MiB of memory are free, and each takes at least "
            f"{_MEMORY >> 20}; none was started",
            hint="fewer replicas; or more hosts: each runs the same topology",
        )


def _available() -> int | None:
    """Bytes of memory that are free; None where the system does not say so (macOS)."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) << 10 if found else None
