"""Before the first fork: a worker without a broker lives and ends in the warm parent, so that the others stay small.

After a fork parent and worker share their pages until one of them writes to a page, and CPython writes wherever it
goes: each call changes the reference count of a code object, the first ones its caches. Two things follow:

* What is done once, is done here: inline caches, versions of types and functions, the cache of attributes.
* What will run lies side by side. The code that the rehearsal ran is copied into a few pages of its own; where it was
  imported, it is strewn between everything that never runs.

Of ten idle workers each is smaller for it, in MiB of PSS: 9.5 -> 9.1 on NATS, 11.5 -> 11.1 on Redis, 12.1 -> 11.6 on
Kafka. It takes about 50 ms of CPU, once in the life of a warm parent.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

from orchestrator.brokers.memory import adapter
from orchestrator.topology.model import Agent, Broker, Channel, Handler, Mode, Subscription, Topology
from orchestrator.worker.main import run
from orchestrator.worker.spec import WorkerSpec

_URL = "memory://warm"
_PATIENCE = 5.0  # seconds; a rehearsal needs a hundredth of that

#: Freed, what was copied would leave holes, and each worker would fill them with its own (0.7 MiB in a trial).
_left_behind: list[CodeType] = []


def warm_up() -> None:
    """Rehearses, moves together what ran, and rehearses again, for the copies start cold. Leaves no thread and no
    loop. A host that has no room for a temporary file gets its workers all the same, only bigger ones."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            ran: dict[CodeType, None] = {}
            _rehearse(Path(folder), ran)
            _left_behind.extend(_move_together(ran))
            sys._clear_type_cache()  # of what only importing looked up: replacing an entry writes to its old name
            _rehearse(Path(folder), None)
    except OSError as error:
        print(f"workers will take more memory: {error}", file=sys.stderr)


def _rehearse(folder: Path, ran: dict[CodeType, None] | None) -> None:
    """One life of a worker, from its start to its drain; notes in `ran` what code runs."""

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and ran is not None:
            ran[frame.f_code] = None

    topology = _topology(folder)
    path, interrupt, wakeup = sys.path.copy(), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    ours, theirs = socket.socketpair()
    ours.settimeout(_PATIENCE)
    drain = threading.Thread(target=_drain, args=(ours,))
    if ran is not None:
        threading.setprofile(note)
        sys.setprofile(note)
    try:
        with ours, theirs:
            asyncio.run(_provide(topology))
            drain.start()
            run(WorkerSpec(topology, "warm", 0, folder), theirs)
            drain.join()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        sys.path[:] = path  # loading a handler put its folder first
        signal.signal(signal.SIGINT, interrupt)
        signal.set_wakeup_fd(wakeup)  # an event loop takes it for itself, and the warm parent hears of ends by it
        adapter.forget(_URL)
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()
    gc.unfreeze()  # a worker that is ready freezes what there is
    gc.collect()  # its journal is closed by nothing else


def _drain(control: socket.socket) -> None:
    """Waits until the worker is ready, and ends it."""
    said = b""
    while b'"ready"' not in said and (data := control.recv(65536)):
        said += data
    control.sendall(b'{"type": "drain", "timeout": 0.0}\n')


async def _provide(topology: Topology) -> None:
    broker = topology.brokers["memory"]
    connection = await adapter.connect(topology, broker, name="warm")
    for desired in adapter.desired(topology, broker):
        await connection.create(desired)
    await connection.close()


async def handle(event: Any, ctx: Any) -> None:
    """The handler of the rehearsal, for which there are no events."""


def _topology(folder: Path) -> Topology:
    channel = Channel("tasks", "memory", "warm-tasks", Mode.QUEUE, ("task.*",))
    subscription = Subscription("warm", channel.name, "memory", "warm", channel.events)
    handler = Handler("python", f"{__name__}:{handle.__name__}")
    letters = Channel("letters", "memory", "warm-letters", Mode.LOG, (), dead_letters=True)
    agent = Agent("warm", "", handler, (subscription,), (), dead_letter=letters.name)
    return Topology(
        name="warm",
        description="",
        root=folder,
        files=(),
        brokers={"memory": Broker("memory", _URL, "memory")},
        channels={channel.name: channel, letters.name: letters},
        agents={agent.name: agent},
    )


def _move_together(ran: Iterable[CodeType]) -> list[CodeType]:
    """Gives each function whose code is in `ran` a copy of it; all copies are made now, so they lie side by side.
    Returns the code that was replaced."""
    wanted = {id(code) for code in ran}
    copies: dict[int, CodeType] = {}
    replaced = []

    def copied(code: CodeType) -> CodeType:
        if id(code) not in copies:
            constants = tuple(copied(c) if isinstance(c, CodeType) else c for c in code.co_consts)  # inner functions
            inner = any(new is not old for new, old in zip(constants, code.co_consts, strict=True))
            if inner:
                copies[id(code)] = code.replace(co_consts=constants)
            else:
                copies[id(code)] = code.replace() if id(code) in wanted else code
        return copies[id(code)]

    for function in [found for found in gc.get_objects() if type(found) is FunctionType]:
        code = function.__code__
        if (copy := copied(code)) is not code:
            replaced.append(code)
            function.__code__ = copy
    return replaced
