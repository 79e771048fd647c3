"""The server's own troubles: killed, frozen, failed over, resharded; and how one gets in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from orchestrator.brokers.redis import adapter
from orchestrator.errors import BrokerUnavailable
from orchestrator.topology.model import Auth, Tls
from tests.conformance.driver_redis import RedisDriver
from tests.conformance.rig import Lab, Rig, elapse, eventually
from tests.servers.certificates import certificate
from tests.servers.redis import RedisServer, Sentinel, free_port


async def test_a_server_killed_under_load_loses_and_doubles_nothing(own_rig: Rig) -> None:
    async with own_rig.lab() as lab:
        reader = await lab.reader(free=16)
        sending = asyncio.gather(lab.send(*[lab.message() for _ in range(600)], within=60))
        futures: list[asyncio.Future[None]] = []
        for round_ in range(3):
            while len(futures) < 200 * (round_ + 1):
                (delivery,) = await reader.take(1)
                futures.append(_settle(reader, lab, delivery))
                reader.demand(16)
            await own_rig.driver.kill_server()
            await own_rig.driver.start_server()
        await asyncio.wait_for(asyncio.gather(sending, *futures), 60)
        assert await lab.connection.count(lab.channel("tasks")) == 0
        done = [stored.body for stored in await lab.stored("events")]
        assert (len(done), len(set(done)), reader.lost) == (600, 600, [])


def _settle(reader: Any, lab: Lab, delivery: Any) -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    output = lab.message(
        "agent.done", channel="events", event_id=f"done:{delivery.position}", body=delivery.position.encode()
    )

    def done(error: BaseException | None) -> None:
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(None)

    reader.consumer.settle(delivery, [output], done)
    return future


async def test_a_frozen_server_stores_a_publish_once(own_rig: Rig) -> None:
    """The client gives up waiting and sends again; the server wakes up and finds both."""
    async with own_rig.lab() as lab:
        await lab.publish()
        own_rig.driver.server.pause()
        sending = asyncio.create_task(lab.send(lab.message()))
        await elapse(6.0)  # longer than the client waits for an answer
        assert not sending.done()
        own_rig.driver.server.resume()
        await sending
        assert await lab.connection.count(lab.channel("tasks")) == 2


async def test_a_delayed_publish_survives_a_killed_server(own_rig: Rig) -> None:
    async with own_rig.lab() as lab:
        reader = await lab.reader(free=1)
        await lab.publish(delay=1.5)
        await own_rig.driver.kill_server()
        await own_rig.driver.start_server()
        assert reader.seen == []
        await reader.take_one()


@asynccontextmanager
async def lab_at(url: str, root: Path, **broker: Any) -> AsyncIterator[Lab]:
    """A lab on a url of another kind than the driver's own."""
    server: Any = type("Elsewhere", (), {"url": url})()
    rig = Rig(RedisDriver(server), root)
    topology = rig.topology({})
    topology = replace(topology, brokers={"main": replace(topology.brokers["main"], **broker)})
    lab = Lab(rig, topology)
    await lab.connect()
    try:
        await lab.apply()
        yield lab
    finally:
        await lab.close()


async def round_trip(lab: Lab) -> None:
    sent = await lab.publish()
    reader = await lab.reader(free=1)
    delivery = await reader.take_one()
    assert delivery.body == sent.body
    await reader.settle(delivery, lab.message("agent.done", channel="events"))
    assert len(await lab.stored("events")) == 1


async def test_a_user_and_password(own_rig: Rig, raw: Any, tmp_path: Path) -> None:
    await raw.acl_setuser("agents", enabled=True, passwords=["+s3cret"], keys=["*"], categories=["+@all"])
    url = own_rig.driver.url
    async with lab_at(url, tmp_path, auth=Auth("plain", username="agents", password="s3cret")) as lab:
        await round_trip(lab)
    async with lab_at(url.replace("//", "//agents:s3cret@"), tmp_path) as lab:
        await round_trip(lab)
    with pytest.raises(BrokerUnavailable, match=r"invalid username-password") as caught:
        async with lab_at(url, tmp_path, auth=Auth("plain", username="agents", password="wr0ng")):
            pass
    assert "wr0ng" not in str(caught.value)


