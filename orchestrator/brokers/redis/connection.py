"""One topology's connection to one Redis: hands out producer, consumers and reply inbox, and what `operate` asks.

Where the walks of this package begin: Adapter.connect → reconcile (resources), events (producer, consumer), operate.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

from redis.exceptions import AuthenticationError

from orchestrator import clock
from orchestrator.brokers.base import (
    Capabilities,
    Connection,
    Done,
    Fact,
    Lag,
    Outgoing,
    Producer,
    Start,
    Stored,
)
from orchestrator.brokers.redis import resource_scripts, resources
from orchestrator.brokers.redis.consumer import LEASE, RedisConsumer
from orchestrator.brokers.redis.entries import check, fields, parse, refusal
from orchestrator.brokers.redis.link import Link, Wire, base
from orchestrator.brokers.redis.pump import Op, Pump
from orchestrator.brokers.redis.resources import Resources
from orchestrator.brokers.redis.scripts import Source, is_queue
from orchestrator.errors import BrokerError, BrokerUnavailable, PublishRejected, ResourceMissing
from orchestrator.topology.model import Broker, Channel, Mode, Subscription, Topology, matches

_log = logging.getLogger(__name__)
_UNCONFIRMED = 4096
_REPLY_TTL = 60_000
_ID_KEY = "orchestrator:cluster-id"


class RedisConnection(Resources, Connection):
    def __init__(self, topology: Topology, broker: Broker, name: str, link: Link, version: tuple[int, ...]) -> None:
        super().__init__(link, topology, broker, version)
        self._name = name
        self._pumps: dict[int, Pump] = {}
        self._consumers: list[RedisConsumer] = []
        self._replies: list[Replies] = []
        mine = [channel for channel in topology.channels.values() if channel.broker == broker.name]
        self._producer = RedisProducer(link, self.pump, mine)

    def new_link(self) -> Link:
        """Connections of one's own, for another thread."""
        return Link(self.broker, f"{self._name} heartbeat")

    def pump(self, stream: str) -> Pump:
        """The one for the stream's slot: there is one in all when there is no cluster."""
        slot = self.link.slot(stream)
        if slot not in self._pumps:
            self._pumps[slot] = Pump(self.link, stream, lambda channel: self.restore(channel, None, "0-0"))
        return self._pumps[slot]

    async def cluster_id(self) -> str:
        """A key that whoever asks first writes, and that may be set by hand; run ids change with each restart."""
        await self.link.call(_ID_KEY, "SET", _ID_KEY, uuid.uuid4().hex, "NX")
        found = await self.link.call(_ID_KEY, "GET", _ID_KEY)
        return str(found.decode())

    # --- events -----------------------------------------------------------------------------------------------

    def producer(self) -> RedisProducer:
        return self._producer

    def consumer(self, subscription: Subscription, *, slot: str) -> RedisConsumer:
        consumer = RedisConsumer(self, subscription, slot)
        self._consumers.append(consumer)
        return consumer

    async def replies(self, receive: Callable[[bytes, Mapping[str, str]], None]) -> str:
        inbox = Replies(self.link, self.broker.prefix, receive)
        address = await inbox.open()
        self._replies.append(inbox)
        return address

    def loss_detection(self, subscription: Subscription) -> str:
        """How trimmed unread events are noticed: "count", "next" (6.2), or "": our own trimming of a queue counts."""
        queue = self.topology.channels[subscription.channel].mode is Mode.QUEUE
        alone = len(self._readers(subscription.channel)) == 1
        if self.version >= (7,) and (alone or not queue):
            return "count"
        return "" if queue else "next"

    def takes_untyped(self, subscription: Subscription) -> bool:
        """An entry of a queue whose type nobody can tell is one agent's to dead-letter, not each one's."""
        channel = self.topology.channels[subscription.channel]
        return not is_queue(channel) or self._readers(channel.name)[0] == subscription.agent

    def _readers(self, channel: str) -> list[str]:
        agents = self.topology.agents.values()
        return [sub.agent for agent in agents for sub in agent.subscriptions if sub.channel == channel]

    # --- operate ----------------------------------------------------------------------------------------------

    async def browse(
        self,
        channel: Channel,
        *,
        start: Start,
        follow: bool = False,
        events: Sequence[str] = (),
        dead_letters: bool = False,
    ) -> AsyncIterator[Stored]:
        stream = channel.address
        await self.count(channel)
        info = await self.stream_info(stream)
        last = resources.position(start)
        end = info["last-generated-id"].decode()
        if last == "$":
            last = end
        with self.link.translated():
            wire = await self.link.fresh(stream)
        try:
            while True:
                command = ("XREAD", "COUNT", 200, *(("BLOCK", 500) if follow else ()), "STREAMS", stream, last)
                with self.link.translated():
                    found = await wire.ask(*command)
                if not found and not follow:
                    return
                for entry, flat in found[0][1] if found else ():
                    last = entry.decode()
                    if not follow and _place(last) > _place(end):
                        return
                    body, headers, kind = parse(flat)
                    wanted = not events or (kind is not None and any(matches(p, kind) for p in events))
                    if wanted and ("dlq-agent" in headers) == dead_letters:
                        yield Stored(f"{stream}:{last}", body, headers, kind, int(last.partition("-")[0]) / 1000)
        finally:
            wire.close()

    async def remove(self, channel: Channel, positions: Sequence[str]) -> int:
        places = [place for address, _, place in (p.rpartition(":") for p in positions) if address == channel.address]
        if not places:
            return 0
        return int(await self.link.call(channel.address, "XDEL", channel.address, *places))

    async def redrive(self, subscription: Subscription, message: Outgoing) -> None:
        inbox = self._source(subscription).key("inbox")
        await self.link.script(resource_scripts.REDRIVE, [inbox], subscription.group, *fields(message))

    async def lag(self, subscriptions: Sequence[Subscription]) -> Mapping[tuple[str, str], Lag]:
        found: dict[tuple[str, str], Lag] = {}
        for sub in subscriptions:
            left, _ = await self.backlog(self.topology.channels[sub.channel].address, sub.group, sub.events)
            found[sub.agent, sub.channel] = left
        return found

    async def seek(self, subscription: Subscription, start: Start) -> None:
        """What is pending behind the new position is read again from there, so it is no longer pending."""
        source, stream = self._source(subscription), self.topology.channels[subscription.channel].address
        info, last = await self.stream_info(stream), resources.position(start)
        command = ["XGROUP", "SETID", stream, subscription.group, last]
        if self.version >= (7,) and last in ("0", "$"):
            read = info["entries-added"] - (info["length"] if last == "0" else 0)
            command += ["ENTRIESREAD", str(read)]
        await self.link.call(stream, *command)
        if last == "$":
            return
        first = f"({last}" if last != "0" else "-"
        while page := await self.link.call(stream, "XPENDING", stream, subscription.group, first, "+", 500):
            ids = [entry for entry, *_ in page]
            await self.link.call(stream, "ZREM", source.key("due"), *ids)
            await self.link.call(stream, "HDEL", source.key("history"), *ids)
            await self.link.call(stream, "XACK", stream, subscription.group, *ids)

    async def count(self, channel: Channel) -> int:
        age = 0 if channel.external else int((channel.retention.max_age or 0) * 1000)
        args = (channel.address, base(channel.address), age, int(is_queue(channel)))
        found = int(await self.link.script(resource_scripts.TEND, [channel.address], *args))
        if found < 0:
            raise ResourceMissing(f"the stream {channel.address} does not exist", hint="run `orchestrator apply`")
        return found

    def _source(self, subscription: Subscription) -> Source:
        channel = self.topology.channels[subscription.channel]
        return Source(channel.address, subscription.group, "", queue=is_queue(channel))

    async def facts(self) -> list[Fact]:
        info = _info(await self.link.call("", "INFO"))
        version = info.get("redis_version", "?")
        found = [Fact("version", version)]
        if self.version < (7,):
            hint = "Redis 7 counts events that were trimmed unread; before it the alarm has no number"
            found = [Fact("version", version, "warning", hint)]
        if info.get("aof_enabled") == "1":
            found.append(Fact("appendonly", "yes"))
            sync = await self._setting("appendfsync")
            hint = "a power loss loses the last second: set appendfsync always"
            found.append(Fact("appendfsync", sync, *(("warning", hint) if sync != "always" else ())))
        else:
            found.append(Fact("appendonly", "no", "error", "a restart loses confirmed events: set appendonly yes"))
        policy = info.get("maxmemory_policy", "?")
        evicts = policy != "noeviction" and info.get("maxmemory", "0") != "0"
        hint = "the server may delete streams and histories: set maxmemory-policy noeviction"
        found.append(Fact("maxmemory-policy", policy, *(("error", hint) if evicts else ())))
        off = await self.now() - clock.now()
        hint = "retries and ages go by the server's clock: run NTP on both"
        found.append(Fact("clock difference", f"{off:+.1f} s", *(("warning", hint) if abs(off) > 2 else ())))
        return found

    async def _setting(self, name: str) -> str:
        try:
            found = await self.link.call("", "CONFIG", "GET", name)
        except BrokerUnavailable:
            raise
        except BrokerError:  # hosted servers forbid CONFIG
            return "unknown"
        return str(found[1].decode()) if found else "unknown"

    async def close(self) -> None:
        await asyncio.gather(*(consumer.close() for consumer in self._consumers))
        for inbox in self._replies:
            await inbox.close()
        for pump in self._pumps.values():
            await pump.close(3.0)
        self.link.close()


