"""Kafka: outside programs are plain confluent-kafka, called from a thread."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from orchestrator.brokers.kafka import ledger
from orchestrator.topology.model import Channel, Subscription, Topology
from tests.patience import PATIENCE

from .drivers import ServerDriver


class KafkaDriver(ServerDriver):
    kind = "kafka"
    lease_constants = ("orchestrator.brokers.kafka.consumer:LEASE",)
    short_lease = 4.0
    too_large = 1_048_588 + 1  # the broker's message.max.bytes
    exclusive = "a partition belongs to one replica: what it could read no other gets"
    long_lease = 18.0  # long for this test; the broker keeps the dead so long, and deleting waits for them
    undeletable = "a group that is being read cannot be deleted on Kafka"

    @property
    def bootstrap(self) -> str:
        return self.url.removeprefix("kafka://")

    def address(self, topology: str, channel: str) -> str:
        return f"{topology}-{channel}"

    def without(self, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> str:
        match mechanism:
            case "renewal" | "guardian":
                return "the client's own thread keeps the partitions"
            case "fencing":
                return "the broker itself refuses a member of an old generation"
            case _:
                monkeypatch.setattr(ledger, "_unpack", lambda metadata: {})
        return ""

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap})

    async def outside_publish(
        self, topology: Topology, channel: Channel, event_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        def work() -> None:
            producer = Producer({"bootstrap.servers": self.bootstrap, "message.max.bytes": 4 << 20})
            producer.produce(channel.address, body, headers=[(k, v.encode()) for k, v in headers.items()])
            assert producer.flush(PATIENCE) == 0

        await asyncio.to_thread(work)

    async def outside_read(self, channel: Channel) -> list[bytes]:
        def work() -> list[bytes]:
            reader = Consumer({"bootstrap.servers": self.bootstrap, "group.id": uuid.uuid4().hex})
            try:
                topic = reader.list_topics(channel.address, timeout=PATIENCE).topics[channel.address]
                places = [TopicPartition(channel.address, number, 0) for number in topic.partitions]
                left = sum(reader.get_watermark_offsets(place, timeout=PATIENCE)[1] for place in places)
                reader.assign(places)
                found: list[bytes] = []
                deadline = time.monotonic() + PATIENCE
                while len(found) < left and time.monotonic() < deadline:
                    message = reader.poll(0.2)
                    if message is not None and message.error() is None:
                        found.append(message.value())
                return found
            finally:
                reader.close()

        return await asyncio.to_thread(work)

    async def outside_create(self, address: str) -> None:
        admin = self._admin()  # it has to outlive the futures
        await self._wait(admin.create_topics([NewTopic(address, 1, 1)]))

    async def outside_exists(self, address: str) -> bool:
        return await asyncio.to_thread(lambda: address in self._admin().list_topics(timeout=PATIENCE).topics)

    async def outside_delete(self, address: str) -> None:
        admin = self._admin()  # it has to outlive the futures
        await self._wait(admin.delete_topics([address]))

    async def outside_delete_subscription(self, channel: Channel, subscription: Subscription) -> None:
        admin = self._admin()  # it has to outlive the futures
        await self._wait(admin.delete_consumer_groups([subscription.group]))

    @staticmethod
    async def _wait(futures: Mapping[str, Any]) -> None:
        for future in futures.values():
            await asyncio.wrap_future(future)


driver = KafkaDriver
