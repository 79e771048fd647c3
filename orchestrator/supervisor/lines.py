"""Descriptors of a child read line by line in the event loop: control sockets, log pipes, the warm parent.

Non-blocking reads and writes on a bare descriptor: unlike a transport, it can be made at once, without awaiting.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

#: A longer line is cut into pieces of this size (bytes).
LONGEST = 1 << 20


class Lines:
    """Takes over `fd`. Calls `line` for each line, without its end, and `ended` once at end of file or error.

    Must be made in a running event loop.
    """

    def __init__(self, fd: int, line: Callable[[bytes], None], ended: Callable[[], None]) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._line = line
        self._ended = ended
        self._partial = b""
        self._unsent = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(fd, self._read)

    def send(self, data: bytes) -> None:
        """Writes in order; nothing once the other side has gone, since `ended` tells that."""
        if self._fd < 0:
            return
        if not self._unsent:
            self._loop.add_writer(self._fd, self._write)
        self._unsent += data
        self._write()

    def finish(self) -> None:
        """The other side is dead: reads what it left, then stops. `ended` is not called any more."""
        while self._fd >= 0 and self._take():
            pass
        self._stop()

    def close(self) -> None:
        """Stops; `ended` is not called any more. What was not read is lost."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._loop.remove_writer(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self) -> None:
        if self._take() is None:
            self._stop()
            self._ended()

    def _stop(self) -> None:
        self.close()
        rest, self._partial = self._partial, b""
        if rest:
            self._line(rest)

    def _take(self) -> bool | None:
        """One reading: True when there was something, False when there is nothing now, None at the end."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return None
        if not data:
            return None
        *lines, self._partial = (self._partial + data).split(b"\n")
        if len(self._partial) > LONGEST:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            self._line(line)
        return True

    def _write(self) -> None:
        try:
            written = os.write(self._fd, self._unsent)
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            written = len(self._unsent)
        self._unsent = self._unsent[written:]
        if not self._unsent:
            self._loop.remove_writer(self._fd)
