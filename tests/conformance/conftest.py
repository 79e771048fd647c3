"""The one fixture of this suite: `rig`, over every broker that the list below names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.patience import PATIENCE

from .drivers import Driver, driver_class
from .rig import Rig

#: Every adapter of the package. A machine without one of the servers skips that column loudly; in CI it fails.
BROKERS = ["memory", "nats", "redis", "kafka"]

#: Fixture of tests/conftest.py that gives each broker's server; memory has none.
SERVERS = {"nats": "nats_server", "redis": "redis_server", "kafka": "kafka_server"}


@pytest.fixture(params=BROKERS)
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    kind: str = request.param
    found = driver_class(kind)(request.getfixturevalue(SERVERS[kind]) if kind in SERVERS else None)
    yield found
    found.end()


@pytest.fixture
def rig(driver: Driver, tmp_path: Path) -> Rig:
    return Rig(driver, tmp_path)


@pytest.fixture
def short_lease(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> float:
    """Vanished consumers are given up after this many seconds, in this test; resources made later know it too."""
    for constant in rig.driver.lease_constants:
        monkeypatch.setattr(constant.replace(":", "."), rig.driver.short_lease)
    return rig.driver.short_lease


@pytest.fixture
def lasting_lease(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes while a test has patience does not come because a lease has ended."""
    for constant in rig.driver.lease_constants:
        monkeypatch.setattr(constant.replace(":", "."), 2 * PATIENCE)


@pytest.fixture
def stopwatch() -> Callable[[], float]:
    """Seconds since the test began."""
    begin = time.monotonic()
    return lambda: time.monotonic() - begin
