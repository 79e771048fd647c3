"""Streams and consumers on the server: what is there, and creating, changing and deleting it.

Walk `apply`, third step. It speaks raw JSON, so that fields which this code does not know survive an update. Ownership
is a label in the metadata.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from orchestrator.brokers.base import Desired, Observed, ResourceId, Setting
from orchestrator.brokers.nats import resources
from orchestrator.brokers.nats.client import ApiError, Json, Link
from orchestrator.brokers.nats.resources import Names, filters_of
from orchestrator.errors import BrokerError, OrchestratorError, RefusedError, ResourceMissing
from orchestrator.topology.model import Broker, Topology, digest
from orchestrator.topology.routing import Index

_OWNER, _KIND, _PROTECT = "orchestrator.topology", "orchestrator.kind", "orchestrator.protect"
_NS = 1_000_000_000
_TIMES = frozenset({"max_age", "duplicate_window", "ack_wait"})


class Resources:
    """base.Connection's reconcile part."""

    def __init__(self, link: Link, topology: Topology, broker: Broker) -> None:
        self._link = link
        self._api = link.api
        self._topology = topology
        self._broker = broker
        self.names = Names(topology, broker)

    @property
    def schedules(self) -> bool:
        """Whether the server can hold a message until its time (2.12)."""
        numbers = re.findall(r"\d+", str(self._link.info.get("version", "")))[:2]
        return [int(n) for n in numbers] >= [2, 12]

    async def observe(self, wanted: Sequence[Desired]) -> list[Observed]:
        by_id = {d.id: d for d in wanted}
        internal = {self.names.state, self.names.inbox, self.names.later}
        streams = await self._link.api_pages("STREAM.LIST", "streams")
        taking: Index[ResourceId] = Index()
        for each in wanted:
            for subject in _subjects(each.settings):
                taking.add(subject, each.id)
        subscribed = {d.id.name.partition("/")[0] for d in wanted if d.id.kind == "subscription"}
        found: list[Observed] = []
        ask: list[str] = []
        for info in streams:
            name = info["config"]["name"]
            labels = info["config"].get("metadata") or {}
            kind = labels.get(_KIND) or ("internal" if name in internal else "channel")
            resource = ResourceId(self._broker.name, "internal" if kind == "internal" else "channel", name)
            owner = _owner(info["config"])
            blocks: list[ResourceId] = []
            if resource not in by_id:
                overlapping = (taking.overlapping(subject) for subject in info["config"].get("subjects") or ())
                blocks = list(dict.fromkeys(taker for several in overlapping for _, taker in several))
            if resource in by_id or owner == self._topology.name or blocks:
                found.append(replace(self._stream(resource, info, by_id.get(resource)), blocks=tuple(blocks)))
            read = owner == self._topology.name or name in subscribed
            if read and name not in internal and info["state"].get("consumer_count"):
                ask.append(name)
        gate = asyncio.Semaphore(32)

        async def consumers(stream: str) -> list[Json]:
            async with gate:
                return await self._link.api_pages(f"CONSUMER.LIST.{stream}", "consumers")

        for stream, infos in zip(ask, await asyncio.gather(*map(consumers, ask)), strict=True):
            for info in infos:
                resource = ResourceId(self._broker.name, "subscription", f"{stream}/{info['name']}")
                if resource in by_id or _owner(info["config"]) == self._topology.name:
                    found.append(self._consumer(resource, info, by_id.get(resource)))
        return found

    def _stream(self, resource: ResourceId, info: Json, wanted: Desired | None) -> Observed:
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
        )

    def _consumer(self, resource: ResourceId, info: Json, wanted: Desired | None) -> Observed:
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
        return Observed(
            id=resource,
            settings=settings,
            owner=_owner(config),
            version=_version(info),
            events=int(info.get("num_pending", 0)) + int(info.get("num_ack_pending", 0)),
        )

    async def create(self, wanted: Desired, *, start: Json | None = None) -> None:
        """`start`: where a consumer begins, if not where its settings say."""
        if wanted.external:
            raise RefusedError(
                f"stream {wanted.id.name} is external and does not exist", hint="create it, or drop `external: true`"
            )
        stream, _, durable = wanted.id.name.partition("/")
        if (there := await self.config(stream, durable)) is not None:
            way_out = "use another `group:`" if durable else "use another `address:`, or mark it `external: true`"
            self._must_own(there, wanted.id, way_out)
        elif durable:
            more = {**(start or {}), "metadata": self._labels(wanted)}
            await self._create_consumer(stream, durable, wanted.settings, more)
        else:
            config = {"name": stream, **_write_all(wanted.settings), "metadata": self._labels(wanted)}
            await self._change(wanted.id, f"STREAM.CREATE.{stream}", self._known(config))
            if stream == self.names.later:
                await self.create_reader(stream, self.names.relay, f"{self.names.later_root}due")

    async def create_reader(self, stream: str, durable: str, subject: str) -> None:
        """A consumer of an internal stream: of the delayed events (one for all workers), or of one subscription's
        redriven events (made when the first one comes, since a stream takes no more than a thousand)."""
        await self._create_consumer(
            stream, durable, {"filter_subjects": (subject,), "ack_wait": resources.ACK_WAIT}, {}
        )

    async def _create_consumer(self, stream: str, durable: str, settings: Mapping[str, Setting], more: Json) -> None:
        config = {**_consumer_config(durable, settings), **more}
        body = {"stream_name": stream, "config": config, "action": "create"}
        try:
            await self._api(f"CONSUMER.CREATE.{stream}.{durable}", body)
        except ApiError as error:
            if error.code not in (10148, 10013, 10105):  # somebody else was faster: it is there
                raise _explained(error, f"consumer {stream}/{durable}") from None

    async def update(self, wanted: Desired) -> None:
        if wanted.external:
            raise RefusedError(f"{wanted.id} is external", hint="it is never changed from here")
        stream, _, durable = wanted.id.name.partition("/")
        config = await self.config(stream, durable)
        if config is None:
            raise ResourceMissing(f"{wanted.id} is gone", hint="plan again")
        self._must_own(config, wanted.id, "use another `group:`" if durable else "mark the channel `external: true`")
        metadata = {**(config.get("metadata") or {}), **self._labels(wanted)}
        if not wanted.protect:
            metadata.pop(_PROTECT, None)
        if not durable:
            config = {**config, **_write_all(wanted.settings), "metadata": metadata}
            await self._change(wanted.id, f"STREAM.UPDATE.{stream}", self._known(config))
            return
        before = set(config.pop("filter_subjects", None) or [config.pop("filter_subject", "")])
        settings = {k: v for k, v in wanted.settings.items() if k != "deliver_policy"}
        config = {**config, **_consumer_config(durable, settings), "metadata": metadata}
        body = {"stream_name": stream, "config": config, "action": "update"}
        await self._change(wanted.id, f"CONSUMER.CREATE.{stream}.{durable}", body)
        await self._unstrand(stream, durable, before, set(config["filter_subjects"]))

    async def _change(self, resource: ResourceId, verb: str, body: Json) -> None:
        try:
            await self._api(verb, body)
        except ApiError as error:
            raise _explained(error, str(resource)) from None

    def _known(self, config: Json) -> Json:
        """Without what an older server does not know."""
        if not self.schedules:
            config.pop("allow_msg_schedules", None)
        return config

    async def _unstrand(self, stream: str, durable: str, before: set[str], after: set[str]) -> None:
        """In a queue, events of a newly read type may lie below the consumer's position: start it over. What is
        settled is gone from a queue, so only what is in flight is seen twice."""
        config = await self.config(stream)
        if config is not None and config.get("retention") == "workqueue" and not after <= before:
            await self._api(f"CONSUMER.RESET.{stream}.{durable}", {"seq": 1})

    async def delete(self, observed: Observed) -> None:
        stream, _, durable = observed.id.name.partition("/")
        verb = _info(stream, durable)
        try:
            info = await self._api(verb)
        except ResourceMissing:
            return
        if _owner(info["config"]) != self._topology.name or observed.owner != self._topology.name:
            raise RefusedError(f"{observed.id} is not labelled as {self._topology.name}'s", hint="delete it by hand")
        if observed.version and _version(info) != observed.version:
            raise RefusedError(f"{observed.id} was changed since the plan was made", hint="plan again")
        try:
            await self._api(verb.replace(".INFO.", ".DELETE."))
            if durable:
                subject, redriven = self.names.redriven(stream, durable)
                await self._purge(self.names.state, self.names.histories(stream, durable) + "*")
                await self._purge(self.names.inbox, subject)
                await self._api(f"CONSUMER.DELETE.{self.names.inbox}.{redriven}")
        except ResourceMissing:
            pass  # gone is what was asked for

    async def _purge(self, stream: str, subject: str) -> None:
        try:
            await self._api(f"STREAM.PURGE.{stream}", {"filter": subject})
        except ResourceMissing:
            pass  # the whole internal stream went first

    async def config(self, stream: str, durable: str = "") -> Json | None:
        """As the server has it, of a stream or of its consumer `durable`; None when there is none."""
        try:
            return dict((await self._api(_info(stream, durable)))["config"])
        except ResourceMissing:
            return None

    def _labels(self, wanted: Desired) -> dict[str, str]:
        labels = {_OWNER: self._topology.name, _KIND: wanted.id.kind}
        if wanted.protect:
            labels[_PROTECT] = "true"
        return labels

    def _must_own(self, config: Json, what: ResourceId, hint: str) -> None:
        owner = _owner(config)
        if owner != self._topology.name:
            whose = f"belongs to topology {owner}" if owner else "was not made by this tool"
            raise RefusedError(f"{what} exists and {whose}", hint=hint)


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
    return {name: _write(name, value) for name, value in settings.items()}