async def test_a_revoked_permission_is_shown_and_heals(own_rig: Rig, raw: Any, tmp_path: Path) -> None:
    await raw.acl_setuser("agents", enabled=True, passwords=["+s3cret"], keys=["*"], categories=["+@all"])
    async with lab_at(own_rig.driver.url, tmp_path, auth=Auth("plain", username="agents", password="s3cret")) as lab:
        reader = await lab.reader(free=1)
        await raw.execute_command("ACL", "SETUSER", "agents", "-xreadgroup")
        await eventually(lambda: reader.troubles and "xreadgroup" in str(reader.troubles[-1]), what="the trouble")
        await raw.execute_command("ACL", "SETUSER", "agents", "+xreadgroup")
        await lab.publish()
        await reader.take_one()
        await eventually(lambda: reader.troubles[-1] is None, what="the end of the trouble")


@pytest.mark.parametrize("right", ["evalsha", "xack"])
async def test_rights_without_which_nothing_is_settled_are_asked_for(
    own_rig: Rig, raw: Any, tmp_path: Path, right: str
) -> None:
    await raw.acl_setuser("agents", enabled=True, passwords=["+s3cret"], keys=["*"], categories=["+@all"])
    async with lab_at(own_rig.driver.url, tmp_path, auth=Auth("plain", username="agents", password="s3cret")) as lab:
        await lab.publish_many(2)
        reader = await lab.reader(free=2)
        plain, writing = await reader.take(2)
        await raw.execute_command("ACL", "SETUSER", "agents", f"-{right}")
        settled = [
            asyncio.create_task(reader.settle(plain)),
            asyncio.create_task(reader.settle(writing, lab.message("agent.done", channel="events"))),
        ]
        await eventually(lambda: reader.troubles and reader.troubles[-1], what="the trouble")
        await elapse(1.0)
        assert reader.troubles[-1] is not None
        assert not any(task.done() for task in settled)
        await raw.execute_command("ACL", "SETUSER", "agents", f"+{right}")
        await asyncio.gather(*settled)
        await eventually(lambda: reader.troubles[-1] is None, what="the end of the trouble")
        assert len(await lab.stored("events")) == 1


async def test_a_host_that_stands_still_while_connecting_still_connects(rig: Rig) -> None:
    """All of the patience passes before this process gets to hear the answer."""
    topology = rig.topology({})
    connecting = asyncio.create_task(rig.adapter.connect(topology, topology.brokers["main"], name="test", patience=0.5))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_soon(time.sleep, 1.0)
    await (await connecting).close()


async def test_nobody_there_is_said_without_the_password(tmp_path: Path) -> None:
    topology = Rig(RedisDriver(_at("redis://agents:s3cret@127.0.0.1:1")), tmp_path).topology({})
    with pytest.raises(BrokerUnavailable) as caught:
        await adapter.connect(topology, topology.brokers["main"], name="test", patience=0.5)
    assert str(caught.value).count("127.0.0.1:1") <= 2  # the url, and what the library could not reach
    assert str(caught.value).count("redis://") == 1
    assert "s3cret" not in str(caught.value)
    assert caught.value.hint


def _at(url: str) -> Any:
    return type("Elsewhere", (), {"url": url})()


@pytest.fixture
async def watched() -> AsyncIterator[tuple[RedisServer, Sentinel]]:
    """A master with a replica in step, and the sentinel that knows both."""
    master = RedisServer().start()
    replica = RedisServer("--replicaof", "127.0.0.1", str(master.port)).start()
    follower: Any = Redis.from_url(replica.url)
    sentinel = Sentinel(master)
    watcher: Any = Redis.from_url(sentinel.url)

    async def in_step() -> bool:
        return bool((await follower.info("replication"))["master_link_status"] == "up")

    async def known() -> bool:
        return int((await watcher.sentinel_master("main"))["num-slaves"]) == 1

    await eventually(in_step, what="a replica in step")
    sentinel.start()
    await eventually(known, within=30, what="a replica that the sentinel knows")
    yield master, sentinel
    for client in (follower, watcher):
        await client.aclose()
    for server in (sentinel, replica, master):
        server.close()


async def test_a_failover_by_sentinel(watched: tuple[RedisServer, Sentinel], tmp_path: Path) -> None:
    master, sentinel = watched
    url = f"redis+sentinel://127.0.0.1:{sentinel.port}/main/0"
    async with lab_at(url, tmp_path) as lab:
        await round_trip(lab)
        reader = lab.readers[0]
        master.kill()
        await lab.send(*[lab.message() for _ in range(10)], within=30)
        reader.demand(10)
        for delivery in await reader.take(10):
            await reader.settle(delivery)
        assert await lab.connection.count(lab.channel("tasks")) == 0


