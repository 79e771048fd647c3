"""Fixtures shared by every test: one real server of each kind for the session, started when first asked for.

A server that is not installed skips its tests loudly; where CI is set in the environment it fails them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from xdist.remote import Producer

from tests.scheduling import Scheduling
from tests.servers import kafka, nats, redis


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling:
    return Scheduling(config, log)


def missing(what: str) -> None:
    """Ends the test: this machine has no `what`."""
    message = f"{what} is not installed: its tests do not run"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def nats_server() -> Iterator[nats.NatsServer]:
    """Shared by tests that leave it running; a test that stops or freezes a server starts its own."""
    if nats.find_binary() is None:
        missing("nats-server")
    server = nats.NatsServer().start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[redis.RedisServer]:
    """Durable (appendfsync always). A test that stops or freezes a server for long starts its own."""
    if redis.find_binary() is None:
        missing("redis-server")
    server = redis.RedisServer().start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def kafka_server() -> Iterator[kafka.KafkaServer]:
    """Shared: a test that stops or freezes it lets it run again before it ends."""
    try:
        server = kafka.KafkaServer()
        server.start()
    except kafka.Unavailable as reason:
        missing(f"Kafka ({reason})")
    yield server
    server.stop()
