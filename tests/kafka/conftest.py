"""`rig`: the conformance suite's rig on Kafka alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.driver_kafka import KafkaDriver
from tests.conformance.rig import Rig
from tests.servers.kafka import KafkaServer


@pytest.fixture
def rig(kafka_server: KafkaServer, tmp_path: Path) -> Rig:
    return Rig(KafkaDriver(kafka_server), tmp_path)