def _info(answer: bytes) -> dict[str, str]:
    return dict(line.split(":", 1) for line in answer.decode().splitlines() if ":" in line)


def _place(entry: str) -> tuple[int, int]:
    left, _, right = entry.partition("-")
    return int(left), int(right)


class RedisProducer(Producer):
    def __init__(self, link: Link, pump: Callable[[str], Pump], channels: Sequence[Channel]) -> None:
        self._link, self._pump = link, pump
        self._streams = [channel.address for channel in channels]
        self._unconfirmed = 0
        self._room = asyncio.Event()
        self._replies: set[asyncio.Task[None]] = set()

    def send(self, message: Outgoing, done: Done) -> None:
        check(message)
        self._unconfirmed += 1

        def finish(op: Op, word: str) -> None:
            self._unconfirmed -= 1
            if self._unconfirmed < _UNCONFIRMED:
                self._room.set()
            done(refusal(word, f"{message.event_type} {message.event_id}") if word else None)

        self._pump(message.channel.address).add(Op("publish", finish, outputs=(message,)))

    @property
    def ready(self) -> bool:
        return self._unconfirmed < _UNCONFIRMED

    async def wait_ready(self) -> None:
        while not self.ready:
            self._room.clear()
            await self._room.wait()

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        check(message)
        # Whoever asks names the address, and may be less trusted than we are.
        if any(address == stream or address.startswith(f"{base(stream)}:") for stream in self._streams):
            raise PublishRejected(f"{address!r} is no reply address", hint="reply-to must be the asker's own stream")
        task = asyncio.get_running_loop().create_task(self._reply(address, message, done))
        self._replies.add(task)
        task.add_done_callback(self._replies.discard)

    async def _reply(self, address: str, message: Outgoing, done: Done) -> None:
        command = ("XADD", address, "NOMKSTREAM", "*", *fields(message))
        deadline = asyncio.get_running_loop().time() + 10
        while True:
            try:
                await self._link.call(address, *command)  # nothing is added when the requester has gone
                return done(None)
            except BrokerUnavailable as error:
                if asyncio.get_running_loop().time() > deadline:
                    return done(error)
                await asyncio.sleep(0.2)
            except BrokerError as error:
                return done(PublishRejected(f"the reply to {address} was refused: {error}", hint=error.hint))


