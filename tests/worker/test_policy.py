"""When an event runs again, as a table. Pure: no broker, no clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.brokers.base import FRESH, Ended, History
from orchestrator.topology.model import RetryPolicy
from orchestrator.worker.policy import (
    DeadLetter,
    Exhausted,
    Fault,
    Retry,
    Run,
    Wait,
    after_failure,
    after_interruption,
    after_retry_later,
    backoff,
    before_run,
    on_crash,
)

NOW = 1_000_000.0
POLICY = RetryPolicy(max_attempts=3, initial_delay=1.0, multiplier=2.0, max_delay=5.0, jitter=0.0)
BOOM = Fault(("agents.Boom", "Boom", "ValueError", "Exception"), "no")


def steady() -> float:
    """No jitter: in the middle of the range."""
    return 0.5


def test_a_clock_that_was_set_back_holds_nothing_up():
    failed = History(attempts=1, last_failed_at=5000.0, not_before=5010.0)
    assert isinstance(before_run(failed, False, RetryPolicy(), 5001.0), Wait)
    assert isinstance(before_run(failed, False, RetryPolicy(), 1400.0), Run)


@pytest.mark.parametrize(
    ("history", "redelivered", "expected"),
    [
        (FRESH, False, Run()),
        (FRESH, True, Run(mark=History(open=True))),
        (History(attempts=2), False, Run()),
        (History(attempts=3), False, DeadLetter("exhausted", History(attempts=3))),
        (
            History(attempts=3, error="WorkerCrashed: x"),
            False,
            DeadLetter("crashed", History(attempts=3, error="WorkerCrashed: x")),
        ),
        (History(strikes=1, alone=True), False, Run(alone=True)),
        (History(not_before=NOW + 60), False, Wait(60.0)),
        (History(not_before=NOW + 0.1), False, Run()),
        # A run was marked on a host that is lost: a strike, then alone; alone and lost again: it counts.
        (
            History(open=True),
            True,
            Run(alone=True, mark=History(strikes=1, alone=True, open=True)),
        ),
    ],
)
def test_before_a_run(history: History, redelivered: bool, expected: object) -> None:
    assert before_run(history, redelivered, POLICY, NOW) == expected


def test_a_marked_crash_while_alone_on_the_last_permitted_attempt_is_dead_without_another_run() -> None:
    history = History(attempts=1, strikes=1, alone=True, open=True)
    decision = before_run(history, True, POLICY, NOW)
    assert isinstance(decision, DeadLetter)
    assert (decision.reason, decision.history.attempts, decision.history.open) == ("crashed", 3, False)


@pytest.mark.parametrize(
    ("ended", "only_one", "attempts", "strikes", "alone"),
    [
        (Ended.STARTED, False, 0, 2, True),
        (Ended.STARTED, True, 2, 0, True),
        (Ended.STARTED_ALONE, False, 2, 0, True),
        (Ended.BLAMED, False, 2, 0, True),
        (Ended.RETURNED, True, 0, 1, True),
    ],
)
def test_what_a_crash_does_to_a_history(ended: Ended, only_one: bool, attempts: int, strikes: int, alone: bool) -> None:
    after = on_crash(History(strikes=1, alone=True), ended, only_one)
    assert (after.attempts, after.strikes, after.alone) == (attempts, strikes, alone)


def test_a_marked_run_whose_handler_had_returned_is_no_crash() -> None:
    marked = History(strikes=1, alone=True, open=True)
    returned = on_crash(marked, Ended.RETURNED, only_one=True)
    assert returned == replace(marked, open=False)
    assert before_run(returned, False, POLICY, NOW) == Run(alone=True)


def test_a_process_killer_runs_max_attempts_times_and_its_neighbours_are_cleared() -> None:
    killer = neighbour = on_crash(FRESH, Ended.STARTED, only_one=False)
    runs = 1
    while isinstance(before_run(killer, False, POLICY, NOW), Run):
        runs += 1
        assert before_run(killer, False, POLICY, NOW) == Run(alone=True)
        killer = on_crash(killer, Ended.STARTED_ALONE, only_one=True)
    assert runs == POLICY.max_attempts
    failed = after_failure(neighbour, BOOM, POLICY, NOW, steady)
    assert isinstance(failed, Retry)
    assert (failed.history.attempts, failed.history.strikes, failed.history.alone) == (1, 0, False)


def test_a_proven_killer_goes_on_running_alone_after_an_ordinary_failure() -> None:
    proven = on_crash(FRESH, Ended.STARTED, only_one=True)
    failed = after_failure(proven, BOOM, POLICY, NOW, steady)
    assert isinstance(failed, Retry)
    assert failed.history.alone


def test_failures_are_counted_until_the_last() -> None:
    history, seen = FRESH, []
    for _ in range(3):
        decision = after_failure(history, BOOM, POLICY, NOW, steady)
        history = decision.history
        seen.append(decision)
    assert [getattr(d, "delay", None) for d in seen] == [1.0, 2.0, None]
    assert seen[2] == Exhausted(
        "exhausted", History(attempts=3, first_failed_at=NOW, last_failed_at=NOW, error="agents.Boom: no")
    )


@pytest.mark.parametrize(
    ("fault", "give_up_on", "reason"),
    [
        (replace(BOOM, final="rejected"), (), "rejected"),
        (BOOM, ("Boom",), "given_up"),
        (BOOM, ("agents.Boom",), "given_up"),
        (BOOM, ("ValueError",), "given_up"),
        (BOOM, ("other.Boom",), None),
    ],
)
def test_no_retry_can_help(fault: Fault, give_up_on: tuple[str, ...], reason: str | None) -> None:
    decision = after_failure(FRESH, fault, replace(POLICY, give_up_on=give_up_on), NOW, steady)
    assert getattr(decision, "reason", None) == reason
    assert decision.history.attempts == 1


@pytest.mark.parametrize(
    ("policy", "delays"),
    [
        (replace(POLICY, backoff="constant"), [1, 1, 1, 1]),
        (replace(POLICY, backoff="linear"), [1, 2, 3, 4]),
        (POLICY, [1, 2, 4, 5]),
        (replace(POLICY, delays=(10.0, 60.0, 600.0)), [10, 60, 600, 600]),
    ],
)
def test_backoff(policy: RetryPolicy, delays: list[float]) -> None:
    assert [backoff(n, policy, steady) for n in (1, 2, 3, 4)] == delays


@given(st.integers(1, 5000), st.floats(0, 0.999), st.floats(0, 1))
def test_backoff_stays_within_jitter_and_max_delay(attempt: int, random: float, jitter: float) -> None:
    policy = replace(POLICY, jitter=jitter)
    middle = backoff(attempt, POLICY, steady)
    delay = backoff(attempt, policy, lambda: random)
    assert middle * (1 - jitter) - 1e-9 <= delay <= min(middle * (1 + jitter), policy.max_delay) + 1e-9


def test_retry_later_is_uncounted_and_bounded_by_give_up_after() -> None:
    policy = replace(POLICY, give_up_after=100.0)
    first = after_retry_later(FRESH, 60.0, policy, NOW)
    assert first == Retry(History(first_failed_at=NOW, last_failed_at=NOW, not_before=NOW + 60), 60.0)
    second = after_retry_later(first.history, 60.0, policy, NOW + 60)
    assert isinstance(second, Exhausted)
    assert (second.reason, second.history.attempts) == ("gave_up_after", 0)


def test_an_interrupted_run_does_not_count() -> None:
    assert after_interruption(History(attempts=1, open=True)) == Retry(History(attempts=1), 0.0)
