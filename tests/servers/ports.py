"""Ports for servers. Nobody else takes one before its server does, nor while that server is killed."""

from __future__ import annotations

import itertools
import os
import random
import socket

#: Below those that the system gives to clients, which reconnect all the time; each process of the run has its own.
_FIRST, _SHARE, _SHARES = 20_000, 1_500, 8
_number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _SHARES
_next = itertools.count(random.randrange(_SHARE))


def free_port() -> int:
    """One on loopback that nothing listens on, and that was not given out for long."""
    while True:
        port = _FIRST + _number * _SHARE + next(_next) % _SHARE
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do no harm
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
