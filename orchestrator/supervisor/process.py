"""The life of one worker process as a state machine: pure, no I/O, no clock of its own.

Walk "an edit", after rollout: the fleet feeds what happened to a slot into `advance` and carries out the actions.

    starting -> ready -> draining -> ended
        |         '-> backing-off -> starting ...   after several quick ends in a row: crash-loop -> starting ...
        '-> failed (the handler does not load) -> starting ...
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.topology.model import Agent, Restart

#: Exit codes of a worker (orchestrator.worker.main.run).
DRAINED, CRASHED, REPLACE_ME, NOT_LOADED = 0, 70, 75, 78

#: This many ends in a row without a healthy spell are shown as a crash loop.
LOOP_AFTER = 5


class State(StrEnum):
    """What `status` shows of one worker."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    BACKING_OFF = "backing-off"
    CRASH_LOOP = "crash-loop"
    FAILED = "failed"
    ENDED = "ended"


#: States without a process: the next start waits for Life.until.
WAITING = frozenset({State.BACKING_OFF, State.CRASH_LOOP, State.FAILED})


@dataclass(frozen=True, slots=True)
class Limits:
    """How long what may take, in seconds."""

    restart: Restart = field(default_factory=Restart)
    drain: float = 30.0
    loop: float = 310.0  # a loop that has not turned for this long is blocked for good
    silent: float = 15.0  # no message for this long: suspended
    start: float = 60.0  # no message at all since it was forked
    grace: float = 5.0  # what a worker gets after its drain timeout to say that it has drained

    @classmethod
    def of(cls, agent: Agent) -> Limits:
        """The limits that the topology sets for `agent`."""
        return cls(restart=agent.restart, drain=agent.drain_timeout, loop=agent.timeout + 10.0)


@dataclass(frozen=True, slots=True)
class Life:
    """One slot's present. Times are monotonic seconds."""

    state: State = State.BACKING_OFF
    since: float = 0.0  # when this state began
    heard: float | None = None  # the last message of this process
    until: float = 0.0  # WAITING: when to start; draining: when to kill
    ends: int = 0  # ends in a row without a healthy spell
    restarts: int = 0
    recovering: bool = False  # started only to take over a journal: drains as soon as it is ready
    reason: str = ""  # why it is not simply ready
    killed: str = ""  # why we have killed this process


class Action(StrEnum):
    """What the fleet has to do after a transition."""

    START = "start"
    DRAIN = "drain"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker consumes."""


@dataclass(frozen=True, slots=True)
class Beat:
    """Any other message; `loop_age` as in the worker's status."""

    loop_age: float = 0.0


@dataclass(frozen=True, slots=True)
class Failed:
    """The handler does not load; the exit follows."""

    message: str


@dataclass(frozen=True, slots=True)
class Replace:
    """The worker asks to be killed: an attempt does not stop."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exited:
    """The process has ended: by `code`, or by `signal` (then code is None). `why` when it never began."""

    code: int | None
    signal: int | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.why:
            return self.why
        if self.code is None:
            return "ended in an unknown way" if self.signal is None else f"killed by signal {self.signal}"
        return f"exited with code {self.code}"


@dataclass(frozen=True, slots=True)
class Leave:
    """The slot is not wanted any more; `within` shortens the drain (seconds)."""

    why: str = ""
    within: float | None = None


@dataclass(frozen=True, slots=True)
class Late:
    """The supervisor itself was suspended: silence until now says nothing about the worker."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Ready | Beat | Failed | Replace | Exited | Leave | Late | Tick
Next = tuple[Life, tuple[Action, ...]]


def advance(life: Life, event: Event, now: float, limits: Limits) -> Next:
    """The life after `event`, and what to do about it. What makes no sense in a state changes nothing."""
    if life.state is State.ENDED:
        return life, ()
    match event:
        case Tick():
            return _tick(life, now, limits)
        case Exited():
            return _exited(life, event, now, limits)
        case Leave():
            return _leave(life, event, now, limits)
        case Late():
            return replace(life, heard=now if life.heard is not None else None, since=now), ()
    if life.state in WAITING:
        return life, ()  # the last words of a process that is gone
    life = replace(life, heard=now)
    match event:
        case Ready() if life.state is State.STARTING:
            ready = replace(life, state=State.READY, since=now, reason="")
            return _leave(ready, Leave("its journal is taken over"), now, limits) if life.recovering else (ready, ())
        case Failed():
            return replace(life, reason=event.message), ()
        case Replace():
            return _kill(life, event.reason)
        case Beat() if event.loop_age > limits.loop:
            return _kill(life, f"its event loop has been blocked for {event.loop_age:.0f} s")
    return life, ()


def _tick(life: Life, now: float, limits: Limits) -> Next:
    if life.state in WAITING:
        if now < life.until:
            return life, ()
        started = Life(State.STARTING, now, ends=life.ends, restarts=life.restarts, recovering=life.recovering)
        return replace(started, reason=life.reason), (Action.START,)
    if life.killed:
        return life, ()
    if life.heard is None and now - life.since > limits.start:
        return _kill(life, f"it said nothing for {limits.start:.0f} s after its start")
    if life.heard is not None and now - life.heard > limits.silent:
        return _kill(life, f"it has been silent for {limits.silent:.0f} s")
    if life.state is State.DRAINING and now > life.until:
        return _kill(life, "it did not drain in time")
    if life.state is State.READY and life.ends and now - life.since >= limits.restart.healthy_after:
        return replace(life, ends=0), ()
    return life, ()


def _exited(life: Life, event: Exited, now: float, limits: Limits) -> Next:
    if life.state in WAITING:
        return life, ()
    if life.state is State.DRAINING or life.recovering:
        reason = "" if event.code == DRAINED else life.killed or str(event)
        return Life(State.ENDED, now, restarts=life.restarts, reason=reason), ()
    healthy = life.state is State.READY and now - life.since >= limits.restart.healthy_after
    ends = 1 if healthy else life.ends + 1
    reason = life.killed or str(event)
    state, delay = State.BACKING_OFF, backoff(limits.restart, ends)
    if event.code == NOT_LOADED:
        state, reason = State.FAILED, life.reason or "its handler does not load"
    elif ends >= LOOP_AFTER:
        state, reason = State.CRASH_LOOP, f"{reason}, {ends} times in a row"
    elif (event.code == REPLACE_ME or life.killed) and ends == 1:
        delay = 0.0
    return Life(state, now, until=now + delay, ends=ends, restarts=life.restarts + 1, reason=reason), ()


def _leave(life: Life, event: Leave, now: float, limits: Limits) -> Next:
    if life.state in WAITING:
        return Life(State.ENDED, now, restarts=life.restarts), ()
    drain = 0.0 if life.state is State.STARTING else limits.drain  # it handles nothing yet
    until = now + (drain if event.within is None else min(event.within, drain)) + limits.grace
    if life.state is State.DRAINING:
        return replace(life, until=min(life.until, until)), (Action.DRAIN,) if until < life.until else ()
    return replace(life, state=State.DRAINING, since=now, until=until, reason=event.why), (Action.DRAIN,)


def _kill(life: Life, why: str) -> Next:
    if life.killed:
        return life, ()
    return replace(life, killed=why, reason=why), (Action.KILL,)


def backoff(restart: Restart, ends: int) -> float:
    """Seconds to wait before the start that follows the `ends`-th end in a row."""
    return min(restart.max_delay, restart.initial_delay * 2.0 ** min(ends - 1, 32))
