"""The control socket, by its own client."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
from pathlib import Path

import pytest

from orchestrator.errors import SupervisorError
from orchestrator.supervisor.control import ControlClient, read_record, running
from tests.patience import PATIENCE
from tests.supervisor.rig import Running, agent, eventually


async def test_every_operation(run, tmp_path):
    team = await run(agent(), agent("writing"))
    await team.all_ready()
    client = ControlClient(team.topology.state_dir)
    assert (await client.ping())["topology"] == "team"
    status = await client.status()
    assert (status["version"], status["state"], status["revision"]) == (1, "running", team.topology.revision())
    keys = {"name", "state", "replicas", "ready", "restarts", "lag", "in_flight", "oldest_s", "dead"}
    assert keys <= status["agents"][0].keys()
    assert (await client.topology()).revision() == team.topology.revision()

    seen = []
    await client.restart("research", seen.append)
    assert {"agent": "research", "slot": 1, "state": "ready", "reason": ""} in seen
    await client.scale("research", 2)
    assert (await client.status())["agents"][0]["ready"] == 2
    await client.pause("writing")
    assert (await client.status())["agents"][1]["state"] == "paused"
    await eventually(lambda: team.words("writing.0")[-1] == "pause")
    await client.resume("writing")
    await eventually(lambda: team.words("writing.0")[-1] == "resume")
    await client.update(team.with_agents(agent("writing")))
    assert [each["name"] for each in (await client.status())["agents"]] == ["writing"]

    await client.stop()
    assert await team.task == 0
    assert not running(team.topology.state_dir)
    assert read_record(team.topology.state_dir) is None
    with pytest.raises(SupervisorError, match="no supervisor runs"):
        await client.status()


async def test_a_paused_agent_stays_paused_over_a_crash_and_until_the_next_update(run):
    team = await run(agent())
    await team.all_ready()
    client = ControlClient(team.topology.state_dir)
    await client.pause("research")
    await client.restart("research")
    assert team.agent()["state"] == "paused"
    assert "pause" in await eventually(lambda: team.words("research.1")[2:])
    await client.update(team.topology)
    assert team.agent()["state"] == "running"
    await eventually(lambda: team.words("research.1")[-1] == "resume")


async def test_errors_arrive_as_they_were_raised(run):
    team = await run(agent())
    client = ControlClient(team.topology.state_dir)
    with pytest.raises(SupervisorError, match="no agent 'nobody'") as error:
        await client.pause("nobody")
    assert error.value.hint == "the agents are research"
    with pytest.raises(SupervisorError, match="does not start: no module named x"):
        await client.update(team.with_agents(agent(config={"do": "fail"})))


async def test_logs_are_filtered_and_followed(run):
    team = await run(agent(), agent("writing"))
    await team.all_ready()
    client = ControlClient(team.topology.state_dir)

    async def follow():
        found = []
        async for record in client.logs(["writing"], lines=50, follow=True):
            found.append(record)
            if sum(r["event"] == "hello" for r in found) == 2:
                return found
        return found

    following = asyncio.create_task(follow())
    await client.restart("writing")
    found = await asyncio.wait_for(following, PATIENCE)
    assert {record["agent"] for record in found} <= {"writing", "supervisor"}
    assert "research" not in {record.get("about") for record in found}
    printed = [r async for r in client.logs(["research"], lines=10) if r["event"].startswith("printed")]
    assert [r["slot"] for r in printed] == [0]


async def test_a_follower_ends_with_the_supervisor(run):
    team = await run(agent())
    await team.all_ready()

    async def follow():
        return [r async for r in ControlClient(team.topology.state_dir).logs(follow=True)]

    following = asyncio.create_task(follow())
    await eventually(lambda: team.output._followers)
    await team.stop()
    assert await asyncio.wait_for(following, PATIENCE)


async def test_a_path_too_long_for_a_socket(tmp_path):
    folder = tmp_path / ("long" * 20) / ("path" * 20)
    folder.mkdir(parents=True)
    team = Running(folder, agent())
    await team.start()
    socket_path = Path(read_record(team.topology.state_dir)["socket"])
    assert len(str(socket_path)) < 100
    assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
    assert (await ControlClient(team.topology.state_dir).ping())["topology"] == "team"
    await team.stop()
    team.output.close()
    assert not socket_path.parent.exists()


async def test_nonsense_on_the_socket_harms_nobody(run):
    team = await run(agent())
    path = read_record(team.topology.state_dir)["socket"]
    for data in (
        b"",
        b"\n",
        b"not json\n",
        b"[]\n",
        b'{"op": "explode"}\n',
        b'{"op": "scale", "agent": 1}\n',
        b"\xff\n",
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, path)
            await loop.sock_sendall(client, data)
            client.shutdown(socket.SHUT_WR)
            answer = await asyncio.wait_for(loop.sock_recv(client, 4096), PATIENCE)
            assert not answer or "error" in json.loads(answer)
    assert (await ControlClient(team.topology.state_dir).ping())["topology"] == "team"


async def test_a_supervisor_that_was_suspended_is_said_to_be(tmp_path):
    state_dir = tmp_path / ".orchestrator"
    state_dir.mkdir()
    path = tmp_path / "deaf.sock"
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(path))
        deaf.listen()
        (state_dir / "supervisor.json").write_text(json.dumps({"socket": str(path), "pid": 1}))
        with pytest.raises(SupervisorError, match="does not answer within"):
            await ControlClient(state_dir)._ask({"op": "ping"}, patience=0.2)
