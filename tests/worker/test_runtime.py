"""What the runtime does with an event, over the memory adapter: who gets it, what is published, how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from orchestrator import AgentEvent, Context, OrchestratorError, Reject, SyncContext
from orchestrator.brokers.memory import adapter
from orchestrator.testing import TopologyTest

TOPOLOGY = """
apiVersion: orchestrator/v1
kind: Topology
metadata: {name: rules}
brokers:
  main: {url: "nats://nowhere.invalid:4222"}
  other: {url: "nats://elsewhere.invalid:4222"}
channels:
  tasks:
    broker: main
    events: [task.*]
    mode: queue
    schemas: {task.strict: {type: object, required: [n], properties: {n: {type: integer}}}}
  news: {broker: main, events: [news.*, agent.*], mode: log}
  far: {broker: other, events: [far.*], mode: log}
  dead: {broker: main, mode: log}
  dead-far: {broker: other, mode: log}
defaults:
  agents:
    dead_letter: dead
    retry: {max_attempts: 3, initial_delay: 1s, jitter: 0}
agents:
  worker:
    handler: nothing:at_all
    subscribe: [task.*]
    publish: [news.out]
    propagate: [conversation]
    concurrency: 4
    timeout: 30s
    config: {depth: 3}
  reader:
    handler: nothing:at_all
    subscribe: [{events: [news.*], filter: {payload.verdict: [reject, unsure]}}]
    publish: [news.*, far.copy]
  auditor:
    handler: nothing:at_all
    subscribe: [{events: [news.*], include_targeted: true}]
  distant:
    handler: nothing:at_all
    subscribe: [{events: [far.*]}, {events: [news.*]}]
    publish: [far.done, news.echo]
    dead_letter: dead-far
    concurrency: 2
  watcher:
    handler: nothing:at_all
    subscribe: [agent.failed]
    retry: {max_attempts: 1}