class Replies:
    """A process's reply inbox: a stream of its own that expires soon after the process has gone."""

    def __init__(self, link: Link, prefix: str, receive: Callable[[bytes, Mapping[str, str]], None]) -> None:
        self.address = f"{prefix}replies:{uuid.uuid4().hex}"
        self._link, self._receive = link, receive
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> str:
        await self._make()
        self._task = asyncio.get_running_loop().create_task(self._read(), name="redis replies")
        return self.address

    async def _make(self) -> None:
        if not await self._link.call(self.address, "EXISTS", self.address):
            await self._link.call(self.address, "XGROUP", "CREATE", self.address, "@new", "0", "MKSTREAM")
        await self._link.call(self.address, "PEXPIRE", self.address, _REPLY_TTL)

    async def _read(self) -> None:
        last, extended = b"0-0", 0.0
        wire: Wire | None = None
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    if loop.time() > extended + 5:
                        await self._make()
                        await self._link.call(self.address, "XTRIM", self.address, "MINID", "~", last)
                        extended = loop.time()
                    with self._link.translated():
                        if wire is None or wire.closed:
                            wire = await self._link.fresh(self.address)
                        found = await wire.ask("XREAD", "COUNT", 256, "BLOCK", 1000, "STREAMS", self.address, last)
                except BrokerError:  # the requests that wait time out; the inbox itself comes back
                    extended = 0.0
                    await asyncio.sleep(0.2)
                    continue
                for entry_id, flat in found[0][1] if found else ():
                    last = entry_id
                    body, headers, _ = parse(flat)
                    try:
                        self._receive(body, headers)
                    except Exception:  # one reply that cannot be read must not cost all others theirs
                        _log.exception("the reply %s could not be taken", entry_id)
        finally:
            if wire is not None:
                wire.close()

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        with contextlib.suppress(BrokerError):  # it expires by itself
            await self._link.call(self.address, "DEL", self.address)


