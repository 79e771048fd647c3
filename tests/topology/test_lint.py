"""Warnings: what is found, where, and what is left alone because it may well be meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.topology import Diagnostic, load
from tests.topology.say import CHANNELS, HEAD, REAL, loaded

LOGS = """
channels: {work: {events: [w.>], mode: log}, dead: {mode: log}}
defaults: {agents: {dead_letter: dead, handler: "m:f"}}
"""


@dataclass(frozen=True)
class Able:
    max_events: bool = True
    overflow_reject: bool = True
    partitions: bool = True


def codes(text: str) -> list[str]:
    return [w.code for w in loaded(text).warnings]


def one(text: str) -> Diagnostic:
    (found,) = loaded(text).warnings
    return found


@pytest.mark.parametrize("path", REAL, ids=lambda p: p.parent.name)
def test_real_topologies_have_none(path: Path) -> None:
    assert load([path]).warnings == []


def test_a_type_that_comes_from_outside_is_meant() -> None:
    assert codes(LOGS + "agents: {a: {subscribe: [w.in], publish: [w.out]}}") == []


def test_no_publisher_behind_the_entry() -> None:
    found = one(LOGS + "agents: {a: {subscribe: [w.in], publish: [w.mid]}, b: {subscribe: [w.mid, w.never]}}")
    assert found.code == "no-publisher"
    assert "`w.never`" in found.message
    assert found.mark is not None
    assert found.mark.line == 8


def test_no_publisher_because_of_a_slip() -> None:
    found = one(LOGS + "agents: {a: {subscribe: [w.in], publish: [w.complete]}, b: {subscribe: [w.completed]}}")
    assert (found.code, found.suggestion) == ("no-publisher", "did you mean `w.complete`?")


def test_an_external_publisher_counts() -> None:
    assert codes(LOGS + "agents: {a: {external: true, publish: [w.x, w.y]}, b: {subscribe: [w.x, w.y]}}") == []


def test_no_subscriber_of_a_queue() -> None:
    found = one(CHANNELS + "agents: {a: {handler: m:f, subscribe: [agent.x]}}")
    assert found.code == "no-subscriber"
    assert "`task.*`" in found.message
    assert found.mark is not None
    assert found.mark.line == 7


def test_no_subscriber_of_one_published_type() -> None:
    text = "agents: {a: {handler: m:f, subscribe: [task.a], publish: [task.b]}}"
    assert "`task.b`" in one(CHANNELS + text).message
    text = "agents: {a: {handler: m:f, subscribe: [task.*]}}"
    assert codes(CHANNELS + text) == []


def test_start_in_a_queue() -> None:
    text = "agents: {a: {handler: m:f, subscribe: [{events: [task.*], start: latest}]}}"
    assert codes(CHANNELS + text) == ["queue-start"]


def test_idle() -> None:
    assert codes(LOGS + "agents: {a: {publish: [w.x]}, b: {subscribe: [w.x]}}") == ["idle-agent"]
    assert codes("channels: {c: {mode: log}}") == ["idle-channel"]


def test_an_endless_loop() -> None:
    found = one(LOGS + "agents: {a: {subscribe: [w.b], publish: [w.a]}, b: {subscribe: [w.a], publish: [w.b]}}")
    assert found.code == "endless-loop"
    assert "a → b → a" in found.message


@pytest.mark.parametrize(
    "agents",
    [
        "{a: {subscribe: [w.b], publish: [w.a, w.out]}, b: {subscribe: [w.a], publish: [w.b]}}",  # it can end
        "{a: {subscribe: [{events: [w.b], filter: {payload.again: true}}], publish: [w.a]},"
        " b: {subscribe: [w.a], publish: [w.b]}}",
        "{a: {subscribe: [w.a], publish: [w.a]}}",  # nobody is handed what it published itself
        "{a: {subscribe: [w.c, w.b], publish: [w.a]}, b: {subscribe: [w.a], publish: [w.b]},"
        " c: {subscribe: [w.b], publish: [w.done]}}",
    ],
)
def test_circles_with_a_way_out(agents: str) -> None:
    assert "endless-loop" not in codes(LOGS + "agents: " + agents)


def test_somebody_who_only_watches_does_not_end_a_loop() -> None:
    circle = "a: {subscribe: [w.b], publish: [w.a]}, b: {subscribe: [w.a], publish: [w.b]}"
    text = f"agents: {{{circle}, log: {{subscribe: [w.>]}}}}"
    assert codes(LOGS + text) == ["endless-loop"]


def test_a_long_circle_does_not_recurse() -> None:
    agents = "".join(f"  a{i}: {{subscribe: [w.x{i}], publish: [w.x{(i + 1) % 3000}]}}\n" for i in range(3000))
    assert codes(LOGS + "agents:\n" + agents) == ["endless-loop"]


def test_what_a_broker_cannot_do() -> None:
    text = HEAD + "channels: {c: {events: [x], overflow: reject, partitions: 3, retention: {max_events: 5}}}"
    lacking = load(["-"], stdin=text, abilities=lambda kind: Able(False, False, False) if kind == "nats" else None)
    assert [w.code for w in lacking.warnings] == ["unsupported"] * 3
    assert [w.mark.column for w in lacking.warnings if w.mark] == [39, 59, 86]
    assert load(["-"], stdin=text, abilities=lambda kind: Able()).warnings == []
    assert load(["-"], stdin=text, abilities=lambda kind: None).warnings == []


def test_a_default_that_a_broker_lacks_is_not_worth_a_word() -> None:
    text = HEAD + "channels: {c: {events: [x], mode: queue}}\nagents: {a: {external: true, subscribe: [x]}}"
    assert load(["-"], stdin=text, abilities=lambda kind: Able(overflow_reject=False)).warnings == []
