"""Client on a real NATS server: publish, request, errors."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from orchestrator import Client
from orchestrator.errors import BrokerUnavailable, PayloadError, RequestTimeout, RoutingError
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer
from tests.servers.ports import free_port
from tests.worker.harness import staged
from tests.worker.test_process import topology

HANDLER = """
async def handle(event: AgentEvent, ctx: Context):
    if event.payload.get("bad"):
        raise Reject("not today")
    return {"twice": event.payload["n"] * 2}
"""


async def test_publish_is_confirmed_and_deduplicated(tmp_path: Path, nats_server: NatsServer) -> None:
    async with staged(tmp_path, topology(nats_server.url, "cpub"), HANDLER) as stage:
        event, _ = [
            await stage.client.publish("cpub.result.x", {"n": 1}, event_id="one", correlation_id="c") for _ in range(2)
        ]
        found = await stage.stored("results")
        assert (event.event_id, event.correlation_id) == ("one", "c")
        assert len(found) == 1
        assert found[0].body == event.to_bytes()
        assert found[0].headers["traceparent"].startswith("00-")


async def test_many_requests_at_once_get_their_own_answers(tmp_path: Path, nats_server: NatsServer) -> None:
    async with staged(tmp_path, topology(nats_server.url, "creq"), HANDLER) as stage:
        worker = stage.worker()
        await worker.said("ready")
        replies = await asyncio.gather(*(stage.client.request("creq.task.run", {"n": n}) for n in range(50)))
        assert [reply.payload["twice"] for reply in replies] == [n * 2 for n in range(50)]
        assert replies[0].event_type == "creq.task.run.reply"


async def test_a_request_that_dies_is_answered_with_its_error(tmp_path: Path, nats_server: NatsServer) -> None:
    async with staged(tmp_path, topology(nats_server.url, "cerr"), HANDLER) as stage:
        worker = stage.worker()
        await worker.said("ready")
        reply = await stage.client.request("cerr.task.run", {"bad": True}, timeout=PATIENCE)
        assert reply.payload["error"]["reason"] == "rejected"
        assert len(await stage.letters()) == 1


async def test_nobody_answers(tmp_path: Path, nats_server: NatsServer) -> None:
    async with staged(tmp_path, topology(nats_server.url, "cnone"), HANDLER) as stage:
        with pytest.raises(RequestTimeout, match=r"0\.2 s"):
            await stage.client.request("cnone.task.run", {"n": 1}, timeout=0.2)


async def test_errors_come_before_anything_is_sent(tmp_path: Path, nats_server: NatsServer) -> None:
    async with staged(tmp_path, topology(nats_server.url, "cbad"), HANDLER) as stage:
        with pytest.raises(RoutingError):
            await stage.client.publish("unknown.type", {})
        with pytest.raises(PayloadError):
            await stage.client.publish("cbad.result.x", {"x": object()})
        assert await stage.stored("results") == []


async def test_no_broker(tmp_path: Path) -> None:
    (tmp_path / "topology.yaml").write_text(topology(f"nats://127.0.0.1:{free_port()}", "cno").replace("\n    ", "\n"))
    async with Client(tmp_path / "topology.yaml") as client:
        with pytest.raises(BrokerUnavailable, match=r"127\.0\.0\.1"):
            await client.publish("cno.task.run", {})


async def test_metadata_that_is_not_json_is_a_payload_error(tmp_path: Path, nats_server: NatsServer) -> None:
    async with staged(tmp_path, topology(nats_server.url, "cmeta"), HANDLER) as stage:
        with pytest.raises(PayloadError, match="JSON"):
            await stage.client.publish("cmeta.result.x", {}, metadata={"x": object()})
