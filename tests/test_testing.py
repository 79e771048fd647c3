"""orchestrator.testing: what a user's test may rely on. Each test is one that a user could write."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from orchestrator import AgentEvent, Context, Reject, RetryLater
from orchestrator.errors import HandlerLoadError, RequestTimeout
from orchestrator.testing import SyncTopologyTest, TopologyTest
from orchestrator.topology.diagnostics import TopologyError
from tests.patience import PATIENCE

Write = Callable[..., Path]

TOPOLOGY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {name: trial}
brokers: {main: {url: "nats://nowhere.invalid:4222"}}
channels:
  tasks: {events: [task.*], mode: queue}
  events: {events: [agent.*], mode: log}
  dead-letters: {mode: log}
defaults:
  agents:
    dead_letter: dead-letters
    retry: {max_attempts: 4, backoff: exponential, initial_delay: 1h, multiplier: 2, max_delay: 12h, jitter: 0}
agents:
  research:
    handler: trial_agents:research
    subscribe: [task.assigned]
    publish: [agent.started, agent.completed]
    MORE
  writing:
    handler: trial_agents:writing
    subscribe: [agent.completed]
"""

AGENTS = """\
async def research(event, ctx):
    await ctx.publish("agent.completed", {"about": event.payload["query"]})

async def writing(event, ctx):
    pass
"""


@pytest.fixture
def topology(tmp_path: Path) -> Write:
    """Writes the topology above with some more lines for `research`; returns its path."""

    def write(more: str = "replicas: 1") -> Path:
        (tmp_path / "trial_agents.py").write_text(AGENTS)
        path = tmp_path / "topology.yaml"
        path.write_text(TOPOLOGY.replace("MORE", more))
        return path

    return write


async def nothing(event: AgentEvent, ctx: Context) -> None:
    """Handles an event by doing nothing."""


async def test_an_event_flows_through_the_agents(topology: Write) -> None:
    async with TopologyTest(topology()) as t:
        sent = await t.publish("task.assigned", {"query": "whales"})
        await t.run_until_idle()
        (done,) = t.published("agent.completed")
        assert done.payload == {"about": "whales"}
        assert (done.source_agent, done.correlation_id) == ("research", sent.correlation_id)
        assert t.published(by="research") == [done]
        assert t.runs("writing") == [done]
        assert t.dead_letters() == []


async def test_hours_of_retries_take_no_time(topology: Write) -> None:
    begin = time.monotonic()
    async with TopologyTest(topology()) as t:
        await t.publish("task.assigned", {"qury": "a mistake"})
        passed = await t.run_until_idle()
        (dead,) = t.dead_letters("research")
    assert passed == pytest.approx((1 + 2 + 4) * 3600, abs=5)
    assert time.monotonic() - begin < PATIENCE
    assert (dead.attempts, dead.reason, dead.error_type) == (4, "exhausted", "KeyError")
    assert dead.event is not None
    assert dead.event.payload == {"qury": "a mistake"}


async def test_history_and_timestamps_follow_the_virtual_clock(topology: Write) -> None:
    start = datetime(2031, 5, 1, 12, tzinfo=UTC)
    async with TopologyTest(topology(), start=start) as t:
        sent = await t.publish("task.assigned", {"qury": "a mistake"})
        assert sent.timestamp == t.now == start
        await t.run_until_idle()
        (dead,) = t.dead_letters()
        assert (t.now - start).total_seconds() == pytest.approx(7 * 3600, abs=5)
        assert dead.headers["dlq-first-failed-at"].startswith("2031-05-01T12:00")
        assert dead.headers["dlq-last-failed-at"].startswith("2031-05-01T19:00")


async def test_a_given_function_stands_in_for_a_handler(topology: Write) -> None:
    seen = []

    async def writing(event: AgentEvent, ctx: Context) -> None:
        seen.append(event.payload)

    async with TopologyTest(topology(), handlers={"writing": writing}) as t:
        await t.publish("task.assigned", {"query": "whales"})
        await t.run_until_idle()
    assert seen == [{"about": "whales"}]


async def test_a_plain_function_may_stand_in_and_publish_from_its_thread(topology: Write) -> None:
    def research(event: AgentEvent, ctx: Any) -> None:
        time.sleep(0.05)
        ctx.publish("agent.completed", {"by": "thread"})

    async with TopologyTest(topology(), handlers={"research": research}) as t:
        await t.publish("task.assigned", {})
        await t.run_until_idle()
        assert [event.payload for event in t.published("agent.completed")] == [{"by": "thread"}]


async def test_a_handler_that_fails_twice_succeeds_the_third_time(topology: Write) -> None:
    async def research(event: AgentEvent, ctx: Context) -> None:
        if ctx.attempt < 3:
            raise ConnectionError("not yet")
        await ctx.publish("agent.completed", {"attempt": ctx.attempt})

    async with TopologyTest(topology(), handlers={"research": research}) as t:
        await t.publish("task.assigned", {})
        assert await t.run_until_idle() == pytest.approx(3 * 3600, abs=5)
        assert [event.payload for event in t.published("agent.completed")] == [{"attempt": 3}]
        assert len(t.runs("research")) == 3


