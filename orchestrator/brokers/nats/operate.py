"""What operators ask of a running system: browse, remove, redrive, lag, replay, facts.

Reading for `tail`, `dlq` and `status` touches no subscription: messages are fetched from the stream by sequence.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime

from orchestrator.brokers import base
from orchestrator.brokers.base import Desired, Fact, Lag, Outgoing, Start, Stored
from orchestrator.brokers.nats.client import ApiError, Link, Raw, when
from orchestrator.brokers.nats.delivery import public_headers
from orchestrator.brokers.nats.producer import Publisher, head
from orchestrator.brokers.nats.resources import letters_root, safe
from orchestrator.brokers.nats.streams import Resources
from orchestrator.brokers.nats.trimmed import LOST
from orchestrator.errors import BrokerError, BrokerUnavailable, RefusedError, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Mode, Subscription, Topology, matches


class Operations:
    """The part of NatsConnection that answers people."""

    link: Link
    topology: Topology
    broker: Broker
    resources: Resources
    publisher: Publisher
    wanted: Mapping[str, Desired]  # by resource name

    def stream(self, channel: Channel) -> str:
        return safe(channel.address)

    @property
    def schedules(self) -> bool:
        """Whether the server can hold an event until its time."""
        return self.resources.schedules

    async def cluster_id(self) -> str:
        """The cluster's name; of a single server its name, which is its id unless the configuration names it."""
        info = self.link.info
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
        stream = self.stream(channel)
        state = (await self.link.api(f"STREAM.INFO.{stream}"))["state"]
        last = int(state["last_seq"])
        if isinstance(start, datetime):
            position = await self._first_at(stream, start.timestamp(), int(state["first_seq"]), last)
        else:
            position = int(state["first_seq"]) if start == "earliest" else last + 1
        live: asyncio.Queue[Stored] = asyncio.Queue()
        sids = self._overhear(channel, live) if follow and channel.mode is Mode.QUEUE else []
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
                if not sids:
                    await asyncio.sleep(0.1)  # the stream is asked again: a log keeps what it got meanwhile
                    continue
                while True:  # what a queue gets may be settled before it could be read: listen
                    stored = await live.get()
                    if stored.body in seen:
                        seen.discard(stored.body)
                    elif not events or any(matches(e, stored.event_type or "") for e in events):
                        yield stored
        finally:
            for sid in sids:
                self.link.client.unlisten(sid)

    def _overhear(self, channel: Channel, live: asyncio.Queue[Stored]) -> list[bytes]:
        cut = len(self.broker.prefix.encode())
        stream = self.stream(channel)

        def on_message(subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
            kind = subject[cut:].decode("utf-8", "surrogateescape")
            live.put_nowait(Stored(f"{stream}:live", body, public_headers(header) if header else {}, kind, time.time()))

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
        headers = public_headers(raw.header) if raw.header else {}
        return Stored(f"{self.stream(channel)}:{raw.seq}", raw.body, headers, kind, raw.time)

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
        stream = self.stream(channel)

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
        channel = self.topology.channels[subscription.channel]
        names = self.resources.names
        await self.resources.create_redrive(names.redrive_durable(subscription, channel))
        subject = names.redrive_subject(subscription, channel)
        kind = message.event_type.replace("\r", " ").replace("\n", " ")
        extra = f"Nats-Orchestrator-Type: {kind}\r\n".encode("utf-8", "surrogateescape")
        header = head("", message.correlation_id, message.headers, extra)
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: BaseException | None) -> None:
            if not confirmed.done():
                confirmed.set_exception(error) if error is not None else confirmed.set_result(None)

        self.publisher.publish(subject.encode(), header, message.body, self.resources.names.inbox, done)
        await confirmed
        self.link.client.send(f"PUB {names.bell(subscription, channel)} 0\r\n\r\n".encode())

    async def lag(self, subscriptions: Sequence[Subscription]) -> Mapping[tuple[str, str], Lag]:
        found = await asyncio.gather(*map(self._lag, subscriptions))
        return {(s.agent, s.channel): lag for s, lag in zip(subscriptions, found, strict=True)}

    async def _lag(self, subscription: Subscription) -> Lag:
        channel = self.topology.channels[subscription.channel]
        stream, names = self.stream(channel), self.resources.names
        info = await self.link.api(f"CONSUMER.INFO.{stream}.{safe(subscription.group)}")
        try:
            inbox = await self.link.api(f"CONSUMER.INFO.{names.inbox}.{names.redrive_durable(subscription, channel)}")
        except ResourceMissing:
            inbox = {}  # nothing was ever redriven
        waiting = int(info.get("num_pending", 0)) + int(inbox.get("num_pending", 0))
        pending = int(info.get("num_ack_pending", 0)) + int(inbox.get("num_ack_pending", 0))
        delayed, oldest = 0, 0.0
        if pending:
            delayed = min(pending, await self._delayed(names.history_root(subscription, channel)))
        floor = int(info["ack_floor"]["stream_seq"])
        if waiting or pending:
            config = info["config"]
            for subject in config.get("filter_subjects") or [config.get("filter_subject") or ">"]:
                raw = await self.link.message(stream, {"seq": floor + 1, "next_by_subj": subject})
                if raw is not None:
                    oldest = max(oldest, time.time() - raw.time)
        lost = await self.link.message(names.state, {"last_by_subj": names.history_root(subscription, channel) + LOST})
        unread_lost = int(json.loads(lost.body)["lost"]) if lost is not None else 0
        return Lag(waiting, pending - delayed, delayed, oldest, unread_lost)

    async def _delayed(self, root: str) -> int:
        """Histories that wait for their time. Beyond a thousand they are counted without being read."""
        state = (await self.link.api(f"STREAM.INFO.{self.resources.names.state}", {"subjects_filter": f"{root}*"}))[
            "state"
        ]
        count = len(state.get("subjects") or {})
        if count > 1000 or not count:
            return count
        now, found = time.time(), 0
        async for raw in self.link.read(self.resources.names.state, subject=f"{root}*"):
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
        stream, durable = self.stream(channel), safe(subscription.group)
        wanted = self.wanted[f"{stream}/{durable}"]
        policy = {"earliest": "all", "latest": "new"}.get(str(start), str(start))
        moved = Desired(wanted.id, {**wanted.settings, "deliver_policy": policy}, wanted.where)
        for one in await self.resources.observe([wanted]):
            if one.id == wanted.id:
                await self.resources.delete(one)
        await self.resources.create(moved)

    async def count(self, channel: Channel) -> int:
        return int((await self.link.api(f"STREAM.INFO.{self.stream(channel)}"))["state"]["messages"])

    async def facts(self) -> list[Fact]:
        info = self.link.info
        found = [
            Fact("nats-server", str(info.get("version", "?"))),
            Fact("cluster id", await self.cluster_id()),
        ]
        if not self.schedules:
            found.append(Fact("delayed publish", "no", "warning", "ctx.publish(delay=) needs nats-server 2.12"))
        before = time.time()
        try:
            account = await self.link.api("INFO")
        except BrokerError as error:
            return [*found, Fact("JetStream", error.message, "error", "start nats-server with -js")]
        limits = account.get("limits") or {}
        for field, name in (
            ("max_storage", "JetStream storage limit"),
            ("max_streams", "stream limit"),
            ("max_consumers", "consumer limit"),
        ):
            limit = int(limits.get(field, -1))
            found.append(Fact(name, "none" if limit < 0 else str(limit)))
        found.append(Fact("JetStream storage used", str(account.get("storage", 0))))
        found.append(await self._sync_fact())
        for name in self.wanted:
            try:
                ts = (await self.link.api(f"STREAM.INFO.{name.partition('/')[0]}")).get("ts")
            except BrokerError:
                continue
            if ts:
                off = when(ts) - (before + time.time()) / 2
                text = f"{off:+.3f} s"
                late = Fact("clock difference", text, "warning", "keep the clocks of both hosts in step (NTP)")
                found.append(Fact("clock difference", text) if abs(off) < 1 else late)
                break
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
