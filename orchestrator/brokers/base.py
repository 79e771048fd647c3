"""The adapter Protocol: what a broker package implements, and the plain data that crosses the border.

Read top to bottom: capabilities, an event on its way in, an event on its way out, then the five Protocols
(Adapter, Connection, Consumer, Producer, Sink). The docstrings are the contract; tests/conformance checks them on
every broker.

Threads: everything is called from the event loop that opened the connection, except Consumer.keep_alive.
Errors: methods raise only the tree of orchestrator.errors; a client library's exception never crosses the border.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Literal, Protocol

from orchestrator.topology.model import Broker, Channel, Subscription, Topology

#: Called once when an asynchronous step has ended: None for done, else why not. Called in the event loop, possibly
#: before the method that took it returns.
Done = Callable[[BaseException | None], None]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this broker can be held to; read by lint, by `plan` and by the conformance suite.

    A False here is printed as a warning when a topology asks for it, and skips the suite's check by name.
    """

    kind: str
    lease: float  # seconds until an unsettled delivery of a vanished worker may run elsewhere
    atomic_settle: bool  # outputs and settlement take effect together
    max_events: bool = True  # retention.max_events
    overflow_reject: bool = True  # overflow: reject
    publish_dedup: bool = True  # dedup_window at publish (otherwise: at each subscription)
    partitions: bool = False  # partitions: > 1 has a meaning
    delayed_publish: bool = True  # ctx.publish(delay=)
    key_order: bool = False  # partitions by the channel's key
    frees_on_settle: bool = True  # a queue's space comes back when an event is settled
    overlap: bool = True  # at a replacement the new worker may consume while the old one drains
    notes: tuple[str, ...] = ()  # one sentence each: what `plan` says of this broker's limits


# --- an event on its way in -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class History:
    """What has happened to one event in one subscription: kept by the broker until the event is settled.

    Changed only by worker.policy; adapters store and return it, unread but for `not_before`. A fresh event has
    History(). Times are Unix seconds.
    """

    attempts: int = 0  # runs that count: they failed, timed out, or crashed while running alone
    strikes: int = 0  # crashes with neighbours in flight: blamed on nobody until it has run alone
    alone: bool = False  # the next run must have the worker to itself
    open: bool = False  # a run was marked as started and its end was never heard of
    first_failed_at: float = 0.0
    last_failed_at: float = 0.0
    not_before: float = 0.0  # waiting for its retry until then
    error: str = ""  # "type: message" of the last failure, shortened

    def encode(self) -> bytes:
        """Compact JSON of what differs from a fresh history."""
        fresh = asdict(History())
        return json.dumps({k: v for k, v in asdict(self).items() if v != fresh[k]}, separators=(",", ":")).encode()

    def rest(self, now: float) -> float:
        """Seconds until it may run; 0 when its failure lies ahead of `now`: the clock was set back, and waiting for the
        old time would take as long as the jump."""
        return 0.0 if self.last_failed_at > now + 1 else max(0.0, self.not_before - now)

    @classmethod
    def decode(cls, data: bytes) -> History:
        """Unknown keys (from a newer version) are ignored. Raises ValueError when the bytes are not ours."""
        raw = json.loads(data)
        return cls(**{k: v for k, v in raw.items() if k in cls.__dataclass_fields__})


FRESH = History()


class Delivery:
    """One event handed to a worker, not settled yet. Adapters may subclass it to carry what settling needs."""

    __slots__ = (
        "body",
        "channel",
        "event_type",
        "headers",
        "history",
        "position",
        "redelivered",
        "time",
        "token",
    )

    def __init__(
        self,
        *,
        body: bytes,
        headers: Mapping[str, str],
        event_type: str | None,
        channel: str,
        position: str,
        token: bytes,
        time: float = 0.0,
        redelivered: bool = False,
        history: History = FRESH,
    ) -> None:
        self.body = body  # as stored, undecoded
        self.headers = headers  # bytes that are not UTF-8 are surrogate-escaped; mechanics of ours are removed
        self.event_type = event_type  # what the transport says (subject, header, field); the body wins
        self.channel = channel  # the channel's name in the topology
        self.position = position  # "<address>:<place>": the same for each delivery of this event, for good
        self.token = token  # lets a successor give it back (Consumer.recover); at most 400 bytes
        self.time = time  # when the broker stored it
        self.redelivered = redelivered  # handed out before, and history does not account for that run
        self.history = history


