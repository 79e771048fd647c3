"""The package's entry: Adapter and Connection (brokers/base.py), and making again what was deleted from outside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from orchestrator.brokers import base
from orchestrator.brokers.base import (
    Capabilities,
    Desired,
    Observed,
    Setting,
    Verdict,
)
from orchestrator.brokers.embedded import server
from orchestrator.brokers.nats import resources
from orchestrator.brokers.nats.client import Json, Link
from orchestrator.brokers.nats.consumer import NatsConsumer
from orchestrator.brokers.nats.delivery import public_headers
from orchestrator.brokers.nats.opening import open_link
from orchestrator.brokers.nats.operate import Operations
from orchestrator.brokers.nats.producer import NatsProducer, Publisher
from orchestrator.brokers.nats.relay import Relay
from orchestrator.brokers.nats.resources import ACK_WAIT, letters_root, safe
from orchestrator.brokers.nats.streams import Resources
from orchestrator.errors import BrokerUnavailable, PublishRejected, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Mode, Subscription, Topology, matches

_log = logging.getLogger("orchestrator.brokers.nats")


class NatsConnection(Operations):
    """base.Connection on one link."""

    def __init__(self, link: Link, topology: Topology, broker: Broker, url: str) -> None:
        self.link = link
        self.topology = topology
        self.broker = broker
        self._url = url
        self.resources = Resources(link, topology, broker)
        self.publisher = Publisher(link, self._recreate)
        self.sinks: list[base.Sink] = []
        self._producer = NatsProducer(self)
        self.relay = Relay(self)
        self.wanted = {d.id.name: d for d in resources.desired(topology, broker)}

    def letters(self, channel: Channel) -> str:
        return letters_root(channel)

    # --- reconcile ---

    async def observe(self, desired: Sequence[Desired]) -> list[Observed]:
        return await self.resources.observe(desired)

    async def create(self, desired: Desired) -> None:
        await self.resources.create(desired)

    async def update(self, desired: Desired, observed: Observed) -> None:
        await self.resources.update(desired, observed)

    async def delete(self, observed: Observed) -> None:
        await self.resources.delete(observed)

    # --- events ---

    def producer(self) -> NatsProducer:
        return self._producer

    def consumer(self, subscription: Subscription, *, slot: str) -> NatsConsumer:
        return NatsConsumer(self, subscription, slot)

    async def replies(self, receive: Callable[[bytes, Mapping[str, str]], None]) -> str:
        subject = f"{self.link.inbox.rstrip('.')}-replies"

        def on_message(_subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
            receive(body, public_headers(header) if header else {})

        self.link.client.listen(subject, on_message)
        self.link.client.flush_frames()  # before the ping that flush() waits for
        await self.link.client.flush(timeout=5)
        return subject

    def takes(self, subject: str) -> bool:
        """Whether a message on `subject` would be an event of a channel or an order to the server. Whoever asks names
        the address of the reply, and may be less trusted than we are."""
        if subject.startswith("$"):
            return True
        ours = [channel for channel in self.topology.channels.values() if channel.broker == self.broker.name]
        patterns = [self.broker.prefix + pattern for channel in ours for pattern in channel.events]
        patterns += [f"{letters_root(channel)}.>" for channel in ours]
        return any(matches(pattern, subject) for pattern in patterns)

    async def extend(self, replies: Sequence[str]) -> None:
        """Extends leases over a connection of its own; called in another thread's loop."""
        link = await open_link(self.broker, self._url, name="keep-alive", patience=5.0, root=self.topology.root)
        for reply in replies:
            link.client.send(f"PUB {reply} 4\r\n+WPI\r\n".encode())
        await link.close()

    # --- healing ---

    async def heal(self, subscription: Subscription, floor: int) -> list[str]:
        """Makes again what `subscription` needs and is gone; returns what that was. Raises BrokerError."""
        channel = self.topology.channels[subscription.channel]
        stream, durable = self.stream(channel), safe(subscription.group)
        healed: list[str] = []
        for name in (stream, self.resources.names.state, self.resources.names.inbox):
            if await self._missing(f"STREAM.INFO.{name}"):
                await self._make(name)
                healed.append(f"stream {name}")
        await self.resources.create_redrive(self.resources.names.redrive_durable(subscription, channel))
        if await self._missing(f"CONSUMER.INFO.{stream}.{durable}"):
            wanted = self.wanted.get(f"{stream}/{durable}")
            if wanted is None:
                raise ResourceMissing(f"consumer {stream}/{durable} is gone", hint="run `orchestrator apply`")
            log = channel.mode is Mode.LOG and f"stream {stream}" not in healed
            await self.resources.heal_consumer(wanted, floor if log else 0)
            healed.append(f"consumer {stream}/{durable}")
        return healed

    async def heal_later(self) -> bool:
        """Makes the internal stream of delayed events again; whether it was gone."""
        names = self.resources.names
        if gone := await self._missing(f"STREAM.INFO.{names.later}"):
            await self._make(names.later)
        else:
            await self.resources.create_relay()
        return gone

    async def _missing(self, verb: str) -> bool:
        try:
            await self.link.api(verb)
        except ResourceMissing:
            return True
        return False

    async def _make(self, stream: str) -> None:
        wanted = self.wanted.get(stream)
        if wanted is None:
            raise ResourceMissing(f"stream {stream} does not exist", hint="run `orchestrator apply`")
        if wanted.external:
            raise ResourceMissing(
                f"the external stream {stream} does not exist or was deleted", hint="create it where it is kept"
            )
        await self.resources.create(wanted)

    async def _recreate(self, stream: str, channel: Channel | None) -> None:
        """A publish found nobody listening. Returns when the stream is there (again)."""
        try:
            config: Json = (await self.link.api(f"STREAM.INFO.{stream}"))["config"]
        except ResourceMissing:
            await self._make(stream)
            self.alarm(f"stream {stream} was deleted from outside and has been created again; what it held is lost")
            return
        subjects = config.get("subjects") or []
        events = [self.broker.prefix + e for e in channel.events] if channel is not None else []
        if any(not any(s == e or matches(s, e.replace("*", "x").replace(">", "x")) for s in subjects) for e in events):
            raise PublishRejected(
                f"stream {stream} takes {', '.join(subjects) or 'nothing'}, not {', '.join(events)}",
                hint="run `orchestrator plan`, or correct `events:` of the external channel",
            )
        raise BrokerUnavailable(f"stream {stream} does not answer yet")

    def alarm(self, message: str) -> None:
        _log.warning(message)
        for sink in self.sinks:
            sink.alarm(message)

    async def close(self) -> None:
        await self.relay.close()
        await self.publisher.close()
        await self.link.close()


class NatsAdapter:
    """base.Adapter."""

    capabilities = Capabilities(
        kind="nats",
        lease=ACK_WAIT,
        atomic_settle=False,
        notes=("outputs are confirmed before their event is settled: a crash in between sends them again, same ids",),
    )

    def desired(self, topology: Topology, broker: Broker) -> list[Desired]:
        return resources.desired(topology, broker)

    def judge(self, kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
        return resources.judge(kind, setting, old, new, observed)

    async def connect(self, topology: Topology, broker: Broker, *, name: str, patience: float = 5.0) -> NatsConnection:
        url = server.running_url(topology.state_dir) if broker.embedded else broker.url
        link = await open_link(broker, url, name=name, patience=patience, root=topology.root)
        return NatsConnection(link, topology, broker, url)


adapter: base.Adapter = NatsAdapter()
