"""The package's entry (base.Adapter) and a connection (base.Connection): what the worker opens and what operators ask.

Reading for `tail`, `dlq` and `status` touches no subscription: messages are fetched from the stream by sequence.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from orchestrator.brokers import base
from orchestrator.brokers.base import Capabilities, Fact, Lag, Outgoing, Start, Stored
from orchestrator.brokers.nats import resources
from orchestrator.brokers.nats.client import ApiError, Link, Raw, open_link, when
from orchestrator.brokers.nats.consumer import NatsConsumer
from orchestrator.brokers.nats.producer import NatsProducer
from orchestrator.brokers.nats.resources import (
    ACK_WAIT,
    LOST,
    REDRIVEN_TYPE,
    filters_of,
    head,
    letters_root,
    public_headers,
    safe,
    start_policy,
)
from orchestrator.brokers.nats.streams import Streams
from orchestrator.errors import BrokerError, BrokerUnavailable, RefusedError, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Mode, Subscription, Topology, matches


class NatsConnection(Streams):
    """base.Connection on one link."""

    def __init__(self, link: Link, topology: Topology, broker: Broker, url: str) -> None:
        super().__init__(link, topology, broker)
        self._url = url
        self._producer = NatsProducer(self)

    # --- events ---

    def producer(self) -> NatsProducer:
        return self._producer

    def consumer(self, subscription: Subscription, *, slot: str) -> NatsConsumer:
        return NatsConsumer(self, subscription, slot)

    async def replies(self, receive: Callable[[bytes, Mapping[str, str]], None]) -> str:
        subject = f"{self.link.inbox.rstrip('.')}-replies"

        def on_message(_subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
            receive(body, public_headers(header))

        self.link.client.listen(subject, on_message)
        await self.link.flush()
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

    # --- operate ---

    async def cluster_id(self) -> str:
        """The cluster's name; of a single server its name, which is its id unless the configuration names it."""
        info = self.link.client.server_info
        return str(info.get("cluster") or info.get("server_name") or info.get("server_id", ""))

    async def browse(
        self,
        channel: Channel,
        *,
        start: Start,
        follow: bool = False,
        events: Sequence[str] = (),
        dead_letters: bool = False,
    ) -> AsyncIterator[Stored]:
        stream = safe(channel.address)
        state = (await self.link.api(f"STREAM.INFO.{stream}"))["state"]
        last = int(state["last_seq"])
        if isinstance(start, datetime):
            position = await self._first_at(stream, start.timestamp(), int(state["first_seq"]), last)
        else:
            position = int(state["first_seq"]) if start == "earliest" else last + 1
        live: asyncio.Queue[Stored] = asyncio.Queue()
        sids = self._overhear(channel, events, live) if follow and channel.mode is Mode.QUEUE else []
        seen: set[bytes] = set()
        try:
            while True:
                async for raw in self.link.read(stream, start=position):
                    position = raw.seq + 1
                    stored = self._stored(channel, raw, events, dead_letters)
                    if stored is not None:
                        if sids:
                            seen.add(stored.body)
                        yield stored
                if not follow:
                    return
                while sids:  # what a queue gets may be settled before it could be read: listen
                    stored = await live.get()
                    if stored.body not in seen:
                        yield stored
                    seen.discard(stored.body)
                await asyncio.sleep(0.1)  # the stream is asked again: a log keeps what it got meanwhile
        finally:
            for sid in sids:
                self.link.client.unlisten(sid)

    def _overhear(self, channel: Channel, events: Sequence[str], live: asyncio.Queue[Stored]) -> list[bytes]:
        cut = len(self.broker.prefix.encode())
        position = f"{safe(channel.address)}:live"

        def on_message(subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
            kind = subject[cut:].decode("utf-8", "surrogateescape")
            if not events or any(matches(e, kind) for e in events):
                live.put_nowait(Stored(position, body, public_headers(header), kind, time.time()))

        return [self.link.client.listen(self.broker.prefix + e, on_message) for e in channel.events]

    def _stored(self, channel: Channel, raw: Raw, events: Sequence[str], dead_letters: bool) -> Stored | None:
        """None for what is no event of this view."""
        root = f"{letters_root(channel)}."
        letter = channel.dead_letters and raw.subject.startswith(root)
        if letter != dead_letters and channel.dead_letters:
            return None
        kind = raw.subject[len(root) :].partition(".")[2] if letter else raw.subject.removeprefix(self.broker.prefix)
        if events and not any(matches(e, kind) for e in events):
            return None
        headers = public_headers(raw.header)
        return Stored(f"{safe(channel.address)}:{raw.seq}", raw.body, headers, kind, raw.time)

    async def _first_at(self, stream: str, at: float, low: int, high: int) -> int:
        """The first sequence that was stored at or after `at`, by bisection."""
        while low <= high:
            middle = (low + high) // 2
            raw = await self.link.message(stream, {"seq": middle, "next_by_subj": ">"})
            if raw is None or raw.time >= at:
                high = middle - 1
            else:
                low = raw.seq + 1
        return low

    async def remove(self, channel: Channel, positions: Sequence[str]) -> int:
        stream = safe(channel.address)

        async def one(position: str) -> bool:
            seq = position.rpartition(":")[2]
            if not seq.isdigit():
                return False
            try:
                await self.link.api(f"STREAM.MSG.DELETE.{stream}", {"seq": int(seq), "no_erase": True})
            except ResourceMissing:
                return False
            except ApiError as error:
                if error.code in (10043, 10057):  # no such sequence
                    return False
                raise
            return True

        return sum(await asyncio.gather(*map(one, positions)))

    async def redrive(self, subscription: Subscription, message: Outgoing) -> None:
        place, names = self.place(subscription), self.names
        subject, durable = names.redriven(*place)
        await self.create_reader(names.inbox, durable, subject)
        kind = message.event_type.replace("\r", " ").replace("\n", " ")
        header = head("", message.correlation_id, message.headers, f"{REDRIVEN_TYPE}: {kind}\r\n")
        await self._producer.store(subject, header, message.body, names.inbox)
        self.link.client.send(f"PUB {names.bell(*place)} 0\r\n\r\n".encode())

    async def lag(self, subscriptions: Sequence[Subscription]) -> Mapping[tuple[str, str], Lag]:
        found = await asyncio.gather(*map(self._lag, subscriptions))
        return {(s.agent, s.channel): lag for s, lag in zip(subscriptions, found, strict=True)}

    async def _lag(self, subscription: Subscription) -> Lag:
        stream, durable = self.place(subscription)
        names = self.names
        info = await self.link.api(f"CONSUMER.INFO.{stream}.{durable}")
        try:
            inbox = await self.link.api(f"CONSUMER.INFO.{names.inbox}.{names.redriven(stream, durable)[1]}")
        except ResourceMissing:
            inbox = {}  # nothing was ever redriven
        waiting = int(info.get("num_pending", 0)) + int(inbox.get("num_pending", 0))
        pending = int(info.get("num_ack_pending", 0)) + int(inbox.get("num_ack_pending", 0))
        history_root = names.histories(stream, durable)
        delayed = min(pending, await self._delayed(history_root)) if pending else 0
        oldest = 0.0
        for subject in filters_of(info["config"]) if waiting or pending else ():
            ask = {"seq": int(info["ack_floor"]["stream_seq"]) + 1, "next_by_subj": subject}
            if (raw := await self.link.message(stream, ask)) is not None:
                oldest = max(oldest, time.time() - raw.time)
        lost = await self.link.message(names.state, {"last_by_subj": history_root + LOST})
        return Lag(
            waiting, pending - delayed, delayed, oldest, json.loads(lost.body)["lost"] if lost is not None else 0
        )

    async def _delayed(self, root: str) -> int:
        """Histories that wait for their time. Beyond a thousand they are counted without being read."""
        info = await self.link.api(f"STREAM.INFO.{self.names.state}", {"subjects_filter": f"{root}*"})
        count = len(info["state"].get("subjects") or {})
        if count > 1000 or not count:
            return count
        now, found = time.time(), 0
        async for raw in self.link.read(self.names.state, subject=f"{root}*"):
            try:
                found += base.History.decode(raw.body).not_before > now
            except ValueError:
                continue  # not a history of ours
        return found

    async def seek(self, subscription: Subscription, start: Start) -> None:
        channel = self.topology.channels[subscription.channel]
        if channel.mode is Mode.QUEUE:
            raise RefusedError(
                f"channel {channel.name} is a queue: what was handled is gone", hint="replay needs `mode: log`"
            )
        wanted = self.wanted["/".join(self.place(subscription))]
        there = next((o for o in await self.observe([wanted]) if o.id == wanted.id), None)
        if there is None:
            raise ResourceMissing(
                f"agent {subscription.agent} has no subscription to channel {channel.name} yet ({wanted.id})",
                hint="run `orchestrator apply`, which makes it, and then replay",
            )
        await self.delete(there)
        await self.create(replace(wanted, settings={**wanted.settings, "deliver_policy": start_policy(start)}))

    async def count(self, channel: Channel) -> int:
        return int((await self.link.api(f"STREAM.INFO.{safe(channel.address)}"))["state"]["messages"])

    async def facts(self) -> list[Fact]:
        info = self.link.client.server_info
        found = [Fact("nats-server", str(info.get("version", "?"))), Fact("cluster id", await self.cluster_id())]
        if not self.schedules:
            found.append(Fact("delayed publish", "no", "warning", "ctx.publish(delay=) needs nats-server 2.12"))
        try:
            account = await self.link.api("INFO")
            before = time.time()
            streams = (await self.link.api("STREAM.LIST")).get("streams") or []
            middle = (before + time.time()) / 2
        except BrokerError as error:
            return [*found, Fact("JetStream", error.message, "error", "start nats-server with -js")]
        for field, name in (("storage", "JetStream storage"), ("streams", "stream"), ("consumers", "consumer")):
            limit = int((account.get("limits") or {}).get(f"max_{field}", -1))
            found.append(Fact(f"{name} limit", "none" if limit < 0 else str(limit)))
        found.append(Fact("JetStream storage used", str(account.get("storage", 0))))
        found.append(await self._sync_fact())
        if streams and (now := streams[0].get("ts")):
            off = when(now) - middle
            difference = Fact("clock difference", f"{off:+.3f} s")
            if abs(off) >= 1:
                difference = replace(difference, level="warning", hint="keep both clocks in step (NTP)")
            found.append(difference)
        return found

    async def _sync_fact(self) -> Fact:
        """How soon a confirmed write survives a power cut; ordinary accounts may not read it."""
        hint = "a power cut may lose the last writes of a single server; sync_interval: always prevents it"
        try:
            _, body = await self.link.request("$SYS.REQ.SERVER.PING.JSZ", b"{}", timeout=0.5)
        except BrokerUnavailable:
            body = b""
        found = re.search(rb'"sync_always":\s*(true)|"sync_interval":\s*(\d+)', body)
        if found is None:
            return Fact("sync_interval", "not readable (server default: 2m)", "ok", hint)
        if found[1]:
            return Fact("sync_interval", "always")
        return Fact("sync_interval", f"{int(found[2]) / 1e9:g} s", "ok", hint)

    async def close(self) -> None:
        await self._producer.close()
        await self.link.close()


class NatsAdapter:
    """base.Adapter."""

    capabilities = Capabilities(
        kind="nats",
        lease=ACK_WAIT,
        atomic_settle=False,
        notes=("outputs are confirmed before their event is settled: a crash in between sends them again, same ids",),
    )

    desired = staticmethod(resources.desired)
    judge = staticmethod(resources.judge)

    async def connect(self, topology: Topology, broker: Broker, *, name: str, patience: float = 5.0) -> NatsConnection:
        url = broker.url
        if broker.embedded:
            from orchestrator.brokers.embedded import server  # psutil: 1.2 MiB that others need not have

            url = server.running_url(topology.state_dir)
        link = await open_link(broker, url, name=name, patience=patience, root=topology.root)
        return NatsConnection(link, topology, broker, url)


adapter: base.Adapter = NatsAdapter()
