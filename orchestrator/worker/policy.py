"""Whether and when an event runs (again). Pure: no clock, no broker, no I/O.

Walk "an event that dies": runtime asks before_run, and after a failure after_failure; a successor asks on_crash. The
answer is data; the adapter carries it out (Consumer.retry, settle with a dead letter).

Attempts. max_attempts counts every run that failed, timed out or killed its worker. A crash with several events in
flight is blamed on none of them: each gets a strike and runs alone next time. Only a crash while alone counts, and then
the strike counts as well, so an event that kills its process runs max_attempts times; from then on it always runs
alone, so that it never takes neighbours with it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.brokers.base import Ended, History
from orchestrator.topology.model import RetryPolicy

_EARLY = 0.25  # seconds: a retry that comes this much too soon runs anyway (clocks of broker and worker differ)
_KEPT = 300  # characters of an error that a history keeps
CRASHED = "WorkerCrashed"


@dataclass(frozen=True, slots=True)
class Run:
    """Run it; `alone`: with the worker to itself; `mark`: store this history before it starts."""

    alone: bool = False
    mark: History | None = None


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Its last permitted attempt has already ended in a crash: do not run it."""

    reason: str
    history: History


@dataclass(frozen=True, slots=True)
class Wait:
    """Its retry is not due: give it back for `delay` seconds."""

    delay: float


@dataclass(frozen=True, slots=True)
class Retry:
    """Hand it out again after `delay` seconds, with this history."""

    history: History
    delay: float


@dataclass(frozen=True, slots=True)
class Exhausted:
    """No more runs. `reason` is one word for the dead letter: exhausted, given_up, rejected, undecodable …"""

    reason: str
    history: History


@dataclass(frozen=True, slots=True)
class Fault:
    """What is known of a failed run. `names` are the exception's and its bases' names, bare and dotted; `final` is the
    reason for which no retry can help, when there is one."""

    names: tuple[str, ...]
    message: str
    final: str | None = None

    @property
    def summary(self) -> str:
        return f"{self.names[0] if self.names else 'error'}: {self.message}"[:_KEPT]


def before_run(history: History, redelivered: bool, policy: RetryPolicy, now: float) -> Run | DeadLetter | Wait:
    """What to do with a delivery. A run that was marked and never heard of again happened on a host that is lost: it
    counts as a crash here, as on_crash counts those that left a journal."""
    if (rest := history.rest(now)) > _EARLY:
        return Wait(rest)
    if history.open:
        history = on_crash(history, Ended.STARTED_ALONE if history.alone else Ended.STARTED, only_one=False)
        redelivered = True
    if history.attempts >= policy.max_attempts:
        return DeadLetter("crashed" if history.error.startswith(CRASHED) else "exhausted", replace(history, open=False))
    return Run(alone=history.alone, mark=replace(history, open=True) if redelivered else None)


def after_failure(
    history: History, fault: Fault, policy: RetryPolicy, now: float, rng: Callable[[], float]
) -> Retry | Exhausted:
    """A run has ended in an exception or at its timeout. `rng` gives numbers in [0, 1) for the jitter."""
    failed = replace(
        _survived(history),
        attempts=history.attempts + 1,
        first_failed_at=history.first_failed_at or now,
        last_failed_at=now,
        error=fault.summary,
    )
    if fault.final is not None:
        return Exhausted(fault.final, failed)
    if set(fault.names) & set(policy.give_up_on):
        return Exhausted("given_up", failed)
    if failed.attempts >= policy.max_attempts:
        return Exhausted("exhausted", failed)
    return _again(failed, backoff(failed.attempts, policy, rng), policy, now)


def after_retry_later(history: History, delay: float, policy: RetryPolicy, now: float) -> Retry | Exhausted:
    """The handler asked for another run. Not an attempt, but give_up_after runs from the first time it asked."""
    asked = replace(_survived(history), first_failed_at=history.first_failed_at or now, last_failed_at=now)
    return _again(asked, max(0.0, delay), policy, now)


def after_interruption(history: History) -> Retry:
    """The run was cancelled because the worker drains: it goes back at once and uncounted."""
    return Retry(replace(history, open=False, not_before=0.0), 0.0)


def on_crash(history: History, ended: Ended, only_one: bool) -> History:
    """The worker died with this event unsettled. `only_one`: nothing else had started, so it is the culprit."""
    if ended is Ended.RETURNED:
        return replace(history, open=False)
    if ended is Ended.STARTED and not only_one:
        return replace(history, strikes=history.strikes + 1, alone=True, open=False, not_before=0.0)
    blamed = ended is Ended.BLAMED
    what = (
        "Timeout: it would not stop at its timeout" if blamed else f"{CRASHED}: the worker process ended while it ran"
    )
    return replace(
        history,
        attempts=history.attempts + 1 + history.strikes,
        strikes=0,
        alone=True,
        open=False,
        not_before=0.0,
        error=what,
    )


def backoff(attempt: int, policy: RetryPolicy, rng: Callable[[], float]) -> float:
    """Seconds to wait after the `attempt`-th failed run (from 1). `delays` are taken as they are, without max_delay."""
    if policy.delays:
        delay, ceiling = policy.delays[min(attempt, len(policy.delays)) - 1], None
    else:
        delay, ceiling = _computed(attempt, policy), policy.max_delay
        delay = min(delay, ceiling)
    delay *= 1 + policy.jitter * (2 * rng() - 1)
    return max(0.0, delay if ceiling is None else min(delay, ceiling))


def _computed(attempt: int, policy: RetryPolicy) -> float:
    if policy.backoff == "constant":
        return policy.initial_delay
    if policy.backoff == "linear":
        return policy.initial_delay * attempt
    try:
        return float(policy.initial_delay * policy.multiplier ** (attempt - 1))
    except OverflowError:
        return policy.max_delay


def _again(history: History, delay: float, policy: RetryPolicy, now: float) -> Retry | Exhausted:
    """A retry, unless it would start later than give_up_after allows."""
    if now + delay - history.first_failed_at > policy.give_up_after:
        return Exhausted("gave_up_after", history)
    return Retry(replace(history, not_before=now + delay), delay)


def _survived(history: History) -> History:
    """The worker outlived this run: a suspect (it has strikes) is cleared, a proven culprit keeps running alone."""
    return replace(history, open=False, strikes=0, alone=history.alone and history.strikes == 0, not_before=0.0)
