"""The worker's end of the control socket: JSON lines to and from the supervisor."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from typing import Any


class Control:
    """`send` may be called from any thread; what it sends goes through `redact`, since `status` shows it. A supervisor
    that is gone is noticed by reading, never by sending."""

    def __init__(self, sock: socket.socket, redact: Callable[[str], str] = str) -> None:
        self._socket = sock
        self._redact = redact
        self._lock = threading.Lock()
        self._buffer = b""
        self.lost = False

    def send(self, kind: str, **more: Any) -> None:
        shown = {name: self._redact(value) if isinstance(value, str) else value for name, value in more.items()}
        line = json.dumps({"type": kind, **shown}, default=str).encode() + b"\n"
        with self._lock:
            if self.lost:
                return
            try:
                self._socket.sendall(line)
            except OSError:
                self.lost = True

    def listen(self, receive: Callable[[dict[str, Any]], None], ended: Callable[[], None]) -> None:
        """Calls `receive` in the running loop for each message, and `ended` once at end of file."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            try:
                data = self._socket.recv(65536, socket.MSG_DONTWAIT)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            if not data:
                loop.remove_reader(self._socket.fileno())
                self.lost = True
                ended()
                return
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for line in lines:
                receive(json.loads(line))

        loop.add_reader(self._socket.fileno(), readable)  # asyncio would spell out a socket, to say it is a new one

    def unlisten(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.fileno())

    def at_end(self) -> bool:
        """Whether the supervisor has hung up, asked from another thread while the loop is blocked."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True
