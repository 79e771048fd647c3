"""A thread that watches the event loop: it reports about every second, keeps leases alive while the loop is blocked,
and has the worker replaced when an attempt blocks the loop beyond its time."""

from __future__ import annotations

import _thread
import asyncio
import os
import threading
import time
from dataclasses import dataclass, field

from orchestrator.errors import OrchestratorError
from orchestrator.worker.attempt import Attempt, Stage
from orchestrator.worker.control import Control
from orchestrator.worker.journal import State
from orchestrator.worker.runtime import GRACE, Runtime

REPLACE_ME = 75
_ORPHANED = 70
_EVERY = 1.0  # seconds between reports
_BEAT = 0.5  # seconds between two signs of life of the loop
_BLOCKED = 2.0  # a loop that has not turned for this long is blocked
_ORPHAN = 10.0  # seconds that a blocked loop outlives its supervisor


@dataclass(slots=True)
class Vitals:
    """What the loop writes and the guardian reads."""

    turned: float = field(default_factory=time.monotonic)
    trouble: str | None = None
    runtime: Runtime | None = None

    def beat(self) -> None:
        """Called in the loop; calls itself again."""
        self.turned = time.monotonic()
        asyncio.get_running_loop().call_later(_BEAT, self.beat)


class Guardian:
    """`lease`: seconds of the shortest lease among the brokers that the worker reads from."""

    def __init__(self, vitals: Vitals, control: Control, *, lease: float, timeout: float) -> None:
        self._vitals = vitals
        self._control = control
        self._lease = lease
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._running = threading.Lock()  # held until `stop`
        self._running.acquire()
        self._keeper: threading.Thread | None = None
        self._orphan_since: float | None = None

    def start(self) -> None:
        # A bare thread and a bare lock: a Thread and an Event write to more memory that workers share.
        _thread.start_new_thread(self._watch, ())

    def stop(self) -> None:
        self._running.release()

    def _stopped(self, within: float) -> bool:
        """Waits for `stop`, that many seconds at most; says whether it has come."""
        stopped = self._running.acquire(timeout=within)
        if stopped:
            self._running.release()
        return stopped

    def _watch(self) -> None:
        self._report(0.0)
        while not self._stopped(_EVERY):
            age = max(0.0, time.monotonic() - self._vitals.turned - _BEAT)
            self._report(age)
            if age > _BLOCKED:
                self._keep_alive()
                self._judge(age)

    def _report(self, age: float) -> None:
        vitals, runtime = self._vitals, self._vitals.runtime
        counters = runtime.counters if runtime is not None else None
        trouble = vitals.trouble or (runtime.troubled if runtime is not None else None)
        self._control.send(
            "status",
            in_flight=runtime.in_flight if runtime is not None else 0,
            handled=counters.handled if counters is not None else 0,
            failed=counters.failed if counters is not None else 0,
            dead=counters.dead if counters is not None else 0,
            retried=counters.retried if counters is not None else 0,
            trouble=trouble,
            loop_age=round(age, 3),
            paused=runtime.is_paused if runtime is not None else False,
        )

    # --- while the loop is blocked ----------------------------------------------------------------------------

    def _keep_alive(self) -> None:
        """In a thread of its own: it may block, and reports must go on."""
        if self._keeper is None or not self._keeper.is_alive():
            self._keeper = threading.Thread(target=self._extend, name="keep-alive", daemon=True)
            self._keeper.start()

    def _extend(self) -> None:
        while time.monotonic() - self._vitals.turned > _BLOCKED:
            runtime = self._vitals.runtime
            for port in list(runtime.ports) if runtime is not None else ():
                try:
                    port.consumer.keep_alive()
                except OrchestratorError as error:
                    self._control.send("alarm", message=f"a lease could not be extended: {error}")
            if self._stopped(self._lease / 3):
                return

    def _judge(self, age: float) -> None:
        runtime = self._vitals.runtime
        culprit = self._culprit(runtime) if runtime is not None else None
        if culprit is not None and runtime is not None:
            now = time.monotonic()
            if now > culprit.deadline + (GRACE if culprit.stop_reason is None else 0.0):
                runtime.journal.set(culprit.slot, State.BLAMED)
                event = culprit.require_event()
                self._leave(f"{event.event_type} {event.event_id} blocks the event loop beyond its timeout")
        elif age > self._timeout + GRACE:
            self._leave(f"the event loop has been blocked for {age:.0f} s")
        if self._control.at_end():
            self._orphan_since = self._orphan_since or time.monotonic()
            if time.monotonic() - self._orphan_since > _ORPHAN:
                os._exit(_ORPHANED)

    def _culprit(self, runtime: Runtime) -> Attempt | None:
        """Whose code is running in the blocked loop."""
        task = asyncio.current_task(self._loop)
        for attempt in runtime.running():
            if attempt.task is not None and attempt.task is task and attempt.stage is Stage.RUNNING:
                return attempt
        return None

    def _leave(self, reason: str) -> None:
        self._control.send("replace", reason=reason)
        os._exit(REPLACE_ME)
