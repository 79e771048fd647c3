"""`client:`, the raw options of a client library: one that it does not take is named, in words, before it connects."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.brokers import registry
from orchestrator.brokers.redis.link import Link
from orchestrator.errors import OrchestratorError
from orchestrator.topology import load
from orchestrator.topology.model import Topology

#: Nothing listens there: an option that is only found out by connecting is found out too late.
URLS = {"nats": "nats://127.0.0.1:1", "redis": "redis://127.0.0.1:1", "kafka": "kafka://127.0.0.1:1"}

WRONG = [
    ("nats", {"foo": 1}, "foo"),
    ("nats", {"ping_interval": "often"}, "ping_interval"),
    ("nats", {"max_reconnect_attempts": "x"}, "max_reconnect_attempts"),
    ("nats", {"connect_timeout": True}, "connect_timeout"),
    ("nats", {"closed_cb": "agents:closed"}, "closed_cb"),
    ("nats", {"servers": [7]}, "servers"),
    ("nats", {"domain": 5}, "domain"),
    ("redis", {"foo": 1}, "foo"),
    ("redis", {"socket_timeout": "5s"}, "socket_timeout"),
    ("redis", {"health_check_interval": "x"}, "health_check_interval"),
    ("redis", {"retry": 3}, "retry"),
    ("redis", {"host": "elsewhere"}, "host"),
    ("kafka", {"foo": 1}, "foo"),
    ("kafka", {"socket.timeout.ms": "5s"}, "socket.timeout.ms"),
    ("kafka", {"fetch.wait.max.ms": [1]}, "fetch.wait.max.ms"),
    ("kafka", {"error_cb": "agents:error"}, "error_cb"),
    ("kafka", {"logger": "root"}, "logger"),
    ("kafka", {"acks": 1}, "acks"),
]


def topology(kind: str, url: str, client: dict[str, Any]) -> Topology:
    text = {
        "apiVersion": "orchestrator/v1",
        "kind": "Topology",
        "metadata": {"name": "options"},
        "brokers": {"main": {"url": url, "client": client}},
        "channels": {"tasks": {"events": ["task.*"]}},
    }
    return load(["-"], stdin=json.dumps(text)).topology


async def connect(kind: str, url: str, client: dict[str, Any]) -> None:
    made = topology(kind, url, client)
    connection = await registry.adapter(kind).connect(made, made.brokers["main"], name="test", patience=2.0)
    await connection.close()


@pytest.mark.parametrize(("kind", "client", "named"), WRONG, ids=[f"{kind}-{named}" for kind, _, named in WRONG])
async def test_an_option_that_the_library_does_not_take_is_named(kind: str, client: dict[str, Any], named: str) -> None:
    with pytest.raises(OrchestratorError) as caught:
        await connect(kind, URLS[kind], client)
    assert named in caught.value.message + (caught.value.hint or "")
    assert "client" in caught.value.message + (caught.value.hint or "")
    assert caught.value.hint


async def test_a_misspelt_option_is_told_the_near_one() -> None:
    with pytest.raises(OrchestratorError) as caught:
        await connect("nats", URLS["nats"], {"ping_intervall": 5})
    assert caught.value.hint == "did you mean `ping_interval`?"


@pytest.mark.parametrize(
    ("kind", "client"),
    [
        ("nats", {"ping_interval": 2, "connect_timeout": 2.5, "no_echo": True, "tls_hostname": None}),
        ("redis", {"socket_timeout": 4, "client_name": "mine", "socket_keepalive": True}),
        ("kafka", {"socket.timeout.ms": 9000, "client.id": "mine", "fetch.min.bytes": "1"}),
    ],
    ids=["nats", "redis", "kafka"],
)
async def test_what_it_takes_is_given_to_it(kind: str, client: dict[str, Any], request: pytest.FixtureRequest) -> None:
    await connect(kind, request.getfixturevalue(f"{kind}_server").url, client)


def test_a_constant_of_the_library_is_a_number_in_a_file() -> None:
    made = topology("redis", "rediss://127.0.0.1:1", {"ssl_min_version": 771, "ssl_cert_reqs": 0})
    Link(made.brokers["main"], "test")
    with pytest.raises(OrchestratorError, match="ssl_min_version"):
        Link(replace(made.brokers["main"], client={"ssl_min_version": "TLSv1.2"}), "test")