class Ended(StrEnum):
    """How far a dead worker had got with a delivery, from its journal."""

    STARTED = "started"  # running beside others
    STARTED_ALONE = "started_alone"
    BLAMED = "blamed"  # known culprit: it would not stop at its timeout
    RETURNED = "returned"  # the handler had returned; settling had not been confirmed


@dataclass(frozen=True, slots=True)
class Left:
    """A delivery that a dead worker left behind."""

    token: bytes
    ended: Ended


class Sink(Protocol):
    """The worker's side of a consumer. All calls come from the event loop."""

    def deliver(self, deliveries: Sequence[Delivery]) -> None:
        """At most as many as the free slots last told by Consumer.demand, less what was delivered since."""

    def revoked(self, deliveries: Sequence[Delivery]) -> None:
        """These are no longer ours (rebalanced, fenced): unstarted ones are dropped, running ones are cancelled or
        end without being settled."""

    def trouble(self, reason: str | None) -> None:
        """Consumption is not working, and why ("not connected", "stream TASKS was deleted"); None when it is again.
        Shown by `status` within seconds."""

    def alarm(self, message: str) -> None:
        """Something was lost or healed that a person must know ("12 unread events were trimmed from TASKS")."""

    def on_crash(self, history: History, ended: Ended) -> History:
        """What a crash does to a history: worker.policy decides, Consumer.recover stores what this returns."""


class Consumer(Protocol):
    """One agent's reading of one channel, and of its own redrives. Made by Connection.consumer; not shared."""

    async def open(self, sink: Sink) -> None:
        """Starts consuming; nothing is fetched before the first demand(). Raises ResourceMissing when `apply` has not
        made the subscription, BrokerUnavailable when not reachable. After that it reconnects for ever, telling
        sink.trouble, and heals what was deleted from outside, telling sink.alarm."""

    def demand(self, free: int) -> None:
        """The worker has `free` slots now. Never more than that many are fetched and undelivered, so no event waits
        in a buffer of ours while another replica is idle. 0 stops fetching; cheap enough to call for each event."""

    def settle(self, delivery: Delivery, outputs: Sequence[Outgoing], done: Done) -> None:
        """Publishes `outputs` (all on this broker), then settles. Settled only after each output is confirmed; in
        one step where capabilities.atomic_settle. An output that is refused leaves the delivery unsettled and is
        reported to `done` (PublishRejected); a lost connection is retried inside, with the same message ids, until
        it works or the delivery was revoked (then done(BrokerUnavailable)). Calls are coalesced.
        An event in a queue is gone after this; its history is forgotten. `done(None)` says that the worker is needed no
        more: it is settled, or will be within milliseconds, and at the latest when close() returns. Should the process
        or the partition be lost in between, the event runs again, and its outputs have the same message ids."""

    def retry(self, delivery: Delivery, history: History, delay: float, done: Done) -> None:
        """Stores `history` and hands the event out again, to any replica, after `delay` seconds (0: at once). Waiting
        holds no slot and blocks no neighbour, whatever the number waiting; it survives a restart of worker and broker.
        When the broker brings it back too early, the adapter itself waits for history.not_before."""

    def mark(self, delivery: Delivery, history: History, done: Done) -> None:
        """Stores `history` durably without settling; done before the handler starts. For redelivered events only."""

    def release(self, deliveries: Sequence[Delivery]) -> None:
        """Gives back what was never started, at once and uncounted: its next delivery is not `redelivered`
        where the broker lets us know that."""

    async def recover(self, left: Sequence[Left]) -> None:
        """Called after open() and before the first demand(), with what a dead predecessor in this slot left behind:
        for each that is still unsettled, history = sink.on_crash(history, ended) is stored, then it is given back at
        once; of RETURNED only a mark is taken back. Unknown or settled tokens are ignored."""

    def keep_alive(self) -> None:
        """Extends the lease of everything delivered and unsettled. Called from another thread, about every lease/3
        seconds, only while the event loop is blocked; it may block and uses a connection of its own. While the loop
        runs, the adapter extends leases itself."""

    async def drain(self) -> None:
        """Stops fetching and gives back what was fetched but not delivered. Settling still works."""

    async def close(self) -> None:
        """Ends. What is unsettled is given back at once where the broker can."""


