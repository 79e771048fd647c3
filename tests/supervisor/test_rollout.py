"""What runs and what should: each case reads as a line for what runs, and the steps as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.supervisor.rollout import Running, Wanted, agent_digest, converged, steps
from orchestrator.topology.model import Mode, Retention
from tests.supervisor.rig import agent, topology


def running(text: str) -> list[Running]:
    """ "a.0=old a.1=new+ a.2=new-" : + ready, - leaving, ! orphan (and ready)."""
    result = []
    for word in text.split():
        place, _, rest = word.partition("=")
        name, _, slot = place.partition(".")
        mark = rest[-1] if rest[-1] in "+-!" else ""
        result.append(Running(name, int(slot), rest.rstrip("+-!"), mark in ("+", "!"), mark == "-", mark == "!"))
    return result


A = {"a": Wanted("new", 1)}
A2 = {"a": Wanted("new", 2)}
GATED = {"a": Wanted("new", 1, gate=True), "b": Wanted("new", 1, gate=True)}
TURNS = {"a": Wanted("new", 2, overlap=False)}

CASES = [
    ("the first start", "", A2, [], "start a.0 start a.1"),
    ("nothing to do", "a.0=new+ a.1=new+", A2, [], ""),
    ("one is on its way", "a.0=new a.1=new+", A2, [], ""),
    ("more replicas", "a.0=new+", A2, [], "start a.1"),
    ("fewer replicas", "a.0=new+ a.1=new+", A, [], "drain a.1"),
    ("an agent that went", "a.0=new+ z.0=old+ z.1=old", A, [], "drain z.0 drain z.1"),
    ("a replacement beside the old one", "a.0=old+", A, [], "start a.1"),
    ("the old one stays until it is ready", "a.0=old+ a.1=new", A, [], ""),
    ("and drains then", "a.0=old+ a.1=new+", A, [], "drain a.0"),
    ("and is left alone after that", "a.0=old- a.1=new+", A, [], ""),
    ("the next edit uses the free slot", "a.1=older+", A, [], "start a.0"),
    ("a crashed one counts as being there", "a.0=old a.1=new", A, [], ""),
    ("an edit during an edit", "a.0=older+ a.1=old", A, [], "start a.2"),
    ("taken back: the new one goes", "a.0=new+ a.1=bad", A, [], "drain a.1"),
    ("an orphan is replaced", "a.0=new!", A, [], "start a.1"),
    ("and drains when its successor is ready", "a.0=new! a.1=new+", A, [], "drain a.0"),
    ("gate: nothing old drains", "a.0=old+ b.0=old+ a.1=new+ b.1=new", GATED, [], ""),
    ("gate: until all are ready", "a.0=old+ b.0=old+ a.1=new+ b.1=new+", GATED, [], "drain a.0 drain b.0"),
    ("gate: also what was removed waits", "a.1=new b.1=new+ z.0=old+", GATED, [], ""),
    ("a journal is taken over by a start", "", A, [("a", 3)], "start a.3"),
    ("or by a worker of its own", "a.0=new+", A, [("a", 3)], "recover a.3"),
    ("not while somebody is there", "a.0=new+ a.3=old-", A, [("a", 3)], ""),
    ("not for an agent that is gone", "a.0=new+", A, [("z", 3)], ""),
    ("turns: the old one goes first", "a.0=old+ a.1=old+", TURNS, [], "drain a.0"),
    ("turns: one after the other", "a.0=old- a.1=old+", TURNS, [], ""),
    ("turns: then the new one in its slot", "a.1=old+", TURNS, [], "start a.0"),
    ("turns: the next one waits for it", "a.0=new a.1=old+", TURNS, [], ""),
    ("turns: and goes when it is ready", "a.0=new+ a.1=old+", TURNS, [], "drain a.1"),
    ("turns: taken back", "a.0=bad a.1=new+", TURNS, [], "drain a.0"),
    ("turns: nothing beyond the replicas", "a.0=new+ a.1=new+", TURNS, [], ""),
]


@pytest.mark.parametrize(("name", "have", "wanted", "left", "expected"), CASES, ids=[case[0] for case in CASES])
def test_steps(name, have, wanted, left, expected):
    found = steps(running(have), wanted, left)
    assert " ".join(f"{step.kind} {step.agent}.{step.slot}" for step in found) == expected
    assert all(step.cause for step in found)


@pytest.mark.parametrize(
    ("have", "wanted"), [("a.0=new+ a.1=bad", A), ("a.0=bad a.1=new+", TURNS), ("a.0=new+ z.0=bad", A)]
)
def test_what_never_started_is_not_said_to_be_replaced(have, wanted):
    [cause] = [step.cause for step in steps(running(have), wanted) if step.kind == "drain"]
    assert cause == "it is not ready, and no longer wanted"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_an_edit_comes_to_its_end_and_never_has_two_in_a_slot(overlap, replicas):
    wanted = {"a": Wanted("new", replicas, overlap, gate=True)}
    have = [Running("a", slot, "old", ready=True) for slot in range(replicas)]
    for _ in range(50):
        assert len({r.slot for r in have}) == len(have)
        assert sum(r.ready or r.leaving for r in have) >= (replicas if overlap else replicas - 1)
        assert overlap or len(have) <= replicas
        if converged(have, wanted):
            break
        have = [replace(r, ready=True) for r in have if not r.leaving]
        for step in steps(have, wanted):
            if step.kind == "start":
                have.append(Running("a", step.slot, "new"))
            else:
                have = [replace(r, leaving=True, ready=False) if r.slot == step.slot else r for r in have]
    assert converged(have, wanted)


BASE = topology(Path("/x"), agent(), agent("writing"))
RESEARCH = BASE.agents["research"]


def changed(**fields):
    return replace(BASE, agents={**BASE.agents, "research": replace(RESEARCH, **fields)})


def with_channel(**fields):
    return replace(BASE, channels={"tasks": replace(BASE.channels["tasks"], **fields)})


@pytest.mark.parametrize(
    ("edit", "restarts"),
    [
        (BASE, False),
        (changed(concurrency=1), True),
        (changed(config={"depth": 4}), True),
        (changed(retry=replace(RESEARCH.retry, max_attempts=9)), True),
        (changed(replicas=5), False),
        (changed(description="other words"), False),
        (changed(drain_timeout=1.0), False),
        (with_channel(mode=Mode.QUEUE), True),
        (with_channel(retention=Retention(max_age=1.0)), True),
        (replace(BASE, brokers={"main": replace(BASE.brokers["main"], prefix="x.")}), True),
        (replace(BASE, description="other", marks={}), False),
        (replace(BASE, agents={"research": RESEARCH}), False),
    ],
)
def test_only_what_matters_to_an_agent_restarts_it(edit, restarts):
    before, after = agent_digest(BASE, RESEARCH), agent_digest(edit, edit.agents["research"])
    assert (before != after) is restarts


def test_code_restarts_it():
    assert agent_digest(BASE, RESEARCH, "one") != agent_digest(BASE, RESEARCH, "two")