async def test_a_rejected_event_is_dead_at_once(topology: Write) -> None:
    async def research(event: AgentEvent, ctx: Context) -> None:
        raise Reject("changed my mind")

    async with TopologyTest(topology(), handlers={"research": research}) as t:
        await t.publish("task.assigned", {})
        assert await t.run_until_idle() == 0
        assert [dead.reason for dead in t.dead_letters()] == ["rejected"]


async def test_retry_later_counts_no_attempt(topology: Write) -> None:
    async def research(event: AgentEvent, ctx: Context) -> None:
        if len(t.runs("research")) <= 10:
            raise RetryLater("1h")

    async with TopologyTest(topology(), handlers={"research": research}) as t:
        await t.publish("task.assigned", {})
        assert await t.run_until_idle() == pytest.approx(10 * 3600, abs=5)
        assert t.dead_letters() == []


async def test_a_handler_that_takes_too_long_is_stopped_at_its_timeout(topology: Write) -> None:
    async def research(event: AgentEvent, ctx: Context) -> None:
        await asyncio.sleep(3600)

    async with TopologyTest(topology("retry: {max_attempts: 1}"), handlers={"research": research}) as t:
        await t.publish("task.assigned", {})
        assert await t.run_until_idle() == pytest.approx(300, abs=5)
        assert [dead.error_type for dead in t.dead_letters()] == ["TimeoutError"]


async def test_time_can_be_stepped(topology: Write) -> None:
    async with TopologyTest(topology()) as t:
        await t.publish("task.assigned", {})
        for hours, attempts in ((0.5, 1), (1, 2), (2, 3), (4, 4)):
            await t.advance(hours * 3600)
            assert len(t.runs("research")) == attempts


async def test_a_delayed_event_is_waited_for(topology: Write) -> None:
    async with TopologyTest(topology()) as t:
        await t.publish("task.assigned", {"query": "late"}, delay="6h")
        await t.advance("5h")
        assert t.runs("research") == []
        await t.run_until_idle()
        assert len(t.published("agent.completed")) == 1


async def test_undecodable_bytes_become_a_dead_letter_verbatim(topology: Write) -> None:
    async with TopologyTest(topology()) as t:
        await t.publish_raw("task.assigned", b"\x00 not json")
        await t.run_until_idle()
        (dead,) = t.dead_letters()
        assert (dead.reason, dead.body, dead.event) == ("undecodable", b"\x00 not json", None)
        assert t.runs("research") == []


async def test_a_request_is_answered_by_what_the_handler_returns(topology: Write) -> None:
    async def research(event: AgentEvent, ctx: Context) -> dict[str, Any]:
        return {"double": event.payload["number"] * 2}

    async with TopologyTest(topology(), handlers={"research": research}) as t:
        assert (await t.request("task.assigned", {"number": 21})).payload == {"double": 42}


async def test_a_request_that_nobody_answers_times_out_at_once_in_real_time(topology: Write) -> None:
    begin = time.monotonic()
    async with TopologyTest(topology(), handlers={"research": nothing}) as t:
        with pytest.raises(RequestTimeout):
            await t.request("task.assigned", {}, timeout=600.0)
    assert time.monotonic() - begin < PATIENCE


async def test_a_crash_counts_for_what_was_running_and_for_nothing_else(topology: Write) -> None:
    async def research(event: AgentEvent, ctx: Context) -> None:
        if event.payload.get("poison"):
            await asyncio.sleep(60)
        await ctx.publish("agent.completed", {"number": event.payload["number"]})

    async with TopologyTest(topology("concurrency: 1"), handlers={"research": research}) as t:
        await t.publish("task.assigned", {"number": 0, "poison": True})
        for number in range(1, 4):
            await t.publish("task.assigned", {"number": number})
        while not t.dead_letters():
            await t.advance(1)
            await t.crash("research")
        await t.run_until_idle()
        (dead,) = t.dead_letters()
        assert (dead.reason, dead.attempts) == ("crashed", 4)
        assert {event.payload["number"] for event in t.published("agent.completed")} == {1, 2, 3}


async def test_an_agent_that_pauses_itself_is_not_waited_for(topology: Write) -> None:
    more = "on_exhausted: pause\n    retry: {max_attempts: 1}"
    async with TopologyTest(topology(more)) as t:
        await t.publish("task.assigned", {"qury": "a mistake"})
        await t.run_until_idle()
        assert set(t.paused) == {"research"}
        assert t.dead_letters() == []


