"""Redis: outside programs are plain redis-py; an event is a stream entry whose body is the field `payload`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis

from orchestrator.brokers.redis import scripts
from orchestrator.brokers.redis.consumer import RedisConsumer
from orchestrator.topology.model import Channel, Subscription, Topology

from .drivers import ServerDriver


class RedisDriver(ServerDriver):
    kind = "redis"
    lease_constants = ("orchestrator.brokers.redis.consumer:LEASE",)

    carried = ("orchestrator.brokers.redis.scripts:COMMIT",)

    def without(self, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> str:
        match mechanism:
            case "renewal":
                beat_on, beaten = RedisConsumer._beat_on, list[RedisConsumer]()

                async def all_but_the_first(consumer: RedisConsumer) -> None:
                    """Others still beat, and find that the first one does not."""
                    beaten.append(consumer)
                    if consumer is not beaten[0]:
                        await beat_on(consumer)

                monkeypatch.setattr(RedisConsumer, "_beat_on", all_but_the_first)
            case "guardian":
                monkeypatch.setattr(RedisConsumer, "keep_alive", lambda self: None)
            case "fencing":
                fence = "if why and not force then return why end"
                assert fence in scripts.COMMIT
                monkeypatch.setattr(scripts, "COMMIT", scripts.COMMIT.replace(fence, "why = nil"))
            case _:
                return "there is no watermark: each entry is acknowledged by itself"
        return ""

    def address(self, topology: str, channel: str) -> str:
        return f"{{{topology}}}:{channel}"

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Redis]:
        client: Any = Redis.from_url(self.url)
        try:
            yield client
        finally:
            await client.aclose()

    async def outside_publish(
        self, topology: Topology, channel: Channel, event_type: str, body: bytes, headers: Mapping[str, str]
    ) -> None:
        async with self._client() as client:
            await client.xadd(channel.address, {"payload": body, "event_type": event_type, **headers})

    async def outside_read(self, channel: Channel) -> list[bytes]:
        async with self._client() as client:
            return [fields[b"payload"] for _, fields in await client.xrange(channel.address)]

    async def outside_create(self, address: str) -> None:
        async with self._client() as client:
            await client.xadd(address, {"payload": b"theirs"})

    async def outside_exists(self, address: str) -> bool:
        async with self._client() as client:
            return bool(await client.exists(address))

    async def outside_delete(self, address: str) -> None:
        async with self._client() as client:
            await client.delete(address)

    async def outside_delete_subscription(self, channel: Channel, subscription: Subscription) -> None:
        async with self._client() as client:
            await client.xgroup_destroy(channel.address, subscription.group)


driver = RedisDriver