def _write(name: str, value: Setting) -> Any:
    if name in _TIMES and isinstance(value, (int, float)):
        return round(value * _NS)
    return list(value) if isinstance(value, tuple) else value


def _consumer_config(durable: str, settings: Mapping[str, Setting]) -> Json:
    config: Json = {"durable_name": durable, "name": durable, "ack_policy": "explicit", "replay_policy": "instant"}
    config.update({"max_deliver": -1, "max_ack_pending": -1, **_write_all(settings)})
    policy = str(config.pop("deliver_policy", ""))
    if policy in ("all", "new"):
        config["deliver_policy"] = policy
    elif policy:
        at = datetime.fromisoformat(policy).astimezone(UTC)
        config.update(deliver_policy="by_start_time", opt_start_time=at.isoformat().replace("+00:00", "Z"))
    return config


def _subjects(settings: Mapping[str, Setting]) -> tuple[str, ...]:
    subjects = settings.get("subjects", ())
    return subjects if isinstance(subjects, tuple) else ()


def _explained(error: ApiError, what: str) -> OrchestratorError:
    hints = {
        10065: "another stream already takes one of these subjects: use brokers.<name>.prefix or other event types",
        10099: "a queue lets one agent read each event type: another consumer is there",
        10100: "a queue lets one agent read each event type: another consumer's filter overlaps",
        10052: "the server refuses this combination of settings",
        10047: "the server's or account's storage limit is reached",
        10074: "`replication` needs as many servers in the cluster",
    }
    if error.code in (10052, 10012):
        return RefusedError(f"{what}: {error.message}", hint="delete and recreate it, or undo the change")
    return BrokerError(f"{what}: {error.message}", hint=hints.get(error.code))