async def test_a_master_that_no_sentinel_names_is_told_in_words(tmp_path: Path) -> None:
    master = RedisServer().start()
    sentinel = Sentinel(master)
    sentinel.start()

    async def reason(service: str, port: int) -> str:
        plan = Rig(RedisDriver(_at(f"redis+sentinel://127.0.0.1:{port}/{service}/0")), tmp_path).topology({})
        with pytest.raises(BrokerUnavailable) as caught:
            await adapter.connect(plan, plan.brokers["main"], name="test", patience=0.5)
        assert caught.value.hint
        return caught.value.message.partition("/0: ")[2]

    try:
        assert await reason("mian", sentinel.port) == "the sentinels know no master mian, only main"
        assert await reason("main", free_port()) == "no sentinel answers that knows a master"
        master.kill()

        async def noticed() -> bool:
            return await reason("main", sentinel.port) == "the sentinels say that the master main is down"

        await eventually(noticed, what="a sentinel that says so")
    finally:
        for server in (sentinel, master):
            server.close()


@pytest.fixture
async def cluster() -> AsyncIterator[list[RedisServer]]:
    """Two masters that share the slots."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
    servers = [RedisServer(*options).start() for _ in range(2)]
    clients: list[Any] = [Redis.from_url(server.url) for server in servers]
    await clients[0].execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    await clients[1].execute_command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    await clients[0].execute_command("CLUSTER", "SET-CONFIG-EPOCH", 1)
    await clients[1].execute_command("CLUSTER", "SET-CONFIG-EPOCH", 2)
    await clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", servers[1].port)

    async def ready() -> bool:
        found = [await client.execute_command("CLUSTER", "INFO") for client in clients]
        return all(b"cluster_state:ok" in state and b"cluster_known_nodes:2" in state for state in found)

    await eventually(ready, what="a cluster")
    yield servers
    for client in clients:
        await client.aclose()
    for server in servers:
        server.close()


async def test_a_cluster(cluster: list[RedisServer], tmp_path: Path) -> None:
    """One topology's streams share a slot; another's outputs go elsewhere and are there before the event is settled."""
    url = f"redis+cluster://127.0.0.1:{cluster[0].port},127.0.0.1:{cluster[1].port}"
    async with lab_at(url, tmp_path) as lab:
        await round_trip(lab)
        other = replace(lab.channel("events"), name="far", address="far-away")
        topology = replace(lab.topology, channels={**lab.topology.channels, "far": other}, agents={})
        connection = await lab.connect(topology)
        for desired in lab.rig.adapter.desired(topology, lab.broker):
            await connection.create(desired)
        link = connection.link  # type: ignore[attr-defined]
        assert link.slot("far-away") != link.slot(lab.channel("tasks").address)
        await lab.publish()
        reader = lab.readers[0]
        reader.demand(1)
        far = lab.message("agent.done", channel="events")
        far.channel = other
        await reader.settle(await reader.take_one(), far)
        found = [stored async for stored in connection.browse(other, start="earliest")]
        assert [stored.body for stored in found] == [far.body]
        for observed in await connection.observe(lab.rig.adapter.desired(topology, lab.broker)):
            if observed.id.name == "far-away":
                await connection.delete(observed)


async def test_a_cluster_that_does_not_know_its_own_address(cluster: list[RedisServer], tmp_path: Path) -> None:
    for server in cluster:
        client: Any = Redis.from_url(server.url)
        await client.config_set("cluster-preferred-endpoint-type", "unknown-endpoint")
        await client.aclose()
    async with lab_at(f"redis+cluster://127.0.0.1:{cluster[1].port}", tmp_path) as lab:
        await round_trip(lab)


async def test_tls_with_certificates_on_both_sides(tmp_path: Path) -> None:
    pair = certificate(tmp_path, "both")
    port, files = free_port(), {"cert": str(pair.cert), "key": str(pair.key)}
    options = ("--tls-cert-file", str(pair.cert), "--tls-key-file", str(pair.key), "--tls-ca-cert-file", str(pair.cert))
    server = RedisServer("--tls-port", str(port), *options).start()
    try:
        async with lab_at(f"rediss://127.0.0.1:{port}", tmp_path, tls=Tls(ca=str(pair.cert), **files)) as lab:
            await round_trip(lab)
        with pytest.raises(BrokerUnavailable, match="certificate verify failed"):
            async with lab_at(f"rediss://127.0.0.1:{port}", tmp_path, tls=Tls(**files)) as lab:
                pass
    finally:
        server.close()