class RedisAdapter:
    capabilities = Capabilities(
        kind="redis",
        lease=LEASE,
        atomic_settle=True,
        notes=(
            "Redis keeps confirmed events over a restart only with `appendonly yes`, over a power loss only with "
            "`appendfsync always`, and a failover to a replica may lose the newest.",
            "max_bytes is measured by MEMORY USAGE and is approximate.",
            "overflow, dedup_window and max_age bind this package's publishers and workers, not outside clients.",
            "On a Redis Cluster outputs to another slot are published before the event is settled, not with it.",
            "replication is set on the server, not by a topology.",
        ),
    )

    desired = staticmethod(resources.desired)
    judge = staticmethod(resources.judge)

    async def connect(self, topology: Topology, broker: Broker, *, name: str, patience: float = 5.0) -> RedisConnection:
        link = Link(broker, name)
        try:
            version = await _greeted(link, broker, patience)
        except BaseException:
            link.close()
            raise
        return RedisConnection(topology, broker, name, link, version)


async def _greeted(link: Link, broker: Broker, patience: float) -> tuple[int, ...]:
    """The server's version, once it answers. Raises BrokerUnavailable, or BrokerError when it is too old."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    last = False
    while True:
        try:
            async with asyncio.timeout(1.0 if last else patience):
                info = _info(await link.call("", "INFO", "server"))
            break
        except (TimeoutError, BrokerError) as error:
            refused = isinstance(error, BrokerError) and not isinstance(error, BrokerUnavailable)
            wrong = refused or isinstance(error.__cause__, AuthenticationError)
            if wrong or last:
                named = f"check brokers.{broker.name}: its url, auth and client"
                hint = named if wrong else "is the server running, and is the url right?"
                why = (error.__cause__ or error) if str(error) else f"no answer in {patience:g} s"
                raise BrokerUnavailable(f"cannot reach {link.address}: {why}", hint=hint) from error
            last = loop.time() > deadline  # if it was this host that stood still, one more try tells
            await asyncio.sleep(0.1)
    version = tuple(int(part) for part in info.get("redis_version", "0").split(".")[:2])
    if version < (6, 2):
        raise BrokerError(f"{link.address} is Redis {info.get('redis_version')}", hint="6.2 is the oldest that works")
    return version


adapter = RedisAdapter()
