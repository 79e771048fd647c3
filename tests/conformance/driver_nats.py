"""NATS: outside programs are plain nats-py."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import nats
import nats.js.errors
import pytest
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy

from orchestrator.brokers.nats.consumer import NatsConsumer
from orchestrator.topology.model import Channel, Subscription, Topology
from tests.patience import PATIENCE

from .drivers import ServerDriver


class NatsDriver(ServerDriver):
    kind = "nats"
    lease_constants = ("orchestrator.brokers.nats.resources:ACK_WAIT",)
    too_large = 1024 * 1024 + 1  # the server's max_payload

    def address(self, topology: str, channel: str) -> str:
        return f"{topology}-{channel}"

    def without(self, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> str:
        match mechanism:
            case "renewal":
                never_due = property(lambda self: math.inf, lambda self, when: None)
                monkeypatch.setattr(NatsConsumer, "_extended", never_due, raising=False)
            case "guardian":
                monkeypatch.setattr(NatsConsumer, "keep_alive", lambda self: None)
            case "fencing":
                return "a late ack cannot be refused here: ids carry the promise"
            case _:
                return "there is no watermark of ours: the server keeps each acknowledgement"
        return ""

    @asynccontextmanager
    async def _jetstream(self) -> AsyncIterator[JetStreamContext]:
        client = await nats.connect(self.url)
        try:
            yield client.jetstream()
        finally:
            await client.close()

    async def outside_publish(
        self, topology: Topology, channel: Channel, event_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        prefix = topology.brokers[channel.broker].prefix
        async with self._jetstream() as js:
            await js.publish(prefix + event_type, body, headers=dict(headers) or None)

    async def outside_read(self, channel: Channel) -> list[bytes]:
        async with self._jetstream() as js:
            count = (await js.stream_info(channel.address)).state.messages
            config = ConsumerConfig(deliver_policy=DeliverPolicy.ALL)
            reader = await js.pull_subscribe(f"*.{channel.events[0]}", stream=channel.address, config=config)
            return [message.data for message in await reader.fetch(count, timeout=PATIENCE)] if count else []

    async def outside_create(self, address: str) -> None:
        async with self._jetstream() as js:
            await js.add_stream(name=address, subjects=[f"outside.{address}"])

    async def outside_exists(self, address: str) -> bool:
        async with self._jetstream() as js:
            try:
                await js.stream_info(address)
            except nats.js.errors.NotFoundError:
                return False
            return True

    async def outside_delete(self, address: str) -> None:
        async with self._jetstream() as js:
            await js.delete_stream(address)

    async def outside_delete_subscription(self, channel: Channel, subscription: Subscription) -> None:
        async with self._jetstream() as js:
            await js.delete_consumer(channel.address, subscription.group)


driver = NatsDriver
