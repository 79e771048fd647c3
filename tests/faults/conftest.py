"""Servers of a test's own, since each is killed, frozen, emptied or cut off; and sites on them, ended with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import missing
from tests.faults.rig import Site
from tests.servers import kafka, nats, redis
from tests.servers.fresh import Server, fresh_server

KINDS = ("nats", "redis", "kafka")


def serve(kind: str) -> Iterator[Server]:
    if kind == "nats" and nats.find_binary() is None:
        missing("nats-server")
    if kind == "redis" and redis.find_binary() is None:
        missing("redis-server")
    try:
        with fresh_server(kind) as server:
            yield server
    except kafka.Unavailable as reason:
        missing(f"Kafka ({reason})")


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One of each kind in turn; a test that is about some of them parametrises it indirectly."""
    yield from serve(request.param)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes sites in folders of their own; whatever still runs of them when the test ends is killed."""
    made: list[Site] = []

    def make(url: str, **options: Any) -> Site:
        folder = tmp_path / f"site-{len(made)}"
        folder.mkdir()
        made.append(Site(folder, url, **options))
        return made[-1]

    yield make
    for each in made:
        if each.process is not None and each.process.poll() is None:
            rest = psutil.Process(each.process.pid).children(recursive=True)
            each.process.kill()
            each.process.wait()
            for process in rest:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
