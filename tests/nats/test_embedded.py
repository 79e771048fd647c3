"""The embedded server: one for each folder, shared, adopted after a kill, ended by who leaves last."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.brokers.embedded import server, serving
from orchestrator.brokers.nats import adapter
from orchestrator.errors import BrokerUnavailable, OrchestratorError
from orchestrator.topology.model import Topology
from tests.nats.rig import finished, rig, topology, until

HOLDER = """
import asyncio, sys
from pathlib import Path
from orchestrator.brokers.embedded.server import serving
async def main():
    async with serving(Path(sys.argv[1]), "t") as url:
        print(url, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
asyncio.run(main())
"""


@pytest.fixture
def plan(tmp_path: Path) -> Topology:
    return topology("embedded", tmp_path)


def record(plan: Topology) -> dict[str, int]:
    return dict(json.loads((plan.state_dir / "nats" / "server.json").read_text()))


def hold(plan: Topology) -> subprocess.Popen[str]:
    """Another process that uses the server until its stdin is closed."""
    command = [sys.executable, "-c", HOLDER, str(plan.state_dir)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def test_data_and_port_survive_a_restart(plan: Topology) -> None:
    async with serving(plan), rig("embedded", plan) as made:
        await made.publish(made.event())
        first = record(plan)
        assert (await made.connection.cluster_id()) == f"embedded-{plan.name}"
        home = plan.state_dir / "nats"
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert not psutil.pid_exists(first["pid"])
    with pytest.raises(BrokerUnavailable, match="not running"):
        await adapter.connect(plan, plan.brokers["main"], name="test")
    async with serving(plan), rig("embedded", plan) as made:
        assert record(plan)["port"] == first["port"]
        assert await made.connection.count(made.channel("tasks")) == 1


async def test_remembered_port_that_is_taken_is_left_alone(plan: Topology) -> None:
    async with serving(plan):
        first = record(plan)
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", first["port"]))
        squatter.listen()
        async with serving(plan):
            assert record(plan)["port"] != first["port"]


async def test_two_at_once_share_one_server_and_the_last_ends_it(plan: Topology) -> None:
    others = [hold(plan) for _ in range(3)]
    urls = {await asyncio.to_thread(o.stdout.readline) for o in others if o.stdout}
    assert len(urls) == 1
    pid = record(plan)["pid"]
    async with serving(plan):
        assert record(plan)["pid"] == pid
        for other in others:
            await asyncio.to_thread(other.communicate, "\n")
            assert other.returncode == 0
        assert server.running_url(plan.state_dir) == urls.pop().strip()
    await until(lambda: not runs(pid), "the last one ended it")


async def test_server_of_a_killed_user_is_adopted(plan: Topology) -> None:
    other = hold(plan)
    assert other.stdout is not None
    await asyncio.to_thread(other.stdout.readline)
    other.kill()
    await asyncio.to_thread(other.wait)
    for pipe in (other.stdin, other.stdout):
        assert pipe is not None
        pipe.close()
    pid = record(plan)["pid"]
    assert psutil.pid_exists(pid)
    async with serving(plan):
        assert record(plan)["pid"] == pid
    await until(lambda: not runs(pid), "the adopter ended it")


def runs(pid: int) -> bool:
    """Whether the process still runs; a zombie that nobody reaped does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_server_that_dies_is_started_again_on_its_port(plan: Topology) -> None:
    async with serving(plan), rig("embedded", plan) as made:
        consumer, sink = await made.consumer()
        first = record(plan)
        os.kill(first["pid"], signal.SIGKILL)
        await until(lambda: record(plan)["pid"] != first["pid"], "it was started again")
        assert record(plan)["port"] == first["port"]
        consumer.demand(1)
        await finished(made.connection.producer().send, made.event())
        await sink.take()
        await consumer.close()


async def test_server_that_is_being_started_when_the_last_leaves_is_ended(
    plan: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, begun, ended = server._enter, threading.Event(), threading.Event()

    def slowly(home: Path, users: int, name: str) -> server._Record:
        begun.set()
        time.sleep(0.5)  # meanwhile the last one leaves
        found = enter(home, users, name)
        ended.set()
        return found

    async with serving(plan):
        monkeypatch.setattr(server, "_enter", slowly)
        os.kill(record(plan)["pid"], signal.SIGKILL)
        await until(begun.is_set, "it is being started again")
    assert ended.is_set(), "it goes on behind our back"
    assert not runs(record(plan)["pid"])


async def test_terminal_interrupt_does_not_reach_it(plan: Topology) -> None:
    async with serving(plan):
        pid = record(plan)["pid"]
        assert os.getsid(pid) == pid
        assert os.getpgid(pid) != os.getpgid(0)


async def test_another_process_with_the_recorded_pid_is_not_taken_for_it(plan: Topology) -> None:
    home = plan.state_dir / "nats"
    home.mkdir(parents=True)
    (home / "server.json").write_text(json.dumps({"pid": os.getpid(), "started": 1.0, "port": 1}))
    with pytest.raises(BrokerUnavailable):
        server.running_url(plan.state_dir)
    async with serving(plan):
        assert record(plan)["pid"] != os.getpid()


async def test_server_that_cannot_start_says_why(plan: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_NATS_SERVER", "/bin/false")
    with pytest.raises(OrchestratorError) as caught:
        async with serving(plan):
            pass
    assert "server.log" in str(caught.value.hint)


async def test_nothing_happens_without_an_embedded_broker(plan: Topology) -> None:
    brokers = {"main": replace(plan.brokers["main"], url="nats://127.0.0.1:1")}
    async with serving(replace(plan, brokers=brokers)):
        assert not plan.state_dir.exists()
