"""A server of its own for a run that kills or measures it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.servers.kafka import KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.redis import RedisServer

Server = NatsServer | KafkaServer | RedisServer


@contextmanager
def fresh_server(kind: str, *, fast: bool = False) -> Iterator[Server]:
    """A started server of `kind`. `fast`, to be measured: Kafka is optimised, and Redis syncs its file each second, as
    its default is, not at each write."""
    server: Server
    match kind:
        case "nats":
            server = NatsServer()
        case "kafka":
            server = KafkaServer(fast=fast)
        case "redis":
            server = RedisServer("--appendonly", "yes", durable=False) if fast else RedisServer()
        case _:
            raise ValueError(kind)
    server.start()
    try:
        yield server
    finally:
        server.stop() if isinstance(server, KafkaServer) else server.close()
