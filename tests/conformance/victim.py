"""A consumer in a process of its own: reports what it is handed as JSON lines, and obeys lines on stdin.

Run by victims.ProcessVictim with the path of a pickled specification.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.brokers import registry
from orchestrator.brokers.base import Delivery, Ended, History, Outgoing


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


class Sink:
    def __init__(self) -> None:
        self.held: dict[str, Delivery] = {}

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.held[delivery.position] = delivery
            say(type="delivery", position=delivery.position, token=delivery.token.hex(), body=delivery.body.hex())

    def revoked(self, deliveries: Sequence[Delivery]) -> None:
        """What we hold is kept: a zombie does not know better."""

    def trouble(self, reason: str | None) -> None:
        print(f"victim: trouble: {reason}", file=sys.stderr, flush=True)

    def alarm(self, message: str) -> None:
        print(f"victim: alarm: {message}", file=sys.stderr, flush=True)

    def on_crash(self, history: History, ended: Ended) -> History:
        raise AssertionError("nobody died before the victim")


async def main() -> None:
    spec = pickle.loads(Path(sys.argv[1]).read_bytes())
    for module, name, lease in spec["leases"]:
        setattr(importlib.import_module(module), name, lease)
    topology = spec["topology"]
    broker = topology.brokers["main"]
    connection = await registry.adapter(broker.kind).connect(topology, broker, name="victim")
    sink = Sink()
    consumer = connection.consumer(topology.agents[spec["agent"]].subscriptions[0], slot=spec["slot"])
    await consumer.open(sink)
    consumer.demand(spec["free"])
    say(type="ready")

    def done(error: BaseException | None) -> None:
        say(type="done", error="" if error is None else f"{type(error).__name__}: {error}")

    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        delivery = sink.held[order["position"]]
        if order["do"] == "mark":
            consumer.mark(delivery, History.decode(order["history"].encode()), done)
        else:
            identity = f"done:{delivery.position}"
            output = Outgoing(topology.channels["events"], b"{}", "agent.done", identity, "victim", identity, identity)
            consumer.settle(delivery, [output], done)


if __name__ == "__main__":
    asyncio.run(main())
