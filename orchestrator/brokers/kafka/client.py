"""What every Kafka client of ours shares: configuration, names, headers, errors.

Clients and threads are made when a connection is opened, never at import: they do not survive a fork.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition, admin

from orchestrator.brokers.base import Outgoing
from orchestrator.errors import BrokerError, BrokerUnavailable, OrchestratorError, PublishRejected, ResourceMissing
from orchestrator.topology.model import Broker, Subscription, Topology

#: Headers of ours that a handler never sees.
EVENT_ID, HISTORY, DUE, ORIGIN, STORED = "orc-id", "orc-history", "orc-due", "orc-origin", "orc-stored"
#: Of a record that is nothing but the end of a transaction; see Mover.heal.
NOTHING = "orc-nothing"
MECHANICS = frozenset((EVENT_ID, HISTORY, DUE, ORIGIN, STORED, NOTHING))
_NAMED = frozenset(("event-type", "source-agent", "correlation-id", EVENT_ID))

Headers = list[tuple[str, str | bytes | None]]

#: confluent_kafka.admin is typed, but keeps most of its names from type checkers.
admin_api: Any = admin

_CALLBACKS = ("error_cb", "on_commit")
_CONSUMER_ONLY = re.compile(r"^(session|heartbeat|max\.poll|fetch|group|queued|auto|isolation|partition)\.")
_PRODUCER_ONLY = re.compile(r"^(acks|linger\.|batch\.|compression|message\.timeout|queue\.buffering|transaction)")
GONE = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)
_REFUSED = (
    KafkaError.INVALID_RECORD,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.POLICY_VIOLATION,
    KafkaError.INVALID_TIMESTAMP,
    KafkaError.RECORD_LIST_TOO_LARGE,
)
#: A leader or coordinator is being found; said for a moment after a start and after a creation.
TRANSIENT = (
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.LEADER_NOT_AVAILABLE,
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
    KafkaError.NOT_CONTROLLER,
    KafkaError._TIMED_OUT,
    KafkaError._TRANSPORT,
)
#: This client will not work again: another has its group.instance.id, or the broker believes so.
FATAL = (KafkaError._FATAL, KafkaError._FENCED, KafkaError.FENCED_INSTANCE_ID)
TOO_LARGE = (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.INVALID_MSG_SIZE)

T = TypeVar("T")

log = logging.getLogger("orchestrator.kafka")
# The client repeats each second that it cannot connect; Sink.trouble says it once.
log.addFilter(lambda record: not record.getMessage().startswith("FAIL "))


# --- names ----------------------------------------------------------------------------------------------------


def retry_topic(subscription: Subscription) -> str:
    """Where the events of one subscription wait for their retry."""
    return re.sub(r"[^a-zA-Z0-9._-]", "_", f"{subscription.group}.retry.{subscription.channel}")[:249]


def reply_topic(topology: Topology, broker: Broker) -> str:
    return f"{broker.prefix}{topology.name}-replies"


def registry_topic(broker: Broker) -> str:
    """Who owns what; shared by the topologies of one prefix."""
    return f"{broker.prefix}orchestrator-registry"


# --- configuration --------------------------------------------------------------------------------------------


def configuration(broker: Broker, name: str) -> dict[str, Any]:
    """What all clients of `broker` need. Raises OrchestratorError for what cannot be."""
    config: dict[str, Any] = {
        "bootstrap.servers": address(broker),
        "client.id": name,
        "logger": log,
        "socket.timeout.ms": 10_000,
        "socket.connection.setup.timeout.ms": 5_000,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1_000,
        "topic.metadata.refresh.interval.ms": 5_000,
        "topic.metadata.propagation.max.ms": 3_000,
    }
    if broker.auth is not None:
        if broker.auth.mechanism not in ("plain", "scram-sha-256", "scram-sha-512"):
            raise OrchestratorError(
                f"Kafka has no auth mechanism {broker.auth.mechanism!r}",
                hint="use plain, scram-sha-256 or scram-sha-512",
            )
        config["sasl.mechanism"] = broker.auth.mechanism.upper()
        config["sasl.username"] = broker.auth.username or ""
        config["sasl.password"] = broker.auth.password or ""
    if "logger" in broker.client:
        raise OrchestratorError(f"brokers.{broker.name}.client.logger takes no value from a file", hint="leave it out")
    if broker.tls is not None:
        files = {"ssl.ca": broker.tls.ca, "ssl.certificate": broker.tls.cert, "ssl.key": broker.tls.key}
        config |= {f"{key}.location": path for key, path in files.items() if path}
    secured = ("SASL_" if broker.auth else "") + ("SSL" if broker.tls else "PLAINTEXT")
    return config | {"security.protocol": secured} | dict(broker.client)


def address(broker: Broker) -> str:
    """host:port,… without credentials."""
    return broker.url.partition("://")[2].rpartition("@")[2].split("/")[0]


def for_producer(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Idempotent, confirmed by all replicas, kept until confirmed, and partitioned as Java clients do."""
    ours = {
        "enable.idempotence": True,
        "acks": "all",
        "linger.ms": 0.2,  # at 0 each message wakes the sending thread, which costs twice the whole rest
        "message.timeout.ms": 0,
        "message.max.bytes": 64 << 20,  # the broker decides what is too large
        "partitioner": "murmur2_random",
        "retry.backoff.ms": 50,
    }
    given = {key: value for key, value in config.items() if not _CONSUMER_ONLY.match(key)}
    return ours | given | {k if k in _CALLBACKS else k.replace("_", "."): v for k, v in more.items()}


