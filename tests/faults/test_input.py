"""What other clients put into a queue: what cannot be handled is one dead letter with its reason, at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import nats
import pytest

from tests.faults.rig import TOPOLOGY, Site
from tests.servers.fresh import Server

Sites = Callable[..., Site]
on_nats = pytest.mark.parametrize("server", ["nats"], indirect=True)

SCHEMA = "mode: queue, schemas: {{task.assigned: {{type: object, required: [n, do]}}}}"


def good(n: int, **more: object) -> bytes:
    return json.dumps({"event_id": f"good-{n}", "payload": {"n": n, "do": "ok"}, **more}).encode()


@on_nats
async def test_every_kind_of_input_is_handled_or_dead_once(server: Server, site: Sites) -> None:
    made = site(server.url, topology=TOPOLOGY.replace("mode: queue", SCHEMA))
    assert made.run("apply", "--yes", "--no-workers").returncode == 0
    client = await nats.connect(server.url)
    stream = client.jetstream()
    bad = {
        b"\x00\xff not json": "undecodable",
        b"": "undecodable",
        b"[1, 2, 3]": "undecodable",
        b'{"payload": 7}': "undecodable",
        b'{"payload": {"n": 1}}': "invalid",
        b'{"event_type": "task.other", "payload": {"n": 1, "do": "ok"}}': "misrouted",
        b'{"event_type": "task.assigned\\r\\nX: y", "payload": {"n": 1, "do": "ok"}}': "misrouted",
        b'{"target_agent": "some>*body", "payload": {"n": 1, "do": "ok"}}': "misrouted",
        b"\x00" * (client.max_payload - 200): "undecodable",
    }
    for body in bad:
        await stream.publish("task.assigned", body)
    await stream.publish("task.assigned", good(0))  # no header at all
    await stream.publish("task.assigned", good(1, event_id="a\r\nb *>", correlation_id="x\r\ny"))
    await stream.publish("task.assigned", good(2), headers={"reply-to": "$JS.API.STREAM.PURGE.faults-tasks"})
    await stream.publish("task.assigned", good(3), headers={"reply-to": "task.assigned", "traceparent": "rubbish"})
    await stream.publish("task.nobody-reads-this", good(4))
    await client.close()

    await made.start()
    await made.until(lambda: len(made.letters()) >= len(bad), "the dead letters")
    await made.until(lambda: made.handled() == 4, "the good ones are handled")
    await made.until(made.settled, "all settled")
    assert made.runs() == dict.fromkeys(range(4), 1)
    letters = made.letters()
    assert Counter(letter["reason"] for letter in letters) == Counter(bad.values())
    assert {letter["attempts"] for letter in letters} == {1}
    assert set(made.outputs()) == set(range(4))
    tasks = made.command("tail", "--channel", "tasks", "--no-follow", "--from", "earliest").splitlines()
    assert [json.loads(line)["event_type"] for line in tasks] == ["task.nobody-reads-this"]
    assert len(made.workers()) == 2
    assert made.agent()["restarts"] == 0
    assert await made.stop() == 0
