"""The life of one worker: every transition, without a process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.supervisor.process import (
    LOOP_AFTER,
    Action,
    Beat,
    Event,
    Exited,
    Failed,
    Late,
    Leave,
    Life,
    Limits,
    Ready,
    Replace,
    State,
    Tick,
    advance,
    backoff,
)
from orchestrator.topology.model import Restart

LIMITS = Limits(restart=Restart(initial_delay=0.2, max_delay=30.0, healthy_after=10.0), drain=30.0, loop=310.0)
NOW = 1000.0

new = Life(since=NOW)
starting = Life(State.STARTING, NOW)
heard = replace(starting, heard=NOW)
ready = Life(State.READY, NOW, heard=NOW)
draining = Life(State.DRAINING, NOW, heard=NOW, until=NOW + 35)
waiting = Life(State.BACKING_OFF, NOW, until=NOW + 1, ends=1)
killed = replace(ready, killed="frozen", reason="frozen")
START, DRAIN, KILL = (Action.START,), (Action.DRAIN,), (Action.KILL,)

TABLE: list[tuple[str, Life, Event, float, State, tuple[Action, ...]]] = [
    ("a new slot starts at once", new, Tick(), 0, State.STARTING, START),
    ("a waiting one waits", waiting, Tick(), 0.9, State.BACKING_OFF, ()),
    ("until its time has come", waiting, Tick(), 1.0, State.STARTING, START),
    ("ready", starting, Ready(), 1, State.READY, ()),
    ("ready only once", draining, Ready(), 1, State.DRAINING, ()),
    ("a worker may import for long", starting, Tick(), 59, State.STARTING, ()),
    ("but not for ever", starting, Tick(), 61, State.STARTING, KILL),
    ("silent after it spoke: suspended", heard, Tick(), 15.1, State.STARTING, KILL),
    ("silent while ready", ready, Tick(), 15.1, State.READY, KILL),
    ("not silent yet", ready, Tick(), 14.9, State.READY, ()),
    ("silent while draining", draining, Tick(), 15.1, State.DRAINING, KILL),
    ("killed once only", killed, Tick(), 60, State.READY, ()),
    ("the supervisor slept: nobody was silent", replace(ready, heard=NOW - 99), Late(), 0, State.READY, ()),
    ("a turning loop", ready, Beat(309.0), 1, State.READY, ()),
    ("a blocked loop", ready, Beat(311.0), 1, State.READY, KILL),
    ("a blocked loop while draining", draining, Beat(311.0), 1, State.DRAINING, KILL),
    ("it asks for it", ready, Replace("stuck"), 1, State.READY, KILL),
    ("a crash", ready, Exited(70), 1, State.BACKING_OFF, ()),
    ("a signal", ready, Exited(None, 9), 1, State.BACKING_OFF, ()),
    ("an end that nobody asked for", ready, Exited(0), 1, State.BACKING_OFF, ()),
    ("a crash while starting", starting, Exited(70), 1, State.BACKING_OFF, ()),
    ("no handler", heard, Exited(78), 1, State.FAILED, ()),
    ("one crash more", replace(ready, ends=LOOP_AFTER - 1), Exited(70), 1, State.CRASH_LOOP, ()),
    ("drained", draining, Exited(0), 1, State.ENDED, ()),
    ("crashed while draining", draining, Exited(None, 9), 1, State.ENDED, ()),
    ("told to leave", ready, Leave(), 1, State.DRAINING, DRAIN),
    ("told to leave before it is ready", starting, Leave(), 1, State.DRAINING, DRAIN),
    ("told to leave between two processes", waiting, Leave(), 0, State.ENDED, ()),
    ("told twice", draining, Leave(), 1, State.DRAINING, ()),
    ("told to hurry", draining, Leave(within=1.0), 1, State.DRAINING, DRAIN),
    ("drains within its time", replace(draining, heard=NOW + 34), Tick(), 34.9, State.DRAINING, ()),
    ("does not drain", replace(draining, heard=NOW + 35), Tick(), 35.1, State.DRAINING, KILL),
    ("there to take over a journal", replace(starting, recovering=True), Ready(), 1, State.DRAINING, DRAIN),
    ("could not take it over", replace(starting, recovering=True), Exited(70), 1, State.ENDED, ()),
    ("last words of a dead process", waiting, Ready(), 0, State.BACKING_OFF, ()),
    ("nothing wakes what has ended", Life(State.ENDED), Tick(), 9, State.ENDED, ()),
]


@pytest.mark.parametrize(("name", "life", "event", "after", "state", "actions"), TABLE, ids=[row[0] for row in TABLE])
def test_transition(name, life, event, after, state, actions):
    result, done = advance(life, event, NOW + after, LIMITS)
    assert (result.state, done) == (state, actions)


def test_delays_double_up_to_the_limit():
    assert [backoff(LIMITS.restart, n) for n in (1, 2, 3, 8, 9, 1000)] == [0.2, 0.4, 0.8, 25.6, 30.0, 30.0]


def test_a_crash_loop_waits_longer_each_time_and_a_healthy_spell_ends_it():
    life, now, delays = new, NOW, []
    for _ in range(7):
        life, _ = advance(life, Tick(), now, LIMITS)
        life, _ = advance(life, Ready(), now, LIMITS)
        life, _ = advance(life, Exited(70), now + 1, LIMITS)
        delays.append(round(life.until - now - 1, 6))
        now = life.until
    assert delays == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8]
    assert life.state is State.CRASH_LOOP
    assert life.restarts == 7
    assert life.reason == "exited with code 70, 7 times in a row"
    life, _ = advance(life, Tick(), now, LIMITS)
    assert "7 times" in life.reason  # still shown while the next one is starting
    life, _ = advance(life, Ready(), now, LIMITS)
    life, _ = advance(life, Beat(), now + 9.0, LIMITS)
    life, _ = advance(life, Tick(), now + 10.0, LIMITS)
    assert (life.ends, life.reason) == (0, "")
    life, _ = advance(life, Exited(70), now + 11, LIMITS)
    assert (life.state, life.ends) == (State.BACKING_OFF, 1)


@pytest.mark.parametrize("life", [killed, ready])
def test_a_replacement_starts_at_once_but_not_again_and_again(life):
    exited = Exited(None, 9) if life is killed else Exited(75)
    first, _ = advance(life, exited, NOW + 1, LIMITS)
    assert first.until == NOW + 1
    second, _ = advance(replace(life, ends=1), exited, NOW + 1, LIMITS)
    assert second.until == pytest.approx(NOW + 1.4)


def test_the_reason_is_what_we_killed_it_for():
    life, _ = advance(ready, Tick(), NOW + 16, LIMITS)
    life, _ = advance(life, Exited(None, 9), NOW + 16, LIMITS)
    assert life.reason == "it has been silent for 15 s"


def test_a_handler_that_does_not_load_says_why_and_is_tried_again():
    life, _ = advance(starting, Failed("no module named agents"), NOW, LIMITS)
    life, _ = advance(life, Exited(78), NOW, LIMITS)
    assert (life.state, life.reason) == (State.FAILED, "no module named agents")
    life, actions = advance(life, Tick(), life.until, LIMITS)
    assert (life.state, actions) == (State.STARTING, START)


def test_an_asleep_supervisor_gives_everyone_a_fresh_start():
    life, _ = advance(replace(ready, heard=NOW - 99), Late(), NOW, LIMITS)
    assert advance(life, Tick(), NOW + 14, LIMITS)[1] == ()
