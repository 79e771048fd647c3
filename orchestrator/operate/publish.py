"""Publishing and calling by hand: the commands `publish` and `request`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from orchestrator.brokers.connections import Connections
from orchestrator.client import Client
from orchestrator.errors import PayloadError
from orchestrator.event import AgentEvent
from orchestrator.operate.session import session
from orchestrator.topology.model import Topology, matches

_LARGEST = 2**26  # characters of a payload: more than any broker is set to take in one event


def read_payload(text: str) -> dict[str, Any]:
    """JSON, @FILE, or - for stdin. Raises PayloadError when it is not a JSON object."""
    where = "the payload"
    if text == "-":
        where, text = "stdin", sys.stdin.read(_LARGEST + 1)
    elif text.startswith("@"):
        where = text[1:]
        if not where:
            raise PayloadError("@ names no file", hint="give JSON, @FILE or -")
        try:
            with Path(where).open(encoding="utf-8") as file:
                text = file.read(_LARGEST + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise PayloadError(
                f"cannot read the payload from {where}: {reason}", hint="give JSON, @FILE or -"
            ) from None
    if len(text) > _LARGEST:
        raise PayloadError(f"{where} is too large", hint="store the data elsewhere and publish a reference to it")
    try:
        found = strict_json(text)
    except ValueError as error:
        raise PayloadError(
            f"{where} is not JSON: {error}", hint="""quote it for the shell: '{"query": "x"}'"""
        ) from None
    except RecursionError:
        raise PayloadError(f"{where} is nested too deep", hint="flatten it, or publish it as text") from None
    if not isinstance(found, dict):
        raise PayloadError(
            f"{where} is JSON, but {type(found).__name__} instead of an object", hint="""write '{"name": value, …}'"""
        )
    return found


def strict_json(text: str) -> Any:
    """JSON without what only Python takes for it, NaN and numbers too large for one: they would arrive as null.

    Raises ValueError, RecursionError.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that can be sent")
    return number


def readers(topology: Topology, event_type: str) -> list[str]:
    """The agents that would be handed an event of this type, were it not for target and filter."""
    channel = topology.channel_for(event_type).name
    return [
        agent.name
        for agent in topology.agents.values()
        for subscription in agent.subscriptions
        if subscription.channel == channel and any(matches(pattern, event_type) for pattern in subscription.events)
    ]


def foretell(topology: Topology, event_type: str, target: str | None) -> str:
    """What is probably not meant by publishing this: that no agent of the topology will handle it; "" when one will."""
    found = readers(topology, event_type)
    if not found:
        return f"no agent of {topology.name} subscribes to {event_type}: nobody is handed it"
    if target is not None and target not in found:
        return f"{target} does not read {event_type} in {topology.name}, and {', '.join(found)} will not handle it"
    return ""


async def publish(topology: Topology, event_type: str, payload: dict[str, Any], **options: Any) -> AgentEvent:
    """Publishes one event and returns it when it is confirmed; `options` are those of Client.publish.

    Raises RoutingError, PayloadError, PublishRejected, BrokerUnavailable, and ResourceMissing before `apply` has made
    the channel.
    """
    async with session(topology, name="publish") as connections, Client(topology) as client:
        await _made(topology, connections, event_type)
        return await client.publish(event_type, payload, **options)


async def request(topology: Topology, event_type: str, payload: dict[str, Any], **options: Any) -> AgentEvent:
    """Publishes one event and returns the reply; `options` are those of Client.request. Raises RequestTimeout when none
    comes in time, and as publish does."""
    async with session(topology, name="request") as connections, Client(topology) as client:
        await _made(topology, connections, event_type)
        return await client.request(event_type, payload, **options)


async def _made(topology: Topology, connections: Connections, event_type: str) -> None:
    """A worker's producer makes a lost channel again; a person's first command must not make one unasked."""
    channel = topology.channel_for(event_type)
    await (await connections.get(channel.broker)).count(channel)