# --- an event on its way out ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Outgoing:
    """One message to publish. `body` and `headers` are final; the adapter adds only what its wire format asks."""

    channel: Channel
    body: bytes
    event_type: str
    event_id: str
    source_agent: str
    correlation_id: str
    key: str = ""
    headers: dict[str, str] = field(default_factory=dict)  # traceparent, reply-to, dlq-*, a dead letter's originals
    message_id: str = ""  # what dedup goes by; the event_id unless it says otherwise
    delay: float = 0.0  # seconds until readers may see it

    def __post_init__(self) -> None:
        self.message_id = self.message_id or self.event_id


class Producer(Protocol):
    """Confirmed publishing on one broker, coalesced over all callers of this process."""

    def send(self, message: Outgoing, done: Done) -> None:
        """Queues `message`; done(None) when the broker has confirmed it. While the connection is down it is kept and
        sent again with the same message_id; done(PublishRejected) when the broker refuses it (full, too large),
        done(BrokerUnavailable) when close() comes first. Within the channel's dedup_window the same message_id takes
        effect once. Raises PublishRejected at once for subjects or headers that the wire cannot carry safely."""

    @property
    def ready(self) -> bool:
        """False while so much is unconfirmed that a caller should wait; checked before each send."""

    async def wait_ready(self) -> None:
        """Returns when `ready` is True again."""

    def reply(self, address: str, message: Outgoing, done: Done) -> None:
        """Sends a reply to a `reply-to` address made by some Connection.replies(). Not routed, not deduplicated."""


# --- resources ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ResourceId:
    """`name` is the broker's own: "TASK_EVENTS", "TASK_EVENTS/content-research"."""

    broker: str
    kind: Literal["channel", "subscription", "internal"]
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


Setting = str | int | float | bool | None | tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Desired:
    """A resource that the topology asks for. `settings` uses the broker's own terms ("max_age", "num_partitions")
    and names only what we manage; `where` is the YAML path that asks for it, `origins` those of single settings."""

    id: ResourceId
    settings: Mapping[str, Setting]
    where: tuple[str, ...]
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    external: bool = False  # must exist, is never changed
    protect: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """A resource that exists. `owner` is the topology in its label, None when nobody labelled it. `version` changes
    whenever the resource is replaced or changed, so that an executor can refuse to act on a stale plan."""

    id: ResourceId
    settings: Mapping[str, Setting]
    owner: str | None
    version: str = ""
    events: int = 0  # channel: stored; subscription: not yet settled (waiting, in flight, delayed)
    bytes: int = 0
    exact: bool = True  # False: events is an upper bound
    protect: bool = False  # the label says so, though the file may no longer name it
    blocks: tuple[ResourceId, ...] = ()  # wanted, and cannot be made beside this one (NATS: overlapping subjects)


class Allowed(StrEnum):
    YES = "yes"
    REPLACE = "replace"  # the broker cannot change it in place; deleting and creating it loses what it holds
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What changing one setting means on this broker."""

    allowed: Allowed = Allowed.YES
    loses: str = ""  # "events older than 1d": named on the plan; needs --allow-loss when events are there
    why: str = ""  # the broker's reason, for REPLACE and NEVER


@dataclass(frozen=True, slots=True)
class Lag:
    """One subscription's backlog. -1 where a number cannot be had."""

    waiting: int = 0  # stored and never handed out
    in_flight: int = 0
    delayed: int = 0  # waiting for a retry
    oldest_s: float = 0.0  # age of the oldest unsettled event
    unread_lost: int = 0  # trimmed before it was read, since creation


