"""Who owns what on the cluster (walk "apply"): a compacted topic of resource name -> owner and topic id."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from confluent_kafka import OFFSET_BEGINNING, KafkaError, TopicPartition
from confluent_kafka import Consumer as RawConsumer
from confluent_kafka import Producer as RawProducer

from orchestrator.brokers.kafka import client
from orchestrator.errors import BrokerUnavailable, ResourceMissing

_PATIENCE = 10.0


class Registry:
    """The compacted topic of ownership, read whole and kept up to date. Blocking: called in threads."""

    def __init__(self, config: Mapping[str, Any], topic: str) -> None:
        self._config, self._topic = config, topic
        self._lock = threading.Lock()
        self._entries: dict[str, dict[str, Any]] = {}
        self._at = 0
        self._reader: RawConsumer | None = None
        self._writer: RawProducer | None = None

    def read(self) -> dict[str, dict[str, Any]]:
        """Everything that is registered now; nothing when the registry was never made."""
        with self._lock:
            place = TopicPartition(self._topic, 0)
            if self._reader is None:
                self._reader = RawConsumer(
                    client.for_consumer(self._config, group_id="orchestrator", fetch_wait_max_ms=10)
                )
                self._reader.assign([TopicPartition(self._topic, 0, OFFSET_BEGINNING)])
            try:
                end = client.end_of(self._reader, place)
            except ResourceMissing:
                return {}
            while self._at < end:
                for message in client.fetch(self._reader, 500, 0.5):
                    self._at = max(self._at, (message.offset() or 0) + (message.error() is None))
                    if message.error() is None and (key := message.key()) is not None:
                        if (value := message.value()) is None:
                            self._entries.pop(key.decode(), None)
                        else:
                            self._entries[key.decode()] = json.loads(value)
            return dict(self._entries)

    def write(self, key: str, entry: Mapping[str, Any] | None) -> None:
        reports: list[KafkaError | None] = []
        value = None if entry is None else json.dumps(entry).encode()
        with self._lock:
            if self._writer is None:
                # An idempotent producer would take half a second to begin; one write at a time needs none.
                self._writer = RawProducer(client.for_producer(self._config, enable_idempotence=False))
            self._writer.produce(self._topic, value, key, on_delivery=lambda error, _: reports.append(error))
            self._writer.flush(_PATIENCE)
        if not reports:
            raise BrokerUnavailable("the registry of owners does not answer", hint="is the broker in good health?")
        if (error := reports[0]) is not None:
            raise client.translate(error, "registering an owner")

    def close(self) -> None:
        with self._lock:
            if self._reader is not None:
                self._reader.close()
            self._reader = self._writer = None
