"""What a handler may do wrong, and what the runtime then still owes: no event stuck, none settled unhandled."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator import AgentEvent, Context, RetryLater, SyncContext
from orchestrator.testing import TopologyTest
from orchestrator.worker.control import Control
from orchestrator.worker.faults import fault_of
from tests.servers.nats import NatsServer
from tests.worker.harness import staged, until
from tests.worker.test_process import topology
from tests.worker.test_runtime import TOPOLOGY, nothing, trial


async def test_a_delay_that_is_none_fails_the_attempt_instead_of_holding_its_slot(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        raise RetryLater(cast(Any, timedelta(seconds=5)))

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert (letter.error_type, letter.attempts) == ("TypeError", 3)


async def test_a_def_that_returns_a_coroutine_has_not_handled_its_event(tmp_path: Path) -> None:
    ran: list[str] = []

    async def inner(event: AgentEvent) -> None:
        ran.append(event.event_id)

    def handler(event: AgentEvent, ctx: SyncContext) -> Any:
        made = inner(event)
        made.close()
        return made

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert (letter.error_type, ran) == ("TypeError", [])
        assert "coroutine" in letter.message


async def test_an_agent_failed_that_its_own_schema_refuses_does_not_keep_the_letter_back(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        raise ValueError("broken")

    (tmp_path / "topology.yaml").write_text(
        TOPOLOGY.replace(
            "events: [news.*, agent.*], mode: log}",
            "events: [news.*, agent.*], mode: log, schemas: {agent.failed: {type: object, required: [ticket]}}}",
        )
    )
    agents = ("worker", "reader", "auditor", "distant", "watcher")
    handlers: dict[str, Callable[..., Any]] = dict.fromkeys(agents, nothing)
    async with TopologyTest(tmp_path / "topology.yaml", handlers=handlers | {"worker": handler}) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        assert [letter.message for letter in t.dead_letters()] == ["broken"]
        assert t.published("agent.failed") == []
        assert any("ticket" in alarm for alarm in t.alarms)


class _Full:
    """A producer that is behind: those who wait come through one after the other."""

    ready = False

    def __init__(self) -> None:
        self.waits = 0

    async def wait_ready(self) -> None:
        self.waits += 1
        await asyncio.sleep(self.waits)


async def test_two_publishes_that_wait_for_room_at_once_do_not_lift_the_timeout(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        attempt, full = cast(Any, ctx)._attempt, cast(Any, _Full())
        await asyncio.gather(attempt.wait_for(full), attempt.wait_for(full))
        await asyncio.sleep(3600)

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle(within="5m")
        [letter] = t.dead_letters()
        assert (letter.error_type, letter.attempts) == ("TimeoutError", 3)


def test_an_exception_is_known_by_each_public_name() -> None:
    import jsonschema

    names = fault_of(jsonschema.ValidationError("no"), str).names
    assert {"ValidationError", "jsonschema.ValidationError", "jsonschema.exceptions.ValidationError"} <= set(names)


@pytest.mark.parametrize("name", ["RequestTimeout", "orchestrator.errors.RequestTimeout"])
def test_our_own_exceptions_too(name: str) -> None:
    from orchestrator.errors import RequestTimeout

    assert name in fault_of(RequestTimeout("late"), str).names


def test_what_status_shows_of_a_worker_holds_no_secret() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Control(theirs, lambda text: text.replace("hunter2", "***")).send("alarm", message="nats://u:hunter2@h", n=1)
        assert json.loads(ours.recv(4096)) == {"type": "alarm", "message": "nats://u:***@h", "n": 1}


async def test_an_output_that_breaks_its_schema_is_tried_again(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        await ctx.publish("news.out", {"n": 1} if ctx.attempt == 2 else {})

    (tmp_path / "topology.yaml").write_text(
        TOPOLOGY.replace(
            "events: [news.*, agent.*], mode: log}",
            "events: [news.*, agent.*], mode: log, schemas: {news.out: {type: object, required: [n]}}}",
        )
    )
    agents = ("worker", "reader", "auditor", "distant", "watcher")
    handlers: dict[str, Callable[..., Any]] = dict.fromkeys(agents, nothing)
    async with TopologyTest(tmp_path / "topology.yaml", handlers=handlers | {"worker": handler}) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        assert t.dead_letters() == []
        assert [e.payload for e in t.published("news.out")] == [{"n": 1}]


async def test_a_drain_does_not_forgive_an_attempt_that_is_over_its_time(
    tmp_path: Path, nats_server: NatsServer
) -> None:
    handler = """
    def handle(event: AgentEvent, ctx: Context):
        note(ctx.attempt)
        if ctx.attempt == 1:
            time.sleep(30)
    """
    async with staged(tmp_path, topology(nats_server.url, "overtime", "timeout: 2s"), handler) as stage:
        worker = stage.worker()
        await worker.said("ready")
        await stage.client.publish("overtime.task.run", {})
        await until(lambda: stage.ran() == ["1"])
        await asyncio.sleep(3)  # the timeout has passed, and the thread sleeps on
        worker.tell("drain", timeout=0.1)
        await worker.said("drained")
        worker.kill()
        await stage.worker().said("status", handled=1)
        assert stage.ran() == ["1", "2"]
