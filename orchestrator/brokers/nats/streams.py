"""Streams and consumers on the server: what is there; creating, changing and deleting it; making it again when somebody
else deleted it.

Walk `apply`, third step. It speaks raw JSON, so that fields which this code does not know survive an update. Ownership
is a label in the metadata.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, cast

from orchestrator.brokers.base import Desired, Observed, ResourceId, Setting, Sink
from orchestrator.brokers.nats import resources
from orchestrator.brokers.nats.client import ApiError, Json, Link
from orchestrator.brokers.nats.resources import Names, filters_of, safe
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected, RefusedError, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Mode, Subscription, Topology, digest, matches
from orchestrator.topology.routing import Index

_OWNER, _KIND, _PROTECT = "orchestrator.topology", "orchestrator.kind", "orchestrator.protect"
_NS = 1_000_000_000
_NUMBERS = re.compile(r"\d+")
_TIMES = frozenset({"max_age", "duplicate_window", "ack_wait"})
_REFUSED = frozenset({10052, 10012})  # this setting cannot be changed
_THERE = frozenset({10148, 10013, 10105})  # somebody else was faster
_HINTS = {
    10065: "another stream already takes one of these subjects: use brokers.<name>.prefix or other event types",
    10099: "a queue lets one agent read each event type: another consumer is there",
    10100: "a queue lets one agent read each event type: another consumer's filter overlaps",
    10047: "the server's or account's storage limit is reached",
    10074: "`replication` needs as many servers in the cluster",
}
_log = logging.getLogger("orchestrator.brokers.nats")


class Streams:
    """The part of base.Connection that reconciles and heals."""

    def __init__(self, link: Link, topology: Topology, broker: Broker) -> None:
        self.link = link
        self.topology = topology
        self.broker = broker
        self.names = Names(topology, broker)
        self.sinks: list[Sink] = []  # of the consumers that are open
        self._refusal = ""

    @cached_property
    def wanted(self) -> dict[str, Desired]:
        """What the topology asks for, by name. For healing: most workers never look."""
        return {d.id.name: d for d in resources.desired(self.topology, self.broker)}

    @property
    def schedules(self) -> bool:
        """Whether the server can hold a message until its time (2.12)."""
        numbers = _NUMBERS.findall(str(self.link.client.server_info.get("version", "")))[:2]
        return [int(n) for n in numbers] >= [2, 12]

    def place(self, subscription: Subscription) -> tuple[str, str]:
        """(stream, durable)"""
        return safe(self.topology.channels[subscription.channel].address), safe(subscription.group)

    # --- looking ----------------------------------------------------------------------------------------------

    async def observe(self, desired: Sequence[Desired]) -> list[Observed]:
        wanted = {d.id: d for d in desired}
        internal = {self.names.state, self.names.inbox, self.names.later}
        taking: Index[ResourceId] = Index()
        for each in desired:
            for subject in cast(tuple[str, ...], each.settings.get("subjects", ())):
                taking.add(subject, each.id)
        subscribed = {d.id.name.partition("/")[0] for d in desired if d.id.kind == "subscription"}
        found: list[Observed] = []
        ask: list[str] = []
        for info in await self.link.api_pages("STREAM.LIST", "streams"):
            config, name = info["config"], info["config"]["name"]
            inside = name in internal or (config.get("metadata") or {}).get(_KIND) == "internal"
            resource = ResourceId(self.broker.name, "internal" if inside else "channel", name)
            ours = _owner(config) == self.topology.name
            blocks: list[ResourceId] = []
            if resource not in wanted:
                overlapping = (taking.overlapping(subject) for subject in config.get("subjects") or ())
                blocks = list(dict.fromkeys(taker for several in overlapping for _, taker in several))
            if resource in wanted or ours or blocks:
                found.append(self._stream(resource, info, wanted.get(resource), blocks))
            if (ours or name in subscribed) and name not in internal and info["state"].get("consumer_count"):
                ask.append(name)
        gate = asyncio.Semaphore(32)

        async def consumers(stream: str) -> list[Json]:
            async with gate:
                return await self.link.api_pages(f"CONSUMER.LIST.{stream}", "consumers")

        for stream, infos in zip(ask, await asyncio.gather(*map(consumers, ask)), strict=True):
            for info in infos:
                resource = ResourceId(self.broker.name, "subscription", f"{stream}/{info['name']}")
                if resource in wanted or _owner(info["config"]) == self.topology.name:
                    found.append(_consumer(resource, info, wanted.get(resource)))
        return found

    def _stream(self, resource: ResourceId, info: Json, wanted: Desired | None, blocks: list[ResourceId]) -> Observed:
        config, state = info["config"], info["state"]
        settings = {k: _read(k, config.get(k)) for k in wanted.settings} if wanted else {}
        if not self.schedules and "allow_msg_schedules" in settings:
            settings["allow_msg_schedules"] = True  # an older server has no such thing: nothing to change
        return Observed(
            id=resource,
            settings=settings,
            owner=_owner(config),
            version=_version(info),
            events=int(state["messages"]),
            bytes=int(state["bytes"]),
            protect=(config.get("metadata") or {}).get(_PROTECT) == "true",
            blocks=tuple(blocks),
        )

    async def config(self, stream: str, durable: str = "") -> Json | None:
        """As the server has it, of a stream or of its consumer `durable`; None when there is none."""
        try:
            return dict((await self.link.api(_info(stream, durable)))["config"])
        except ResourceMissing:
            return None

    # --- changing ---------------------------------------------------------------------------------------------

    async def create(self, desired: Desired, *, start: Json | None = None) -> None:
        """`start`: where a consumer begins, if not where its settings say."""
        stream, _, durable = desired.id.name.partition("/")
        if desired.external:
            raise RefusedError(
                f"stream {stream} is external and does not exist", hint="create it, or drop `external: true`"
            )
        if (there := await self.config(stream, durable)) is not None:
            self._must_own(there, desired.id)
        elif durable:
            more = {**(start or {}), "metadata": self._labels(desired)}
            await self._create_consumer(stream, durable, desired.settings, more)
        else:
            config = {"name": stream, **self._stream_config(desired), "metadata": self._labels(desired)}
            await self._change(desired.id, f"STREAM.CREATE.{stream}", config)
            if stream == self.names.later:
                await self.create_relay()

    async def create_reader(self, stream: str, durable: str, subject: str) -> None:
        """A consumer of an internal stream. That of a subscription's redriven events is made when the first one comes,
        since a stream takes no more than a thousand."""
        settings: dict[str, Setting] = {"filter_subjects": (subject,), "ack_wait": resources.ACK_WAIT}
        await self._create_consumer(stream, durable, settings, {})

    async def create_relay(self) -> None:
        """The consumer of the delayed events, one for all workers."""
        await self.create_reader(self.names.later, self.names.relay, f"{self.names.later_root}due")

    async def _create_consumer(self, stream: str, durable: str, settings: Mapping[str, Setting], more: Json) -> None:
        config = {**_consumer_config(durable, settings), **more}
        body = {"stream_name": stream, "config": config, "action": "create"}
        await self._change(f"consumer {stream}/{durable}", f"CONSUMER.CREATE.{stream}.{durable}", body, fine=_THERE)

    async def update(self, desired: Desired, observed: Observed) -> None:
        if desired.external:
            raise RefusedError(f"{desired.id} is external", hint="it is never changed from here")
        stream, _, durable = desired.id.name.partition("/")
        config = await self.config(stream, durable)
        if config is None:
            raise ResourceMissing(f"{desired.id} is gone", hint="plan again")
        self._must_own(config, desired.id)
        metadata = {**(config.get("metadata") or {}), **self._labels(desired)}
        if not desired.protect:
            metadata.pop(_PROTECT, None)
        if not durable:
            config = {**config, **self._stream_config(desired), "metadata": metadata}
            await self._change(desired.id, f"STREAM.UPDATE.{stream}", config)
            return
        before = set(filters_of(config))
        config.pop("filter_subject", None)
        settings = {k: v for k, v in desired.settings.items() if k != "deliver_policy"}
        config = {**config, **_consumer_config(durable, settings), "metadata": metadata}
        body = {"stream_name": stream, "config": config, "action": "update"}
        await self._change(desired.id, f"CONSUMER.CREATE.{stream}.{durable}", body)
        # in a queue, events of a newly read type may lie below the consumer's position: start it over. What is settled
        # is gone from a queue, so only what is in flight is seen twice
        queue = ((await self.config(stream)) or {}).get("retention") == "workqueue"
        if queue and not set(config["filter_subjects"]) <= before:
            await self.link.api(f"CONSUMER.RESET.{stream}.{durable}", {"seq": 1})

    async def delete(self, observed: Observed) -> None:
        stream, _, durable = observed.id.name.partition("/")
        verb = _info(stream, durable)
        try:
            info = await self.link.api(verb)
        except ResourceMissing:
            return
        self._must_own(info["config"], observed.id, hint="delete it by hand")
        if observed.version and _version(info) != observed.version:
            raise RefusedError(f"{observed.id} was changed since the plan was made", hint="plan again")
        doing: list[tuple[str, Json | None]] = [(verb.replace(".INFO.", ".DELETE."), None)]
        if durable:
            names, (subject, redriven) = self.names, self.names.redriven(stream, durable)
            doing.append((f"STREAM.PURGE.{names.state}", {"filter": names.histories(stream, durable) + "*"}))
            doing.append((f"STREAM.PURGE.{names.inbox}", {"filter": subject}))
            doing.append((f"CONSUMER.DELETE.{names.inbox}.{redriven}", None))
        for verb, body in doing:
            with contextlib.suppress(ResourceMissing):  # gone is what was asked for
                await self.link.api(verb, body)

    async def _change(self, what: object, verb: str, body: Json, fine: Collection[int] = ()) -> None:
        try:
            await self.link.api(verb, body)
        except ApiError as error:
            if error.code in _REFUSED:
                raise RefusedError(
                    f"{what}: {error.message}", hint="delete and recreate it, or undo the change"
                ) from None
            if error.code not in fine:
                raise BrokerError(f"{what}: {error.message}", hint=_HINTS.get(error.code)) from None

    def _stream_config(self, desired: Desired) -> Json:
        config = _write_all(desired.settings)
        if not self.schedules:
            config.pop("allow_msg_schedules", None)  # an older server does not know it
        return config

    def _labels(self, desired: Desired) -> dict[str, str]:
        labels = {_OWNER: self.topology.name, _KIND: desired.id.kind}
        return {**labels, _PROTECT: "true"} if desired.protect else labels

    def _must_own(self, config: Json, what: ResourceId, hint: str = "") -> None:
        if (owner := _owner(config)) != self.topology.name:
            whose = f"belongs to topology {owner}" if owner else "was not made by this tool"
            other = "use another `group:`" if "/" in what.name else "use another `address:`, or `external: true`"
            raise RefusedError(f"{what} exists and {whose}", hint=hint or other)

    # --- healing ----------------------------------------------------------------------------------------------

    async def heal(self, subscription: Subscription, floor: int, born: str) -> list[str]:
        """Makes again what `subscription` needs and is gone; returns what that was. `floor` is its position in the
        stream that was created at `born`. Raises BrokerError."""
        names = self.names
        stream, durable = self.place(subscription)
        healed: list[str] = []
        for name in (stream, names.state, names.inbox, names.later):
            if await self.config(name) is None:
                await self._make(name)
                healed.append(f"stream {name}")
        subject, redriven = names.redriven(stream, durable)
        await self.create_reader(names.inbox, redriven, subject)
        await self.create_relay()
        if await self.config(stream, durable) is None:
            wanted = self.wanted[f"{stream}/{durable}"]
            # wherever it once began: what came before that is below the floor, and what came since must not be skipped;
            # nor anything of a stream that we or a publisher have just made again
            same = (await self.link.api(f"STREAM.INFO.{stream}"))["created"] == born
            start = {"deliver_policy": "by_start_sequence", "opt_start_seq": floor + 1 if same else 1}
            log = self.topology.channels[subscription.channel].mode is Mode.LOG
            await self.create(wanted, start=start if log else None)
            healed.append(f"consumer {stream}/{durable}")
        return healed

    async def _make(self, stream: str) -> None:
        wanted = self.wanted.get(stream)
        if wanted is None:
            raise ResourceMissing(f"stream {stream} does not exist", hint="run `orchestrator apply`")
        if wanted.external:
            raise ResourceMissing(
                f"the external stream {stream} does not exist or was deleted", hint="create it where it is kept"
            )
        await self.create(wanted)

    async def recreate(self, stream: str, channel: Channel | None) -> None:
        """A publish found nobody listening. Returns when the stream is there (again)."""
        config = await self.config(stream)
        if config is None:
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

    def refused(self, channel: str, error: BaseException) -> None:
        """Delayed events wait where they are; people hear of it once for each reason."""
        if str(error) != self._refusal:
            self._refusal = str(error)
            self.alarm(f"delayed events for channel {channel!r} wait: {error}")

    def alarm(self, message: str) -> None:
        _log.warning(message)
        for sink in self.sinks:
            sink.alarm(message)


def _consumer(resource: ResourceId, info: Json, wanted: Desired | None) -> Observed:
    config = info["config"]
    policy = config.get("deliver_policy", "all")
    settings: dict[str, Setting] = {
        "filter_subjects": tuple(sorted(filters_of(config))),
        # the start counts at creation only, and healing or seeking may have moved it: never a difference
        "deliver_policy": wanted.settings.get("deliver_policy", policy) if wanted else policy,
        "ack_wait": _read("ack_wait", config.get("ack_wait")),
        "max_deliver": config.get("max_deliver", -1),
        "max_ack_pending": config.get("max_ack_pending", 1000),
    }
    events = int(info.get("num_pending", 0)) + int(info.get("num_ack_pending", 0))
    return Observed(id=resource, settings=settings, owner=_owner(config), version=_version(info), events=events)


def _owner(config: Json) -> str | None:
    owner = (config.get("metadata") or {}).get(_OWNER)
    return str(owner) if owner is not None else None


def _info(stream: str, durable: str) -> str:
    return f"CONSUMER.INFO.{stream}.{durable}" if durable else f"STREAM.INFO.{stream}"


def _version(info: Json) -> str:
    """`_nats.*` metadata is the server's own and changes with its version."""
    config = info["config"]
    metadata = {k: v for k, v in (config.get("metadata") or {}).items() if not k.startswith("_nats.")}
    return f"{info.get('created', '')}/{digest({**config, 'metadata': metadata})}"


def _read(name: str, value: Any) -> Setting:
    if name in _TIMES:
        return (value or 0) / _NS
    if name == "subjects":
        return tuple(sorted(value or ()))
    if value is None:
        return False if name.startswith("allow_") else -1 if name.startswith("max_") else None
    return value  # type: ignore[no-any-return]


def _write_all(settings: Mapping[str, Setting]) -> Json:
    def write(name: str, value: Any) -> Any:
        if name in _TIMES:
            return round(value * _NS)
        return list(value) if isinstance(value, tuple) else value

    return {name: write(name, value) for name, value in settings.items()}


def _consumer_config(durable: str, settings: Mapping[str, Setting]) -> Json:
    config: Json = {"durable_name": durable, "name": durable, "ack_policy": "explicit", "replay_policy": "instant"}
    config.update({"max_deliver": -1, "max_ack_pending": -1, **_write_all(settings)})
    policy = config.get("deliver_policy")
    if policy not in (None, "all", "new"):
        at = datetime.fromisoformat(policy).astimezone(UTC)
        config.update(deliver_policy="by_start_time", opt_start_time=at.isoformat().replace("+00:00", "Z"))
    return config
