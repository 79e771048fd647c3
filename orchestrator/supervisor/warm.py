"""The warm parent: a single-threaded process that has imported everything a worker needs, and forks workers.

    python -m orchestrator.supervisor.warm FD [ENTRY]

FD is a stream socket to the supervisor; each message is a line of JSON, both ways:

    <- {"op": "topology", "key", "dump"}                 parsed once, shared with each worker by fork
    <- {"op": "forget", "keys"}
    <- {"op": "spawn", "id", "key", "agent", "slot", "run_dir", "rehearsal"}   with two descriptors: control, log
    <- {"op": "kill", "id"}                              SIGKILL; safe, since only we reap
    -> {"topology", "error", "hint"} · {"spawned", "pid"} · {"exited", "code", "signal"}

End of file means that the supervisor is gone: the workers are told to end, and killed when they do not.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from orchestrator.brokers import registry
from orchestrator.errors import OrchestratorError
from orchestrator.supervisor import sharing
from orchestrator.supervisor.locks import hold_slot
from orchestrator.supervisor.rehearsing import rehearse
from orchestrator.topology import restore
from orchestrator.topology.model import Topology
from orchestrator.worker.spec import WorkerSpec

ENTRY = "orchestrator.worker.main:run"

#: Seconds that workers get to end after the supervisor has gone.
LAST_DRAIN = 10.0

Entry = Callable[[WorkerSpec, socket.socket], int]


class Warm:
    """The loop of the warm parent. `run` returns when the supervisor and all workers have gone."""

    def __init__(self, supervisor: socket.socket, entry: Entry) -> None:
        self._supervisor = supervisor
        self._entry = entry
        self._topologies: dict[str, Topology] = {}
        self._pids: dict[int, int] = {}  # id -> pid
        self._ids: dict[int, int] = {}  # pid -> id
        self._filling: list[object] = []
        self._buffer = b""
        self._descriptors: deque[int] = deque()
        self._wake, waker = socket.socketpair()
        self._wake.setblocking(False)
        waker.setblocking(False)
        self._waker = waker

    def run(self) -> None:
        """Serves the supervisor until end of file, then ends the workers."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._waker.fileno())
        with selectors.DefaultSelector() as selector:
            selector.register(self._supervisor, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wake in ready:
                    self._reap()
                if self._supervisor in ready and not self._receive():
                    break
        self._end()

    def _receive(self) -> bool:
        """Reads what is there; False at end of file."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._supervisor, 1 << 18, 64)
        except ConnectionResetError:
            return False
        self._descriptors.extend(descriptors)
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self._handle(json.loads(line))
        return bool(data)

    def _handle(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "topology":
                self._remember(message["key"], message["dump"])
            case "forget":
                for key in message["keys"]:
                    self._topologies.pop(key, None)
            case "spawn":
                self._spawn(message)
            case "kill":
                if (pid := self._pids.get(message["id"])) is not None:
                    os.kill(pid, signal.SIGKILL)

    def _remember(self, key: str, dump: str) -> None:
        self._filling.clear()
        try:
            topology = restore(dump.encode())
            for broker in topology.brokers.values():
                registry.adapter(broker.kind)
                if broker.embedded:
                    importlib.import_module("orchestrator.brokers.embedded.server")  # how workers find it
        except OrchestratorError as error:
            self._tell({"topology": key, "error": error.message, "hint": error.hint})
            return
        self._topologies[key] = topology
        str(topology.root)  # a Path keeps its text, so workers find it there
        self._filling = sharing.settle()
        self._tell({"topology": key, "error": None, "hint": None})

    def _spawn(self, message: dict[str, Any]) -> None:
        control, log = self._descriptors.popleft(), self._descriptors.popleft()
        spec = WorkerSpec(
            topology=self._topologies[message["key"]],
            agent=message["agent"],
            slot=message["slot"],
            run_dir=message["run_dir"],
        )
        pid = os.fork()
        if pid == 0:
            self._tell({"spawned": message["id"], "pid": os.getpid()})  # so its pid is known before it is ready
            self._close()
            if message["rehearsal"]:
                become(spec, control, log, rehearse)
            become(spec, control, log, self._holding)
        os.close(control)
        os.close(log)
        self._pids[message["id"]], self._ids[pid] = pid, message["id"]

    def _holding(self, spec: WorkerSpec, control: socket.socket) -> int:
        hold_slot(spec.run_dir, spec.agent, spec.slot)
        return self._entry(spec, control)

    def _close(self) -> None:
        """What a fresh child must not share with us."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for held in (self._supervisor, self._wake, self._waker):
            os.close(held.detach())
        for descriptor in self._descriptors:
            os.close(descriptor)

    def _reap(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake.recv(4096):
                pass
        while self._ids:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            number = self._ids.pop(pid, None)
            if number is None:
                continue
            del self._pids[number]
            code = os.waitstatus_to_exitcode(status)
            self._tell({"exited": number, "code": code if code >= 0 else None, "signal": -code if code < 0 else None})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._supervisor.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError):
            return  # the next read sees its end

    def _end(self) -> None:
        """The workers see the end of their own control sockets; SIGTERM is for the one that does not look."""
        for pid in self._ids:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + LAST_DRAIN
        while self._ids and time.monotonic() < deadline:
            self._wake.settimeout(max(0.0, min(0.5, deadline - time.monotonic())) or 0.01)
            with contextlib.suppress(TimeoutError):
                self._wake.recv(4096)
            self._wake.setblocking(False)
            self._reap()
        for pid in self._ids:
            os.kill(pid, signal.SIGKILL)
        for pid in list(self._ids):
            os.waitpid(pid, 0)


def become(spec: WorkerSpec, control: int, log: int, entry: Entry) -> None:
    """Turns a fresh child into a worker; never returns."""
    code = 70
    try:
        gc.enable()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to handle
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        for descriptor in (null, log):
            os.close(descriptor)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        code = entry(spec, socket.socket(fileno=control))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):  # a closed log pipe must not keep us alive
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def resolve(name: str) -> Entry:
    """The entry function named "module:function"."""
    module, _, function = name.partition(":")
    return cast(Entry, getattr(importlib.import_module(module), function))


def main() -> None:
    """Started by orchestrator.supervisor.nursery, never by hand."""
    gc.disable()
    descriptor, entry = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ENTRY
    with socket.socket(fileno=descriptor) as supervisor:
        function = resolve(entry)
        sharing.once()
        Warm(supervisor, function).run()


if __name__ == "__main__":
    main()