"""


async def nothing(event: AgentEvent, ctx: Context) -> None: ...


def trial(folder: Path, **handlers: Any) -> TopologyTest:
    path = folder / "topology.yaml"
    path.write_text(TOPOLOGY)
    agents = ("worker", "reader", "auditor", "distant", "watcher")
    return TopologyTest(path, handlers={name: handlers.get(name, nothing) for name in agents})


def takes_at_most(t: TopologyTest, size: int) -> None:
    """From now on the main broker refuses larger messages."""
    adapter.hub(t.topology.brokers["main"].url).max_body = size


# --- who gets it ----------------------------------------------------------------------------------------------


async def test_filters_targets_and_what_an_agent_published_itself(tmp_path: Path) -> None:
    async with trial(tmp_path) as t:
        await t.publish("news.a", {"verdict": "reject"}, event_id="filtered-in")
        await t.publish("news.a", {"verdict": "fine"}, event_id="filtered-out")
        await t.publish("news.a", {"verdict": "unsure"}, event_id="targeted", target_agent="reader")
        await t.publish("news.a", {"verdict": "unsure"}, event_id="for-nobody", target_agent="stranger")
        await t.publish("news.a", {"verdict": "unsure"}, event_id="own", source_agent="reader")
        await t.publish(
            "news.a", {"verdict": "unsure"}, event_id="own-for-itself", source_agent="reader", target_agent="reader"
        )
        await t.run_until_idle()
        assert [e.event_id for e in t.runs("reader")] == ["filtered-in", "targeted", "own-for-itself"]
        assert len(t.runs("auditor")) == 6
        assert [e.event_id for e in t.runs("distant")] == ["filtered-in", "filtered-out", "own"]
        assert t.dead_letters() == []


async def test_in_a_queue_an_event_for_another_agent_is_dead_lettered_once(tmp_path: Path) -> None:
    async with trial(tmp_path) as t:
        await t.publish("task.run", {}, target_agent="somebody")
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert (letter.reason, letter.error_type, letter.attempts) == ("misrouted", "Misrouted", 1)
        assert "somebody" in letter.message
        assert t.runs("worker") == []


async def test_a_body_of_another_type_than_its_subject_is_misrouted(tmp_path: Path) -> None:
    async with trial(tmp_path) as t:
        await t.publish_raw("task.run", AgentEvent(event_type="other.thing").to_bytes())
        await t.run_until_idle()
        assert [letter.reason for letter in t.dead_letters()] == ["misrouted"]


async def test_schemas_are_checked_at_delivery_too(tmp_path: Path) -> None:
    async with trial(tmp_path) as t:
        await t.publish_raw("task.strict", b'{"event_type": "task.strict", "payload": {"n": "x"}}')
        await t.publish_raw("task.strict", b'{"payload": {"n": 1}}')
        await t.run_until_idle()
        assert [letter.reason for letter in t.dead_letters()] == ["invalid"]
        assert [e.payload for e in t.runs("worker")] == [{"n": 1}]


# --- how the handler is called --------------------------------------------------------------------------------


class Query(BaseModel):
    query: str


async def test_a_payload_model_is_filled_in_any_order_and_a_wrong_payload_rejected_at_once(tmp_path: Path) -> None:
    seen = []

    async def handler(ctx: Context, query: Query, event: AgentEvent) -> Query:
        seen.append((query, ctx.config["depth"], ctx.attempt, ctx.event is event, ctx.agent))
        return Query(query=query.query.upper())

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {"query": "whales"})
        await t.publish("task.run", {"wrong": 1})
        await t.run_until_idle()
        assert seen == [(Query(query="whales"), 3, 1, True, "worker")]
        assert [e.payload for e in t.published("news.out")] == [{"query": "WHALES"}]
        [letter] = t.dead_letters()
        assert (letter.reason, letter.attempts) == ("invalid", 1)
        assert "query" in letter.message


async def test_a_request_is_answered_with_the_result_or_with_the_error(tmp_path: Path) -> None:
    def handler(event: AgentEvent, ctx: SyncContext) -> dict[str, Any]:
        if "bad" in event.payload:
            raise Reject("not today")
        return {"twice": event.payload["n"] * 2}

    async with trial(tmp_path, worker=handler) as t:
        reply = await t.request("task.run", {"n": 21})
        assert (reply.event_type, reply.payload, reply.source_agent) == ("task.run.reply", {"twice": 42}, "worker")
        failed = await t.request("task.run", {"bad": 1})
        assert failed.payload["error"]["message"] == "not today"
        await t.run_until_idle()
        assert len(t.dead_letters()) == 1


async def test_a_handler_requests_from_another_agent(tmp_path: Path) -> None:
    async def ask(event: AgentEvent, ctx: Context) -> None:
        with pytest.raises(TypeError, match="tmeout"):
            await ctx.request("news.q", {"verdict": "unsure"}, tmeout=5)  # type: ignore[call-arg]
        reply = await ctx.request("news.q", {"verdict": "unsure"}, timeout=5, metadata={"from": "reader"})
        await ctx.publish("news.got", {"verdict": "x", "answer": reply.payload["answer"]})

    async def answer(event: AgentEvent) -> dict[str, Any] | None:
        asked = event.event_type == "news.q" and event.metadata["from"] == "reader"
        return {"answer": 42} if asked else None

    async with trial(tmp_path, reader=ask, auditor=answer) as t:
        await t.publish("news.a", {"verdict": "reject"})
        await t.run_until_idle()
        assert [e.payload["answer"] for e in t.published("news.got")] == [42]


async def test_sys_exit_in_a_handler_is_a_failed_attempt(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        sys.exit(3)

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert (letter.error_type, letter.attempts) == ("SystemExit", 3)


async def test_a_handler_that_swallows_its_cancellation_has_timed_out_all_the_same(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert (letter.error_type, letter.attempts) == ("TimeoutError", 3)


async def test_a_task_of_the_handlers_own_that_is_cancelled_fails_the_attempt(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        task = asyncio.ensure_future(asyncio.sleep(3600))
        asyncio.get_running_loop().call_soon(task.cancel)
        await task

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        assert [letter.error_type for letter in t.dead_letters()] == ["asyncio.exceptions.CancelledError"]


# --- what it publishes ----------------------------------------------------------------------------------------


async def test_context_is_copied_and_rerun_outputs_appear_once(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        await ctx.publish("news.out", {"n": 1}, metadata={"own": True})
        await asyncio.sleep(1)  # the first goes out before the failure
        if ctx.attempt == 1:
            raise ValueError("once")
        await ctx.publish("news.out", {"n": 2})

    async with trial(tmp_path, worker=handler) as t:
        sent = await t.publish("task.run", {}, metadata={"conversation": "c7", "private": 1})
        await t.run_until_idle()
        out = t.published("news.out")
        assert [e.payload["n"] for e in out] == [1, 2]
        assert out[0].metadata == {"conversation": "c7", "causation_id": sent.event_id, "own": True}
        assert {e.correlation_id for e in out} == {sent.correlation_id}


async def test_outputs_of_a_failed_attempt_that_were_not_sent_are_dropped(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        await ctx.publish("news.out", {"attempt": ctx.attempt})
        if ctx.attempt == 1:
            raise ValueError("once")

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        assert [e.payload for e in t.published("news.out")] == [{"attempt": 2}]


@pytest.mark.parametrize("wait", [0, 1])
async def test_an_output_that_the_broker_refuses_fails_the_attempt(tmp_path: Path, wait: float) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        await ctx.publish("news.out", {"big": "x" * (30_000 if ctx.attempt < 3 else 10)})
        await asyncio.sleep(wait)

    async with trial(tmp_path, worker=handler) as t:
        takes_at_most(t, 20_000)
        await t.publish("task.run", {})
        await t.run_until_idle()
        assert [len(e.payload["big"]) for e in t.published("news.out")] == [10]
        assert len(t.runs("worker")) == 3


async def test_outputs_on_another_broker_are_confirmed_before_the_event_is_settled(tmp_path: Path) -> None:
    async def copy(event: AgentEvent, ctx: Context) -> None:
        await ctx.publish("far.copy", {"of": event.event_id})
        await ctx.publish("news.local", {"verdict": "x"})

    async with trial(tmp_path, reader=copy) as t:
        sent = await t.publish("news.a", {"verdict": "reject"})
        await t.run_until_idle()
        assert [e.payload["of"] for e in t.published("far.copy")] == [sent.event_id]
        assert len(t.published("news.local")) == 1
        assert {e.event_type for e in t.runs("distant")} == {"far.copy", "news.a", "news.local"}


async def test_a_context_cannot_publish_after_its_handler_has_ended(tmp_path: Path) -> None:
    late: list[BaseException] = []

    async def handler(event: AgentEvent, ctx: Context) -> None:
        async def later() -> None:
            await asyncio.sleep(1)
            try:
                await ctx.publish("news.out", {})
            except OrchestratorError as error:
                late.append(error)

        handler.task = asyncio.ensure_future(later())  # type: ignore[attr-defined]

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        await t.advance(2)
        assert len(late) == 1
        assert t.published("news.out") == []


# --- how it ends ----------------------------------------------------------------------------------------------


async def test_agent_failed_is_published_and_never_about_an_agent_failed(tmp_path: Path) -> None:
    async def fails(event: AgentEvent, ctx: Context) -> None:
        raise ValueError("no")

    async with trial(tmp_path, worker=fails, watcher=fails) as t:
        sent = await t.publish("task.run", {"q": 1})
        await t.run_until_idle()
        [told] = t.published("agent.failed")
        assert told.payload["original_event"]["event_id"] == sent.event_id
        assert (told.payload["attempts"], told.payload["error"]) == (3, "ValueError: no")
        assert {letter.agent for letter in t.dead_letters()} == {"worker", "watcher"}


async def test_a_dead_letter_that_is_too_large_is_cut(tmp_path: Path) -> None:
    async def fails(event: AgentEvent, ctx: Context) -> None:
        raise Reject("no")

    async with trial(tmp_path, worker=fails) as t:
        takes_at_most(t, 20_000)
        await t.publish("task.run", {"x": "y" * 19_700})
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert letter.reason == "rejected"
        assert int(letter.headers["dlq-truncated"]) > 19_700


async def test_a_dead_letter_on_another_broker(tmp_path: Path) -> None:
    async def fails(event: AgentEvent, ctx: Context) -> None:
        raise Reject("no")

    async with trial(tmp_path, distant=fails) as t:
        await t.publish("news.a", {})
        await t.publish("far.b", {})
        await t.run_until_idle()
        assert sorted(letter.headers["dlq-channel"] for letter in t.dead_letters("distant")) == ["far", "news"]


async def test_two_subscriptions_share_the_slots(tmp_path: Path) -> None:
    running = most = 0

    async def handler(event: AgentEvent, ctx: Context) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(1)
        running -= 1

    async with trial(tmp_path, distant=handler) as t:
        for n in range(6):
            await t.publish("news.a", {"n": n})
            await t.publish("far.b", {"n": n})
        await t.run_until_idle()
        assert most == 2
        assert len(t.runs("distant")) == 12


async def test_suspects_run_alone_and_the_rest_goes_on(tmp_path: Path) -> None:
    running: set[str] = set()
    beside: dict[str, set[str]] = {}
    crashing = True

    async def handler(event: AgentEvent, ctx: Context) -> None:
        beside[event.event_id] = set(running)
        running.add(event.event_id)
        try:
            await asyncio.sleep(3600 if crashing else 1)
        finally:
            running.discard(event.event_id)

    async with trial(tmp_path, worker=handler) as t:
        for n in range(3):
            await t.publish("task.run", {}, event_id=f"suspect{n}")
        await t.advance(1)
        crashing = False
        running.clear()
        await t.crash("worker")
        for n in range(6):
            await t.publish("task.run", {}, event_id=f"later{n}")
        await t.run_until_idle()
        assert all(beside[f"suspect{n}"] == set() for n in range(3))
        assert any(beside[f"later{n}"] for n in range(6))
        assert t.dead_letters() == []


async def test_a_host_that_is_lost_leaves_no_journal_and_the_crash_is_counted_all_the_same(tmp_path: Path) -> None:
    async def handler(event: AgentEvent, ctx: Context) -> None:
        await asyncio.sleep(20)

    async with trial(tmp_path, worker=handler) as t:
        await t.publish("task.run", {})
        for run in range(1, 5):
            while len(t.runs("worker")) < run:
                await t.advance(1)
            lose_journals(t)
            await t.crash("worker")
        await t.run_until_idle()
        assert len(t.runs("worker")) == 4, "max_attempts, and the first, which nobody could mark"
        [letter] = t.dead_letters()
        assert (letter.reason, letter.attempts) == ("crashed", 3)


def lose_journals(t: TopologyTest) -> None:
    for actor in t._of("worker"):
        os.unlink(actor._spec.journal)


async def test_secrets_do_not_reach_a_dead_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIAL_SECRET", "hunter2hunter2")
    path = tmp_path / "topology.yaml"
    path.write_text(TOPOLOGY.replace("{depth: 3}", "{key: \"{{ secret('env:TRIAL_SECRET') }}\"}"))

    async def fails(event: AgentEvent, ctx: Context) -> None:
        raise Reject(f"cannot log in with {ctx.config['key']}")

    agents = ("reader", "auditor", "distant", "watcher")
    async with TopologyTest(path, handlers={"worker": fails, **dict.fromkeys(agents, nothing)}) as t:
        await t.publish("task.run", {})
        await t.run_until_idle()
        [letter] = t.dead_letters()
        assert letter.message == "cannot log in with ***"
        assert "hunter2" not in json.dumps(dict(letter.headers))