async def test_agents_that_run_in_circles_are_reported(topology: Write) -> None:
    async def again(event: AgentEvent, ctx: Context) -> None:
        await ctx.publish("agent.started", {}, target_agent="echo" if ctx.agent == "writing" else "writing")

    path = topology()
    lines = "handler: trial_agents:writing\n    subscribe: [agent.started]\n    publish: [agent.started]"
    both = f"  writing:\n    {lines}\n  echo:\n    {lines}\n"
    path.write_text(path.read_text().partition("  writing:")[0] + both)
    async with TopologyTest(path, handlers={"writing": again, "echo": again}, patience=1.0) as t:
        await t.publish("agent.started", {}, target_agent="echo")
        with pytest.raises(AssertionError, match="still busy after 1 s"):
            await t.run_until_idle()


async def test_a_handler_that_never_ends_is_reported_with_its_name(topology: Write) -> None:
    async with TopologyTest(topology("timeout: 7d"), handlers={"research": forever}) as t:
        await t.publish("task.assigned", {})
        with pytest.raises(AssertionError, match="trial-research: 0 unread, 1 in flight"):
            await t.run_until_idle("1h")


async def forever(event: AgentEvent, ctx: Context) -> None:
    await asyncio.sleep(1e9)


async def test_events_trimmed_unread_raise_an_alarm(topology: Write) -> None:
    path = topology()
    text = path.read_text().replace("mode: log}", "mode: log, retention: {max_events: 2}}", 1)
    path.write_text(text)
    async with TopologyTest(path, handlers={"writing": forever}) as t:
        for number in range(20):
            await t.publish("agent.completed", {"number": number})
        await t.advance(1)
        assert any("unread events were trimmed" in alarm for alarm in t.alarms)


async def test_env_is_set_inside_and_gone_afterwards(topology: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIAL_DEPTH", raising=False)
    async with TopologyTest(topology('env: {TRIAL_DEPTH: "3"}')):
        assert os.environ["TRIAL_DEPTH"] == "3"
    assert "TRIAL_DEPTH" not in os.environ


async def test_the_clock_is_the_real_one_again_afterwards(topology: Write) -> None:
    loop = asyncio.get_running_loop()
    async with TopologyTest(topology(), start=datetime(2040, 1, 1, tzinfo=UTC)) as t:
        await t.advance("100d")
    assert abs(loop.time() - time.monotonic()) < 1
    assert abs(AgentEvent(event_type="task.assigned").timestamp.timestamp() - time.time()) < 5
    begin = time.monotonic()
    await asyncio.sleep(0.05)
    assert time.monotonic() - begin >= 0.05


async def test_a_lifespan_surrounds_the_handler(tmp_path: Path, topology: Write) -> None:
    path = topology()
    (tmp_path / "trial_agents.py").write_text(
        AGENTS
        + """
events = []
async def lifespan(ctx):
    events.append("up " + ctx.agent)
    yield
    events.append("down " + ctx.agent)
"""
    )
    async with TopologyTest(path):
        trial_agents = sys.modules["trial_agents"]
        assert sorted(trial_agents.events) == ["up research", "up writing"]
    assert sorted(trial_agents.events) == ["down research", "down writing", "up research", "up writing"]


async def test_a_wrong_file_says_what_is_wrong(topology: Write) -> None:
    path = topology("max_atempts: 3")
    with pytest.raises(TopologyError):
        await TopologyTest(path).__aenter__()


async def test_a_handler_that_does_not_import_says_so(topology: Write) -> None:
    path = topology()
    path.write_text(path.read_text().replace("trial_agents:writing", "trial_agents:wriitng"))
    with pytest.raises(HandlerLoadError, match="wriitng"):
        await TopologyTest(path).__aenter__()


async def test_a_stand_in_for_an_unknown_agent_says_so(topology: Write) -> None:
    with pytest.raises(ValueError, match="no such agent: wrting"):
        await TopologyTest(topology(), handlers={"wrting": nothing}).__aenter__()


async def test_looking_at_an_unknown_agent_says_so(topology: Write) -> None:
    """Or `== []` would hold for whatever was misspelt."""
    async with TopologyTest(topology()) as t:
        for look in (t.dead_letters, t.runs):
            with pytest.raises(ValueError, match="no such agent: wrting"):
                look("wrting")


def test_the_same_without_async(topology: Write) -> None:
    with SyncTopologyTest(topology()) as t:
        t.publish("task.assigned", {"query": "whales"})
        t.publish("task.assigned", {"qury": "a mistake"})
        assert t.run_until_idle() == pytest.approx(7 * 3600, abs=5)
        assert [event.payload for event in t.published("agent.completed")] == [{"about": "whales"}]
        assert [dead.agent for dead in t.dead_letters()] == ["research"]


def test_a_thousand_failing_events_and_a_day_of_retries_stay_quick(topology: Write) -> None:
    begin = time.monotonic()
    with SyncTopologyTest(topology()) as t:
        for number in range(1000):
            t.publish("task.assigned", {"number": number})
        t.run_until_idle()
        assert len(t.dead_letters()) == 1000
    assert time.monotonic() - begin < 2 * PATIENCE