def for_consumer(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Commits nothing by itself, jumps nowhere by itself, sees only what is committed."""
    ours = {
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        "session.timeout.ms": 6_000,
        "auto.offset.reset": "error",
        "isolation.level": "read_committed",
        "enable.partition.eof": True,
        "fetch.wait.max.ms": 100,  # a partition that is added to a fetch waits for the one under way
        "queued.min.messages": 10_000,
        "queued.max.messages.kbytes": 16 << 10,
        "fetch.error.backoff.ms": 50,
        "fetch.queue.backoff.ms": 10,
    }
    given = {key: value for key, value in config.items() if not _PRODUCER_ONLY.match(key)}
    return ours | given | {k if k in _CALLBACKS else k.replace("_", "."): v for k, v in more.items()}


def new_admin(config: Mapping[str, Any]) -> admin.AdminClient:
    """Answers within seconds or fails: somebody waits, and what failed is asked once more."""
    given = {k: v for k, v in config.items() if not _CONSUMER_ONLY.match(k) and not _PRODUCER_ONLY.match(k)}
    return admin.AdminClient(given | {"socket.timeout.ms": 4_000})


def fetch(reader: RawConsumer, count: int, timeout: float) -> list[Message]:
    """Up to `count` messages as soon as there is one; consume() by itself would wait until all are there."""
    first = reader.poll(timeout)
    if first is None:
        return []
    return [first, *reader.consume(count, 0)] if count else [first]


def settled(ask: Callable[[], T], what: str) -> T:
    """What `ask` answers, asked again for a while when the cluster is electing somebody. Raises BrokerError."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return ask()
        except KafkaException as error:
            found = error_of(error)
            if found is None or found.code() not in TRANSIENT or time.monotonic() > deadline:
                raise translate(error, what) from None
            time.sleep(0.1)


def end_of(reader: RawConsumer, place: TopicPartition) -> int:
    """The next offset of a partition. Raises BrokerError."""
    return int(settled(lambda: reader.get_watermark_offsets(place, timeout=5)[1], f"reading {place.topic}"))


# --- headers and errors ---------------------------------------------------------------------------------------


@lru_cache(1024)
def _constant(event_type: str, source_agent: str) -> Headers:
    return [("event-type", _encode(event_type)), ("source-agent", _encode(source_agent))]


def _encode(value: str) -> bytes:
    """As bytes: of text the client takes only what stands before a NUL."""
    return value.encode("utf-8", "surrogateescape")


def headers_of(message: Outgoing) -> Headers:
    """The wire headers of the contract, then the message's own (a dead letter keeps its originals)."""
    found: Headers = [
        *_constant(message.event_type, message.source_agent),
        ("correlation-id", message.correlation_id.encode("utf-8", "surrogateescape")),
        (EVENT_ID, message.message_id.encode("utf-8", "surrogateescape")),
    ]
    if own := message.headers:
        if not _NAMED.isdisjoint(own):
            found = [header for header in found if header[0] not in own]
        for name, value in own.items():
            found.append((name, value.encode("utf-8", "surrogateescape")))
    return found


def text(value: Any) -> str:
    """A header's value; bytes that are not UTF-8 are surrogate-escaped."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value or ""


def pairs(message: Message) -> Sequence[tuple[str, Any]]:
    """The headers as they are."""
    found: Any = message.headers()
    return found or ()


def readable(message: Message) -> dict[str, str]:
    """The headers as text."""
    return {name: text(value) for name, value in pairs(message)}


def require_safe(message: Outgoing) -> None:
    """Raises PublishRejected for header names that would be cut short on the wire, and for a delay."""
    if message.delay > 0:
        raise PublishRejected(
            "Kafka cannot hold an event back until later", hint="publish it when it is due, or use NATS or Redis"
        )
    for name in message.headers:
        if name != "traceparent" and (not name or "\0" in name or name in MECHANICS):
            raise PublishRejected(f"the header name {name!r} cannot be sent", hint="rename the header")


def limit_of(size: int) -> int:
    """What a broker would take of a body that was too large: it does not say, so this is its default, or half."""
    return min(1_000_000, size // 2)


def error_of(error: BaseException) -> KafkaError | None:
    return error.args[0] if isinstance(error, KafkaException) and isinstance(error.args[0], KafkaError) else None


def translate(error: KafkaError | BaseException, what: str, size: int = 0) -> BrokerError:
    """The same failure in our own tree; `size` is that of the body in question."""
    if isinstance(error, BrokerError):
        return error
    found = error if isinstance(error, KafkaError) else error_of(error)
    if found is None:
        return BrokerError(f"{what}: {error}")
    code, text = found.code(), f"{what}: {found.str()}"
    if code in TOO_LARGE:
        hint = "make the payload smaller, or raise the topic's max.message.bytes"
        return PublishRejected(text, hint=hint, limit=limit_of(size))
    if code in _REFUSED:
        return PublishRejected(text, hint="ask the broker's administrator for write access to the topic")
    if code in GONE:
        return ResourceMissing(text, hint="run `orchestrator apply`")
    if code in (KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError._AUTHENTICATION):
        return BrokerUnavailable(text, hint="check the broker's auth: in the topology")
    if code in (KafkaError._INVALID_ARG, KafkaError._SSL):
        return BrokerError(text, hint="check client: and tls: of the broker in the topology")
    return BrokerUnavailable(text, hint="is the broker running and reachable?")
