"""The broker is frozen, cut off, emptied, full or changed by hand while events flow."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import nats
import pytest
import redis as redis_client

from orchestrator import Client
from tests.faults.proxy import Proxy
from tests.faults.rig import TOPOLOGY, Site
from tests.patience import PATIENCE
from tests.servers.fresh import Server

Sites = Callable[..., Site]
TOTAL = 600
both = pytest.mark.parametrize("server", ["nats", "redis"], indirect=True)
on_nats = pytest.mark.parametrize("server", ["nats"], indirect=True)


def through(proxy: Proxy, server: Server) -> str:
    return server.url.replace(str(server.port), str(proxy.port))


async def frozen(server: Server, made: Site, seconds: float) -> None:
    await made.start()
    publishing = asyncio.create_task(made.publish(range(TOTAL), pause=0.003))
    await made.until(lambda: made.handled() > TOTAL // 10, "some handled")
    server.pause()
    began = time.monotonic()
    await made.until(lambda: made.agent()["state"] != "running", "status says that something is wrong")
    assert made.agent()["reason"]
    await asyncio.sleep(max(0.0, seconds - (time.monotonic() - began)))
    server.resume()
    before = made.handled()
    await made.until(lambda: made.handled() > before, "events flow again")
    await publishing
    await made.all_handled(TOTAL)
    assert set(made.outputs()) == set(range(TOTAL))
    assert set(made.outputs().values()) == {1}
    assert made.letters() == []
    await made.until(lambda: made.agent()["state"] == "running", "status says that all is well")
    assert await made.stop() == 0


@both
async def test_frozen_for_some_seconds(server: Server, site: Sites) -> None:
    await frozen(server, site(server.url), 5)


@pytest.mark.soak
async def test_frozen_for_a_minute(server: Server, site: Sites) -> None:
    await frozen(server, site(server.url), 60)


@both
async def test_connections_cut_and_reset_under_load(server: Server, site: Sites) -> None:
    with Proxy(server.port) as proxy:
        made = site(through(proxy, server))
        await made.start()
        publishing = asyncio.create_task(made.publish(range(TOTAL), "slow"))
        for share in range(1, 5):
            await made.until(lambda share=share: made.handled() >= TOTAL * share // 6, "progress")
            proxy.cut(reset=share % 2 == 0)
        await publishing
        await made.all_handled(TOTAL)
        assert proxy.connections > 8
        assert set(made.outputs()) == set(range(TOTAL))
        assert set(made.outputs().values()) == {1}
        assert made.letters() == []
        assert await made.stop() == 0


@both
async def test_a_publish_whose_answer_is_lost_takes_effect_once(server: Server, site: Sites) -> None:
    with Proxy(server.port) as proxy:
        made = site(through(proxy, server))
        assert made.run("apply", "--yes", "--no-workers").returncode == 0
        async with Client(made.folder / "topology.yaml") as client:
            await client.publish("agent.completed", {"n": 0}, event_id="0")
            proxy.mute(True)
            sending = asyncio.gather(
                *(client.publish("agent.completed", {"n": n}, event_id=str(n)) for n in range(1, 9))
            )
            await made.until(lambda: proxy.swallowed, "an answer was lost")
            assert not sending.done()
            proxy.mute(False)
            proxy.cut()
            await asyncio.wait_for(sending, PATIENCE)
        assert made.outputs() == dict.fromkeys(range(9), 1)


@both
async def test_away_for_longer_than_the_clients_own_patience(server: Server, site: Sites) -> None:
    """The client library is told to give up soon; this package goes on all the same."""
    patience = {
        "nats": "{max_reconnect_attempts: 2, reconnect_time_wait: 0.2}",
        "redis": "{socket_connect_timeout: 0.5}",
    }
    kind = server.url.partition(":")[0]
    topology = TOPOLOGY.replace('url: "{url}"', f'url: "{{url}}", client: {{{patience[kind]}}}')
    made = site(server.url, topology=topology)
    await made.start()
    publishing = asyncio.create_task(made.publish(range(TOTAL), pause=0.003))
    await made.until(lambda: made.handled() > TOTAL // 10, "some handled")
    server.kill()
    await asyncio.sleep(6)
    server.start()
    await publishing
    await made.all_handled(TOTAL)
    assert set(made.outputs()) == set(range(TOTAL))
    assert made.letters() == []
    assert await made.stop() == 0


async def delete(server: Server, what: str) -> None:
    """Another client deletes the queue's reading position, or the queue itself."""
    if server.url.startswith("nats"):
        client = await nats.connect(server.url)
        stream = client.jetstream()
        if what == "subscription":
            await stream.delete_consumer("faults-tasks", "faults-worker")
        else:
            await stream.delete_stream("faults-tasks")
        await client.close()
        return
    with redis_client.Redis.from_url(server.url) as client:
        key = "{faults}-tasks"
        assert client.exists(key)
        if what == "subscription":
            (group,) = client.xinfo_groups(key)
            client.xgroup_destroy(key, group["name"])
        else:
            client.delete(key)


