"""Clients without this package join a running team: with plain client libraries, kcat and redis-cli.

Each publishes a task in the wire form of the contract's section 3 and reads what the agents answer. The streams and
topics are those that `apply` made.
"""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nats
import pytest
import redis
from confluent_kafka import Consumer, Producer
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from tests.conftest import missing
from tests.outside.team import StrictEvent, Team, task
from tests.patience import PATIENCE
from tests.servers.kafka import KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.redis import RedisServer


def eventually(ready: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not ready():
        assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}"
        time.sleep(0.2)


@contextmanager
def running(url: str, folder: Path) -> Iterator[Team]:
    team = Team(folder, url).start()
    yield team
    team.stop()
    team.command("destroy", "--yes", *LOSSES)


@pytest.fixture
def nats_team(nats_server: NatsServer, tmp_path: Path) -> Iterator[Team]:
    with running(nats_server.url, tmp_path) as team:
        yield team


@pytest.fixture
def redis_team(redis_server: RedisServer, tmp_path: Path) -> Iterator[Team]:
    with running(redis_server.url, tmp_path) as team:
        yield team


@pytest.fixture
def kafka_team(kafka_server: KafkaServer, tmp_path: Path) -> Iterator[Team]:
    with running(kafka_server.url, tmp_path) as team:
        yield team


LOSSES = [
    f"--allow-loss={name}" for name in ("AGENT_EVENTS", "TASK_EVENTS", "REVIEW_EVENTS", "content-pipeline-dead-letters")
]


async def test_a_nats_publisher_and_a_push_subscriber_join(nats_team: Team) -> None:
    nc = await nats.connect(nats_team.url)
    js = nc.jetstream()
    heard: asyncio.Queue[StrictEvent] = asyncio.Queue()

    async def listen(msg: nats.aio.msg.Msg) -> None:
        await heard.put(StrictEvent.model_validate_json(msg.data))
        await msg.ack()

    settings = ConsumerConfig(
        durable_name="outside_agent_completed",
        deliver_policy=DeliverPolicy.ALL,
        ack_policy=AckPolicy.EXPLICIT,
        max_deliver=3,
        ack_wait=30,
    )
    await js.subscribe("agent.completed", config=settings, cb=listen, manual_ack=True)
    event = task("nats")
    ack = await js.publish(
        event.event_type.value,
        event.model_dump_json().encode(),
        headers={"Nats-Msg-Id": event.event_id, "correlation-id": event.correlation_id},
    )
    assert ack.stream == "TASK_EVENTS"
    first, second = [await asyncio.wait_for(heard.get(), PATIENCE) for _ in range(2)]
    assert [first.source_agent, second.source_agent] == ["research", "writing"]
    assert {first.correlation_id, second.correlation_id} == {"outside-nats"}
    await nc.close()


async def test_a_bare_body_without_any_header_is_a_task(nats_team: Team) -> None:
    nc = await nats.connect(nats_team.url)
    await nc.publish("task.assigned", b'{"payload": {"query": "bare"}, "correlation_id": "bare-1"}')
    await nc.flush()
    await asyncio.to_thread(eventually, nats_team.has("review.completed", "bare-1"), "the review of a bare body")
    await nc.close()


def test_a_kafka_producer_and_a_consumer_group_join(kafka_team: Team) -> None:
    servers = kafka_team.url.removeprefix("kafka://")
    event = task("kafka")
    producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "acks": "all"})
    producer.produce(
        "TASK_EVENTS",
        key=event.correlation_id.encode(),
        value=event.model_dump_json().encode(),
        headers={
            "event-type": event.event_type.value,
            "source-agent": "outside",
            "correlation-id": event.correlation_id,
        },
    )
    assert producer.flush(PATIENCE) == 0
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": "outside-group",
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
        }
    )
    consumer.subscribe(["AGENT_EVENTS"])
    heard: list[StrictEvent] = []
    deadline = time.monotonic() + PATIENCE
    while len(heard) < 3:
        assert time.monotonic() < deadline, heard
        message = consumer.poll(1.0)
        if message is not None and not message.error():
            heard.append(StrictEvent.model_validate_json(message.value()))
            consumer.commit(message)
    consumer.close()
    assert [e.event_type.value for e in heard] == ["agent.started", "agent.completed", "agent.completed"]
    assert {e.correlation_id for e in heard} == {"outside-kafka"}


def test_kcat_produces_a_task_and_reads_the_answer(kafka_team: Team) -> None:
    if shutil.which("kcat") is None:
        missing("kcat")
    servers = kafka_team.url.removeprefix("kafka://")
    body = b'{"event_type": "task.assigned", "correlation_id": "kcat-1", "payload": {"query": "kcat"}}\n'
    subprocess.run(["kcat", "-P", "-b", servers, "-t", "TASK_EVENTS"], input=body, check=True, timeout=PATIENCE)
    eventually(kafka_team.has("review.completed", "kcat-1"), "the review of kcat's task")
    read = ["kcat", "-C", "-b", servers, "-t", "REVIEW_EVENTS", "-e", "-q"]
    answer = subprocess.run(read, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    assert '"correlation_id":"kcat-1"' in answer


def test_a_redis_producer_and_a_consumer_group_join(redis_team: Team) -> None:
    client = redis.from_url(redis_team.url, decode_responses=True)
    event = task("redis")
    client.xadd(
        "TASK_EVENTS",
        {
            "event_id": event.event_id,
            "event_type": event.event_type.value,
            "source_agent": event.source_agent,
            "correlation_id": event.correlation_id,
            "payload": event.model_dump_json(),
        },
        maxlen=100_000,
    )
    client.xgroup_create("AGENT_EVENTS", "outside", id="0", mkstream=True)
    heard: list[StrictEvent] = []
    deadline = time.monotonic() + PATIENCE
    while len(heard) < 3:
        assert time.monotonic() < deadline, heard
        for _, entries in client.xreadgroup("outside", "one", {"AGENT_EVENTS": ">"}, count=10, block=1000) or ():
            for entry_id, fields in entries:
                heard.append(StrictEvent.model_validate_json(fields["payload"]))
                client.xack("AGENT_EVENTS", "outside", entry_id)
    client.close()
    assert [e.event_type.value for e in heard] == ["agent.started", "agent.completed", "agent.completed"]
    assert {e.correlation_id for e in heard} == {"outside-redis"}


def test_redis_cli_adds_a_task(redis_team: Team) -> None:
    if shutil.which("redis-cli") is None:
        missing("redis-cli")
    body = '{"event_type": "task.assigned", "correlation_id": "cli-1", "payload": {"query": "by hand"}}'
    command = ["redis-cli", "-u", redis_team.url, "XADD", "TASK_EVENTS", "*", "payload", body]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    eventually(redis_team.has("review.completed", "cli-1"), "the review of redis-cli's task")
