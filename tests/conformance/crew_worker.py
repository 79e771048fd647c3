"""One real worker in a process of its own: `python crew_worker.py SPEC FD`, started again and again by crew.Crew.

"die" in the specification names a point of the runtime at which the process ends, once, as if killed: the runtime's own
methods are wrapped here, so the package needs no switch for it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator import wire
from orchestrator.wire import letters
from orchestrator.worker import endings, policy
from orchestrator.worker.attempt import Attempt
from orchestrator.worker.main import run
from orchestrator.worker.spec import WorkerSpec


def once(record: str) -> bool:
    try:
        os.close(os.open(f"{record}.died", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def die_at(point: str, record: str) -> None:
    def end() -> None:
        if once(record):
            os._exit(1)

    def end_soon(turns: int) -> None:
        """After so many turns of the loop: what was asked for is on its way, or has just arrived."""
        loop = asyncio.get_running_loop()
        if turns:
            loop.call_soon(end_soon, turns - 1)
        else:
            end()

    start, finish, settle = Attempt.start, Attempt._finish, Attempt.settle
    retry = endings.retry

    if point == "before the handler":
        Attempt.start = lambda self, *a: (end(), start(self, *a))[1]  # type: ignore[method-assign]
    elif point == "after the handler":
        Attempt._finish = lambda self: (end(), finish(self))[1]  # type: ignore[method-assign]
    elif point == "before settling":
        Attempt.settle = lambda self, *a, **k: (end(), settle(self, *a, **k))[1]  # type: ignore[method-assign]
    elif point.startswith("while settling"):
        turns = int(point.rpartition(" ")[2])
        Attempt.settle = lambda self, *a, **k: (settle(self, *a, **k), end_soon(turns))[0]  # type: ignore[method-assign]
    elif point.startswith("while retrying"):
        turns = int(point.rpartition(" ")[2])

        def retry_and_die(*arguments: Any, **named: Any) -> None:
            retry(*arguments, **named)
            end_soon(turns)

        endings.retry = retry_and_die
    else:
        raise ValueError(f"no such point: {point}")


def without(mechanism: str) -> None:
    """Takes one mechanism out of this worker; see test_mutations.py."""
    on_crash = policy.on_crash
    if mechanism == "crash count":
        policy.on_crash = lambda history, ended, only_one: history  # type: ignore[assignment]
    elif mechanism == "suspects run alone":
        policy.on_crash = lambda history, ended, only_one: replace(on_crash(history, ended, True), alone=False)
    elif mechanism == "settling after the handler":
        start = Attempt.start

        def settle_first(self: Attempt, *a: Any) -> None:
            self.port.consumer.settle(self.delivery, (), lambda error: start(self, *a))

        Attempt.start = settle_first  # type: ignore[method-assign]
    elif mechanism == "one id for one dead letter":
        dead_letter = letters.dead_letter
        wire.dead_letter = lambda *a, **k: replace(dead_letter(*a, **k), message_id=uuid.uuid4().hex)
    else:
        raise ValueError(f"no such mechanism: {mechanism}")


def main() -> None:
    spec = pickle.loads(Path(sys.argv[1]).read_bytes())
    record = spec["topology"].agents[spec["agent"]].env["CREW_RECORD"]
    if spec["die"]:
        die_at(spec["die"], record)
    if spec["without"]:
        without(spec["without"])
    control = socket.socket(fileno=int(sys.argv[2]))
    code = run(WorkerSpec(spec["topology"], spec["agent"], spec["slot"], str(spec["run_dir"])), control)
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