@both
@pytest.mark.parametrize("what", ["subscription", "channel"])
async def test_deleted_from_outside_under_load(server: Server, site: Sites, what: str) -> None:
    made = site(server.url)
    await made.start()
    publishing = asyncio.create_task(made.publish(range(TOTAL), pause=0.005))
    await made.until(lambda: made.handled() > TOTAL // 10, "some handled")
    await delete(server, what)
    await publishing
    await made.publish(range(TOTAL, TOTAL + 50))
    await made.until(lambda: set(range(TOTAL, TOTAL + 50)) <= set(made.runs()), "later events are handled")
    if what == "subscription":  # the events themselves were not touched
        await made.until(lambda: made.handled() == TOTAL + 50, "every event is handled")
    await made.until(made.settled, "everything settled")
    agent = made.agent()
    assert agent["alarms"], agent
    await made.until(lambda: made.agent()["state"] == "running", "healthy again")
    assert made.letters() == []
    assert await made.stop() == 0


@both
async def test_a_full_queue_refuses_and_takes_again(server: Server, site: Sites) -> None:
    topology = TOPOLOGY.replace("mode: queue", "mode: queue, retention: {{max_events: 20}}, overflow: reject")
    made = site(server.url, topology=topology)
    assert made.run("apply", "--yes", "--no-workers").returncode == 0
    await made.publish(range(20))
    refused = made.run("publish", "task.assigned", '{"n": 20, "do": "ok"}')
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "→" in refused.stderr, refused.stderr
    await made.start()
    await made.all_handled(20)
    assert made.run("publish", "task.assigned", '{"n": 21, "do": "ok"}').returncode == 0
    await made.all_handled(21)
    assert made.runs() == dict.fromkeys([*range(20), 21], 1)
    assert await made.stop() == 0


@on_nats
async def test_what_was_changed_by_hand_is_shown_by_plan_and_mended_by_apply(server: Server, site: Sites) -> None:
    made = site(server.url)
    assert made.run("apply", "--yes", "--no-workers").returncode == 0
    assert made.run("plan", "--exit-code").returncode == 0
    client = await nats.connect(server.url)
    stream = client.jetstream()
    config = (await stream.stream_info("faults-events")).config
    config.max_age = 600
    await stream.update_stream(config)
    await client.close()
    done = made.run("plan", "--exit-code", "-o", "json")
    assert done.returncode == 3
    (operation,) = json.loads(done.stdout)["operations"]
    changes: list[dict[str, Any]] = operation["changes"]
    assert (operation["action"], operation["name"]) == ("update", "faults-events")
    assert [(c["setting"], c["old"], c["new"]) for c in changes] == [("max_age", 600, 0)]
    assert made.run("apply", "--yes", "--no-workers").returncode == 0
    assert made.run("plan", "--exit-code").returncode == 0


@on_nats
async def test_the_disk_is_full(site: Sites, server: Server) -> None:
    """As the server sees it: its store has no room. Publishers are told; what the agents publish has no room either, so
    nothing is settled or dead, and everything is once the store has been given more."""
    server.close()
    server._config = server._config.replace("jetstream {", "jetstream { max_file_store: 3000000,")  # type: ignore[union-attr]
    os.makedirs(server.home)  # type: ignore[union-attr]
    server.start()
    made = site(server.url)
    assert made.run("apply", "--yes", "--no-workers").returncode == 0
    body = json.dumps({"n": 1, "do": "ok", "blob": "x" * 400_000})
    (made.folder / "big.json").write_text(body)
    answers = [made.run("publish", "task.assigned", "@big.json") for _ in range(9)]
    refused = [done for done in answers if done.returncode]
    taken = len(answers) - len(refused)
    assert refused, "there was room for all"
    assert all("Traceback" not in done.stderr and "error:" in done.stderr for done in refused)
    await made.start()
    await made.until(lambda: made.runs()[1] >= taken, "what had been taken is handled")
    server._config = server._config.replace("max_file_store: 3000000,", "max_file_store: 300000000,")  # type: ignore[union-attr]
    await asyncio.to_thread(server.restart)
    await made.until(made.settled, "all settled", 2 * PATIENCE)
    assert not made.letters(), "no room is nobody's fault"
    assert made.run("publish", "task.assigned", "@big.json").returncode == 0
    assert await made.stop() == 0
