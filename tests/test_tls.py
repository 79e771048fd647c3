"""Brokers that talk TLS only and ask for the client's certificate: `tls:` of a topology is all that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import missing
from tests.faults.rig import TOPOLOGY, Site
from tests.servers import kafka, nats, redis
from tests.servers.certificates import Certificate, certificate
from tests.servers.ports import free_port


@pytest.fixture
def ours(tmp_path: Path) -> Certificate:
    return certificate(tmp_path, "ours")


@pytest.fixture(params=["nats", "redis", "kafka"])
def url(request: pytest.FixtureRequest, ours: Certificate) -> Iterator[str]:
    """Of a server that trusts `ours` and nobody else."""
    cert, key = str(ours.cert), str(ours.key)
    if request.param == "nats":
        if nats.find_binary() is None:
            missing("nats-server")
        files = f'cert_file: "{cert}", key_file: "{key}", ca_file: "{cert}", verify: true'
        nats_server = nats.NatsServer(f"tls {{ {files} }}").start()
        yield nats_server.url.replace("nats:", "tls:")
        nats_server.close()
    elif request.param == "redis":
        if redis.find_binary() is None:
            missing("redis-server")
        port = free_port()
        files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert]
        redis_server = redis.RedisServer("--tls-port", str(port), *files).start()
        yield f"rediss://127.0.0.1:{port}"
        redis_server.close()
    else:
        try:
            kafka_server = kafka.KafkaServer(tls=ours)
            kafka_server.start()
        except kafka.Unavailable as reason:
            missing(f"Kafka ({reason})")
        yield kafka_server.tls_url
        kafka_server.stop()


def topology(tls: str) -> str:
    return TOPOLOGY.replace('url: "{url}"', f'url: "{{url}}", tls: {tls}')


async def test_a_topology_lives_on_tls_with_a_client_certificate(url: str, ours: Certificate, tmp_path: Path) -> None:
    tls = f"{{{{ca: {ours.cert}, cert: {ours.cert}, key: {ours.key}}}}}"
    site = Site(tmp_path, url, topology=topology(tls))
    await site.start()
    try:
        await site.publish(range(20))
        await site.all_handled(20)
        assert set(site.outputs()) == set(range(20))
    finally:
        assert await site.stop() == 0


async def test_without_the_certificate_or_with_another_authority_it_is_refused_with_a_hint(
    url: str, ours: Certificate, tmp_path: Path
) -> None:
    other = certificate(tmp_path, "other")
    for tls in (f"{{{{ca: {ours.cert}}}}}", f"{{{{ca: {other.cert}, cert: {ours.cert}, key: {ours.key}}}}}"):
        site = Site(tmp_path, url, topology=topology(tls))
        done = site.run("plan")
        assert done.returncode == 1, done.stderr
        assert "brokers.main.tls" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
