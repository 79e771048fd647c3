"""Loading is linear: twice the agents, about twice the work. Counted in calls, so a busy machine changes nothing."""

from __future__ import annotations

import cProfile
import pstats
from contextlib import nullcontext
from pathlib import Path

import pytest

from orchestrator.topology import TopologyError, load, templates

KINDS = ("routed", "wild", "templated", "repeated", "wrong", "one-channel", "lost")


def text(kind: str, count: int) -> str:
    lines = ["apiVersion: orchestrator/v1", "kind: Topology", "metadata: {name: big}"]
    lines += ["variables: {topic: {default: ai}}", "channels:"]
    lines += [f"  c{i}: {{events: [t{i}.*, 'u{i}.>'], retention: {{max_age: 7d}}}}" for i in range(count // 10)]
    lines += ["  dead: {mode: log}", "defaults: {agents: {dead_letter: dead, handler: 'm:f'}}", "agents:"]
    if kind == "repeated":
        values = ", ".join(str(i) for i in range(count))
        lines.append(
            f"  a-{{{{ i }}}}: {{for_each: {{i: [{values}]}}, subscribe: [t0.x], env: {{I: 'n-{{{{ i }}}}'}}}}"
        )
    for i in range(count if kind != "repeated" else 0):
        c = i // 10
        reads, writes = f"t{c}.x{i % 10}", f"u{c}.y{i % 10}"
        more = ""
        if kind == "wild":
            reads, writes = f"'*.x{i}'" if c == 0 else f"t{c}.>", "'u0.>'"
        if kind == "templated":
            more = f", env: {{ID: '{i}-{{{{ vars.topic }}}}'}}"
        if kind == "one-channel":  # nobody publishes what is read, nobody reads what is published
            reads, writes = f"t0.in{i}", f"t0.out{i}"
        if kind == "lost":
            reads, writes = f"nowhere{i}.x", f"t{i}.x"
        if kind == "wrong":
            more = ", timeout: 5"
        lines.append(f"  a{i}: {{subscribe: [{reads}], publish: [{writes}], concurrency: 4{more}}}")
    return "\n".join(lines)


def calls(path: Path, kind: str, count: int) -> int:
    path.write_text(text(kind, count))
    templates.compiled.cache_clear()
    profile = cProfile.Profile()
    profile.enable()
    with pytest.raises(TopologyError) if kind in ("wrong", "lost") else nullcontext():
        load([path])
    profile.disable()
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_agents_twice_the_work(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    calls(path, kind, 50)  # imports and caches
    once, twice = calls(path, kind, 300), calls(path, kind, 600)
    assert twice < 2.3 * once


def test_a_thousand_templates_with_one_expression_are_compiled_once() -> None:
    templates._expression.cache_clear()
    load(["-"], stdin=text("templated", 300))
    assert templates._expression.cache_info().misses == 1


def test_plain_text_never_reaches_the_templates() -> None:
    templates.compiled.cache_clear()
    load(["-"], stdin=text("routed", 100))
    assert templates.compiled.cache_info().currsize == 0
