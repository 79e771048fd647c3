"""One slot of one agent: its state machine (process.py) joined to the process that runs in it.

Messages of the worker and the end of its process become events; the actions that follow are carried out here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import deque
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from orchestrator.supervisor import process
from orchestrator.supervisor.lines import Lines
from orchestrator.supervisor.locks import holder, lock_path
from orchestrator.supervisor.nursery import Nursery
from orchestrator.supervisor.process import Action, Life, Limits
from orchestrator.topology.model import Topology


@dataclass(slots=True)
class Counts:
    """What a worker says of itself; everything but in_flight only grows."""

    in_flight: int = 0
    handled: int = 0
    failed: int = 0
    dead: int = 0
    retried: int = 0

    def add(self, other: Counts) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


@dataclass(frozen=True, slots=True)
class Post:
    """Where and what a slot runs: fixed while it exists."""

    topology: Topology
    key: str  # the topology's name in the warm parent
    agent: str
    number: int
    digest: str
    run_dir: Path

    @property
    def name(self) -> str:
        return f"{self.agent}.{self.number}"


class Audience(Protocol):
    """Who hears of a slot."""

    def changed(self, slot: Slot) -> None:
        """Its state or reason is another one."""

    def log(self, agent: str, slot: int, line: bytes) -> None:
        """A line that its worker wrote."""

    def pause(self, agent: str, reason: str) -> None:
        """A worker asks to pause the whole agent."""


class Slot:
    """Tells its fleet (an Audience) what happens to it."""

    def __init__(
        self,
        post: Post,
        nursery: Nursery,
        *,
        audience: Audience,
        recovering: bool = False,
        paused: bool = False,
    ) -> None:
        self.post = post
        self.limits = Limits.of(post.topology.agents[post.agent])
        self.life = Life(since=time.monotonic(), recovering=recovering)
        self.paused = paused
        self.orphan = False
        self.pid: int | None = None
        self.counts = Counts()
        self.past = Counts()  # of the processes before this one
        self.trouble: str | None = None
        self.load_error: dict[str, Any] | None = None
        self.alarms: deque[str] = deque(maxlen=10)
        self._nursery = nursery
        self._audience = audience
        self._id: int | None = None
        self._control: Lines | None = None
        self._output: Lines | None = None
        self._drained = False

    @property
    def alive(self) -> bool:
        """Whether there is a process, or one on its way."""
        return self._id is not None

    def feed(self, event: process.Event) -> None:
        """One transition, and what follows from it."""
        before = self.life
        self.life, actions = process.advance(before, event, time.monotonic(), self.limits)
        for action in actions:
            match action:
                case Action.START:
                    self._start()
                case Action.DRAIN:
                    remaining = self.life.until - time.monotonic() - self.limits.grace
                    self.send({"type": "drain", "timeout": max(0.0, remaining)})
                case Action.KILL:
                    self.kill()
        if (before.state, before.reason) != (self.life.state, self.life.reason):
            self._audience.changed(self)

    def send(self, message: dict[str, Any]) -> None:
        """To the worker; nothing when there is none."""
        if self._control is not None:
            self._control.send(json.dumps(message).encode() + b"\n")

    def set_paused(self, paused: bool) -> None:
        """Stops or resumes fetching, also for the processes to come."""
        self.paused = paused
        self.send({"type": "pause" if paused else "resume"})

    def kill(self) -> None:
        """SIGKILL, if there is a process."""
        if self.orphan:  # nobody reaps it, but its lock says whether the pid is still its own
            pid = holder(lock_path(self.post.run_dir, self.post.agent, self.post.number))
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif self._id is not None:
            self._nursery.kill(self._id)

    def spawned(self, number: int, pid: int) -> None:
        """The warm parent has forked its worker `number`."""
        if number == self._id:
            self.pid = pid

    def exited(self, number: int, code: int | None, signal_number: int | None) -> None:
        """The warm parent reports the end of its worker `number`."""
        if number == self._id:
            self._finish(process.Exited(code, signal_number))

    def abandon(self) -> None:
        """The warm parent has died: from now on the worker's socket and lock tell of its end."""
        if self.alive:
            self.orphan = True
            if self._control is None:
                self._watch_orphan()

    def close(self) -> None:
        """Lets go of the descriptors."""
        for lines in (self._control, self._output):
            if lines is not None:
                lines.close()
        self._control = self._output = None

    # --- one process -----------------------------------------------------------------------------------------

    def _start(self) -> None:
        post = self.post
        self.orphan, self._drained, self.pid = False, False, None
        self.trouble = None
        try:
            self._id, control, log = self._nursery.spawn(post.key, post.topology, post.agent, post.number, post.run_dir)
        except OSError as error:  # no descriptor is left, say: this slot is tried again later, and the others go on
            why = f"cannot be started: {error.strerror}"
            asyncio.get_running_loop().call_soon(self.feed, process.Exited(None, why=why))
            return
        number = self._id
        self._control = Lines(control, self._message, lambda: self._control_ended(number))
        self._output = Lines(log, lambda line: self._audience.log(post.agent, post.number, line), lambda: None)
        if self.paused:
            self.send({"type": "pause"})

    def _message(self, line: bytes) -> None:
        message = json.loads(line)
        event: process.Event = process.Beat()
        match message["type"]:
            case "ready":
                event, self.load_error = process.Ready(), None
            case "status":
                self._status(message)
                event = process.Beat(message["loop_age"])
            case "alarm":
                self.alarms.append(message["message"])
            case "paused":
                self._audience.pause(self.post.agent, message["reason"])
            case "failed":
                self.load_error = message
                event = process.Failed(message["message"])
            case "replace":
                event = process.Replace(message["reason"])
            case "drained":
                self._drained = True
        self.feed(event)

    def _status(self, message: dict[str, Any]) -> None:
        for each in fields(self.counts):
            setattr(self.counts, each.name, message[each.name])
        self.trouble = message["trouble"]

    def _control_ended(self, number: int) -> None:
        if number != self._id:
            return
        self._control = None
        if self.orphan:
            self._watch_orphan()

    def _watch_orphan(self) -> None:
        """Nobody reports its end: asks the lock, which the kernel drops with the process."""
        if not self.orphan:
            return
        if holder(lock_path(self.post.run_dir, self.post.agent, self.post.number)) is None:
            self._finish(process.Exited(process.DRAINED if self._drained else None))
        else:
            asyncio.get_running_loop().call_later(0.1, self._watch_orphan)

    def _finish(self, exited: process.Exited) -> None:
        """The process is dead: what it still had to say lies in its socket and its pipe."""
        control, output, self._control, self._output = self._control, self._output, None, None
        for lines in (control, output):
            if lines is not None:
                lines.finish()
        self._id = None
        self.past.add(self.counts)
        self.past.in_flight = 0
        self.counts, self.pid = Counts(), None
        self.orphan = False
        self.feed(exited)