@dataclass(frozen=True, slots=True)
class Stored:
    """An event as it lies in a channel; read without touching any subscription."""

    position: str
    body: bytes
    headers: Mapping[str, str]
    event_type: str | None
    time: float


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of `doctor`."""

    name: str
    value: str
    level: Literal["ok", "warning", "error"] = "ok"
    hint: str = ""


Start = Literal["earliest", "latest"] | datetime


class Connection(Protocol):
    """One connection (or a few) to one broker, for one topology."""

    async def cluster_id(self) -> str:
        """The broker's own identity, compared with `cluster_id:` before anything is changed."""

    # reconcile
    async def observe(self, desired: Sequence[Desired]) -> list[Observed]:
        """Everything in `desired` that exists, and all else on the broker that bears this topology's label, or is in
        the way of something in `desired` (Observed.blocks)."""

    async def create(self, desired: Desired) -> None:
        """Creates and labels. Doing it twice is harmless. Raises RefusedError when it exists and is not ours."""

    async def update(self, desired: Desired, observed: Observed) -> None:
        """Changes in place what differs; settings that we do not manage stay as they are."""

    async def delete(self, observed: Observed) -> None:
        """Deletes only while label and `version` are as observed; raises RefusedError otherwise. Absent is fine."""

    # events
    def producer(self) -> Producer: ...

    def consumer(self, subscription: Subscription, *, slot: str) -> Consumer:
        """`slot` ("research.0") is stable over restarts of that worker: a name for leases and static membership."""

    async def replies(self, receive: Callable[[bytes, Mapping[str, str]], None]) -> str:
        """Opens this process's reply inbox and returns its address for `reply-to`."""

    # operate
    def browse(
        self,
        channel: Channel,
        *,
        start: Start,
        follow: bool = False,
        events: Sequence[str] = (),
        dead_letters: bool = False,
    ) -> AsyncIterator[Stored]:
        """Reads in order without disturbing any subscription; ends at the present end unless `follow`."""

    async def remove(self, channel: Channel, positions: Sequence[str]) -> int:
        """Deletes single events (`dlq purge`, after a redrive); returns how many were there. Kafka cannot delete one
        record: it remembers them as removed and browse() leaves them out."""

    async def redrive(self, subscription: Subscription, message: Outgoing) -> None:
        """Hands `message` to this subscription alone, with a fresh history, past any dedup; confirmed on return."""

    async def lag(self, subscriptions: Sequence[Subscription]) -> Mapping[tuple[str, str], Lag]:
        """By (agent, channel)."""

    async def seek(self, subscription: Subscription, start: Start) -> None:
        """Moves the position (`replay`); the agent's workers are drained while it is called."""

    async def count(self, channel: Channel) -> int:
        """How many events the channel holds now."""

    async def facts(self) -> list[Fact]:
        """What `doctor` reports: versions, durability as the server's settings give it, clock difference."""

    async def close(self) -> None:
        """Sends what is queued, bounded by a few seconds, and closes."""


class Adapter(Protocol):
    """A broker package's entry point: `adapter` in orchestrator.brokers.<kind>, found by the registry."""

    capabilities: Capabilities

    def desired(self, topology: Topology, broker: Broker) -> list[Desired]:
        """Pure: every resource of this broker that the topology asks for, in order of creation."""

    def judge(self, kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
        """Pure: whether the broker can change `setting` from `old` to `new`, and what is lost by it."""

    async def connect(self, topology: Topology, broker: Broker, *, name: str, patience: float = 5.0) -> Connection:
        """Connects (`name` is shown in the broker's client list). Raises BrokerUnavailable after `patience` seconds,
        with the address without its credentials, and a hint."""
