"""Streams and consumers on the server: what is there, and creating, changing and deleting it.

Walk `apply`, third and last step. All in raw JSON, so that fields which this code does not know survive an update;
ownership is a label in the metadata.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from orchestrator.brokers.base import Desired, Observed, ResourceId, Setting
from orchestrator.brokers.nats.client import ApiError, Json, Link
from orchestrator.brokers.nats.resources import ACK_WAIT, Names
from orchestrator.errors import BrokerError, OrchestratorError, RefusedError, ResourceMissing
from orchestrator.topology.model import Broker, Topology, digest
from orchestrator.topology.routing import Index

_OWNER, _PROTECT = "orchestrator.topology", "orchestrator.protect"
_NS = 1_000_000_000
_TIMES = frozenset({"max_age", "duplicate_window", "ack_wait"})


class Resources:
    """base.Connection's reconcile part."""

    def __init__(self, link: Link, topology: Topology, broker: Broker) -> None:
        self._link = link
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
            kind = labels.get("orchestrator.kind") or ("internal" if name in internal else "channel")
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
        settings = {k: _read(k, config.get(k)) for k in wanted.settings} if wanted else _all_stream(config)
        if not self.schedules and "allow_msg_schedules" in settings:
            settings["allow_msg_schedules"] = True  # an older server has no such thing: nothing to change
        return Observed(
            id=resource,
            settings=settings,
            owner=_owner(config),
            version=f"{info.get('created', '')}/{_digest(config)}",
            events=int(state["messages"]),
            bytes=int(state["bytes"]),
            protect=(config.get("metadata") or {}).get(_PROTECT) == "true",
        )

    def _consumer(self, resource: ResourceId, info: Json, wanted: Desired | None) -> Observed:
        config = info["config"]
        filters = config.get("filter_subjects") or [config.get("filter_subject") or ">"]
        policy = config.get("deliver_policy", "all")
        settings: dict[str, Setting] = {
            "filter_subjects": tuple(sorted(filters)),
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
            version=f"{info.get('created', '')}/{_digest(config)}",
            events=int(info.get("num_pending", 0)) + int(info.get("num_ack_pending", 0)),
        )

    async def create(self, wanted: Desired) -> None:
        if wanted.external:
            raise RefusedError(
                f"stream {wanted.id.name} is external and does not exist", hint="create it, or drop `external: true`"
            )
        if wanted.id.kind == "subscription":
            await self._create_consumer(wanted)
            return
        name = wanted.id.name
        if (there := await self._stream_config(name)) is not None:
            self._must_own(there, f"stream {name}", "use another `address:`, or mark the channel `external: true`")
            return
        config = {"name": name, **_write_all(wanted.settings), "metadata": self._labels(wanted)}
        if not self.schedules:
            config.pop("allow_msg_schedules", None)
        try:
            await self._link.api(f"STREAM.CREATE.{name}", config)
        except ApiError as error:
            raise _explained(error, f"stream {name}") from None
        if name == self.names.later:
            await self.create_relay()

    async def _create_consumer(self, wanted: Desired, *, start: Mapping[str, Any] | None = None) -> None:
        stream, _, durable = wanted.id.name.partition("/")
        try:
            there = (await self._link.api(f"CONSUMER.INFO.{stream}.{durable}"))["config"]
        except ResourceMissing:
            there = None
        if there is not None:
            self._must_own(there, f"consumer {wanted.id.name}", "use another `group:`")
        else:
            config = {**_consumer_config(durable, wanted.settings), **(start or {}), "metadata": self._labels(wanted)}
            await self._put_consumer(stream, durable, config)

    async def create_redrive(self, durable: str) -> None:
        """The consumer of one subscription's redriven events; made when the first one comes, since a stream takes no
        more than a thousand consumers."""
        subject = f"$ORCHESTRATOR.inbox.{self.names.scope}.{durable}"
        settings: dict[str, Setting] = {"filter_subjects": (subject,), "ack_wait": ACK_WAIT}
        await self._put_consumer(self.names.inbox, durable, _consumer_config(durable, settings))

    async def create_relay(self) -> None:
        """The one consumer of the delayed events, shared by every worker."""
        settings: dict[str, Setting] = {"filter_subjects": (f"{self.names.later_root}due",), "ack_wait": ACK_WAIT}
        await self._put_consumer(self.names.later, "relay", _consumer_config("relay", settings))

    async def heal_consumer(self, wanted: Desired, after: int) -> None:
        """Makes a deleted consumer again; in a log it goes on after sequence `after`."""
        start = {"deliver_policy": "by_start_sequence", "opt_start_seq": after + 1} if after else None
        await self._create_consumer(wanted, start=start)

    async def _put_consumer(self, stream: str, durable: str, config: Json) -> None:
        try:
            await self._link.api(
                f"CONSUMER.CREATE.{stream}.{durable}", {"stream_name": stream, "config": config, "action": "create"}
            )
        except ApiError as error:
            if error.code not in (10148, 10013, 10105):  # somebody else was faster: it is there
                raise _explained(error, f"consumer {stream}/{durable}") from None

    async def update(self, wanted: Desired, observed: Observed) -> None:
        name = wanted.id.name
        if wanted.external:
            raise RefusedError(f"{wanted.id} is external", hint="it is never changed from here")
        if wanted.id.kind == "subscription":
            stream, _, durable = name.partition("/")
            config = (await self._link.api(f"CONSUMER.INFO.{stream}.{durable}"))["config"]
            self._must_own(config, f"consumer {name}", "use another `group:`")
            before = set(config.pop("filter_subjects", None) or [config.pop("filter_subject", "")])
            settings = {k: v for k, v in wanted.settings.items() if k != "deliver_policy"}
            config.update(_consumer_config(durable, settings))
            config["metadata"] = {**(config.get("metadata") or {}), **self._labels(wanted)}
            body = {"stream_name": stream, "config": config, "action": "update"}
            try:
                await self._link.api(f"CONSUMER.CREATE.{stream}.{durable}", body)
            except ApiError as error:
                raise _explained(error, f"consumer {name}") from None
            await self._unstrand(stream, durable, before, set(config["filter_subjects"]))
            return
        raw = await self._stream_config(name)
        if raw is None:
            raise ResourceMissing(f"stream {name} is gone", hint="plan again")
        self._must_own(raw, f"stream {name}", "mark the channel `external: true`")
        raw.update(_write_all(wanted.settings))
        if not self.schedules:
            raw.pop("allow_msg_schedules", None)
        raw["metadata"] = {**(raw.get("metadata") or {}), **self._labels(wanted)}
        if not wanted.protect:
            raw["metadata"].pop(_PROTECT, None)
        try:
            await self._link.api(f"STREAM.UPDATE.{name}", raw)
        except ApiError as error:
            raise _explained(error, f"stream {name}") from None

    async def _unstrand(self, stream: str, durable: str, before: set[str], after: set[str]) -> None:
        """In a queue, events of a newly read type may lie below the consumer's position: start it over. What is
        settled is gone from a queue, so only what is in flight is seen twice."""
        raw = await self._stream_config(stream)
        if raw is None or raw.get("retention") != "workqueue" or after <= before:
            return
        await self._link.api(f"CONSUMER.RESET.{stream}.{durable}", {"seq": 1})

    async def delete(self, observed: Observed) -> None:
        name = observed.id.name
        stream, _, durable = name.partition("/")
        verb = f"CONSUMER.INFO.{stream}.{durable}" if durable else f"STREAM.INFO.{stream}"
        try:
            info = await self._link.api(verb)
        except ResourceMissing:
            return
        if _owner(info["config"]) != self._topology.name or observed.owner != self._topology.name:
            raise RefusedError(f"{observed.id} is not labelled as {self._topology.name}'s", hint="delete it by hand")
        if observed.version and f"{info.get('created', '')}/{_digest(info['config'])}" != observed.version:
            raise RefusedError(f"{observed.id} was changed since the plan was made", hint="plan again")
        try:
            await self._link.api(verb.replace(".INFO.", ".DELETE."))
            if durable:
                inbox = f"{durable}--{stream}"
                await self._link.api(f"CONSUMER.DELETE.{self.names.inbox}.{inbox}")
        except ResourceMissing:
            pass  # gone is what was asked for
        if durable:
            await self._purge(self.names.state, f"$KV.{self.names.scope}-state.{stream}.{durable}.*")
            await self._purge(self.names.inbox, f"$ORCHESTRATOR.inbox.{self.names.scope}.{durable}--{stream}")

    async def _purge(self, stream: str, subject: str) -> None:
        try:
            await self._link.api(f"STREAM.PURGE.{stream}", {"filter": subject})
        except ResourceMissing:
            pass  # the whole internal stream went first

    async def _stream_config(self, name: str) -> Json | None:
        try:
            return dict((await self._link.api(f"STREAM.INFO.{name}"))["config"])
        except ResourceMissing:
            return None

    def _labels(self, wanted: Desired) -> dict[str, str]:
        labels = {_OWNER: self._topology.name, "orchestrator.kind": wanted.id.kind}
        if wanted.protect:
            labels[_PROTECT] = "true"
        return labels

    def _must_own(self, config: Json, what: str, hint: str) -> None:
        owner = _owner(config)
        if owner != self._topology.name:
            whose = f"belongs to topology {owner}" if owner else "was not made by this tool"
            raise RefusedError(f"{what} exists and {whose}", hint=hint)


def _owner(config: Json) -> str | None:
    owner = (config.get("metadata") or {}).get(_OWNER)
    return str(owner) if owner is not None else None


def _digest(config: Json) -> str:
    """`_nats.*` metadata is the server's own and changes with its version."""
    metadata = {k: v for k, v in (config.get("metadata") or {}).items() if not k.startswith("_nats.")}
    return digest({**config, "metadata": metadata})


def _all_stream(config: Json) -> dict[str, Setting]:
    names = ("subjects", "retention", "discard", "max_age", "max_msgs", "max_bytes", "num_replicas")
    return {name: _read(name, config.get(name)) for name in names}


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
