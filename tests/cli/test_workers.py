"""What talks to a supervisor: apply -d, hand-over, status, scale, pause, restart, logs, stop, dev; right and wrong."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import RefusedError
from orchestrator.operate import applying
from orchestrator.operate.applying import Listener
from orchestrator.reconcile.plan import Plan
from orchestrator.reconcile.planner import Consent
from orchestrator.topology import load
from tests.cli.conftest import AGENTS, TOPOLOGY
from tests.cli.rig import COMMAND, Folder, Foreground, wait
from tests.patience import PATIENCE

Start = Callable[..., Foreground]


def agent(folder: Folder, name: str = "pack") -> dict[str, object]:
    found = {a["name"]: a for a in folder.ok("status", "-o", "json").json["agents"]}
    return dict(found[name])


def test_without_a_supervisor_every_command_says_how_to_start_one(folder: Folder) -> None:
    for command in (["status"], ["stop"], ["restart"], ["scale", "pack", "2"], ["pause", "pack"], ["resume", "pack"]):
        done = folder.run(*command, "-o", "json")
        assert (done.code, done.out) == (1, ""), command
        assert "orchestrator apply starts one" in done.err


def test_more_workers_than_there_is_room_for_are_refused_and_what_runs_goes_on(folder: Folder) -> None:
    limited = ["sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *COMMAND, "apply", "--yes", "-d"]
    subprocess.run(limited, cwd=folder.path, check=True, capture_output=True)
    before = agent(folder)["pids"]
    said = folder.refused("scale", "pack", "10000")
    assert "no room for 9999 more workers: the limit of 200 open files allows" in said
    assert "fewer replicas" in said
    folder.write("topology.yaml", TOPOLOGY.replace("  pack:\n", "  pack:\n    replicas: 100\n"))
    assert "the limit of 200 open files" in folder.refused("apply", "--yes")
    assert (agent(folder)["pids"], agent(folder)["state"]) == (before, "running")
    folder.ok("scale", "pack", "2")
    assert agent(folder)["ready"] == 2


def test_a_team_for_which_there_is_no_room_is_refused_at_the_start(folder: Folder) -> None:
    folder.write("topology.yaml", TOPOLOGY.replace("  pack:\n", "  pack:\n    replicas: 100\n"))
    limited = ["sh", "-c", 'ulimit -n 200; exec "$@"', "sh", *COMMAND, "apply", "--yes", "-d"]
    done = subprocess.run(limited, cwd=folder.path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "no room for 100 more workers: the limit of 200 open files" in done.stderr
    assert folder.state() == "none"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"socket": 5}', "\x00"])
def test_a_supervisors_record_that_is_none_is_no_supervisor(folder: Folder, text: str) -> None:
    (folder.path / ".orchestrator").mkdir(mode=0o700)
    folder.write(".orchestrator/supervisor.json", text)
    assert "orchestrator apply starts one" in folder.refused("status")
    (folder.path / ".orchestrator" / "supervisor.json").unlink()


def test_a_detached_supervisor_from_start_to_stop(folder: Folder) -> None:
    folder.ok("apply", "--yes", "-d")
    status = folder.ok("status", "-o", "json").json
    assert (status["version"], status["topology"], status["state"]) == (1, "shop", "running")
    wanted = {"name", "state", "replicas", "ready", "restarts", "lag", "in_flight", "oldest_s", "dead"}
    assert wanted <= status["agents"][0].keys()
    assert "pack" in folder.ok("status").out

    folder.ok("publish", "order.placed", '{"item": "book"}', "--correlation-id", "one")
    wait(lambda: "parcel.packed" in folder.run("trace", "one").out, "the order was not packed")

    folder.ok("scale", "pack", "2")
    assert agent(folder)["ready"] == 2
    assert "the agents are pack" in folder.refused("scale", "nobody", "2")

    before = agent(folder)["pids"]
    folder.ok("restart", "pack")
    assert not set(before) & set(agent(folder)["pids"])  # type: ignore[call-overload]

    folder.ok("pause", "pack")
    assert agent(folder)["state"] == "paused"
    folder.ok("publish", "order.placed", '{"item": "lamp"}', "--correlation-id", "two")
    folder.ok("resume", "pack")
    wait(lambda: "parcel.packed" in folder.run("trace", "two").out, "the order was not packed after the pause")

    assert "pack.0 is ready" in folder.ok("logs").out
    assert "there is no agent 'nobody'" in folder.refused("logs", "nobody")
    folder.ok("stop")
    assert folder.state() == "none"


@pytest.mark.parametrize("text", ["agents: [\n", "", None], ids=["wrong", "empty", "gone"])
def test_a_file_that_an_edit_broke_leaves_what_runs_to_be_seen_and_stopped(folder: Folder, text: str | None) -> None:
    folder.ok("apply", "--yes", "-d")
    folder.write("topology.yaml", text) if text is not None else (folder.path / "topology.yaml").unlink()
    try:
        shown = folder.ok("status", "-o", "json")
        assert [a["name"] for a in shown.json["agents"]] == ["pack"]
        assert "topology.yaml" in shown.err
        assert "this is about shop as it runs" in shown.err
        folder.ok("logs", "pack")
        folder.ok("pause", "pack")
    finally:
        folder.ok("stop")
    assert "this is about" not in folder.refused("status")


def test_a_detached_supervisor_holds_nothing_of_who_started_it(folder: Folder) -> None:
    ours, theirs = os.pipe()
    command = [*COMMAND, "apply", "--yes", "-d"]
    subprocess.run(command, cwd=folder.path, check=True, capture_output=True, pass_fds=[theirs])
    os.close(theirs)
    try:
        assert select.select([ours], [], [], PATIENCE)[0], "the pipe is still open somewhere"
        assert os.read(ours, 1) == b""
        assert folder.state() == "running"
    finally:
        os.close(ours)


def test_apply_hands_an_edit_over_to_the_running_supervisor(folder: Folder) -> None:
    folder.ok("apply", "--yes", "-d")
    folder.write("topology.yaml", TOPOLOGY.replace("handler: agents:pack", "handler: agents:pack\n    replicas: 2"))
    plan = folder.ok("plan", "-o", "json").json
    assert [(w["action"], w["agent"]) for w in plan["workers"]] == [("update", "pack")]
    done = folder.ok("apply", "--yes")
    assert "the running supervisor has taken it over" in done.err
    assert agent(folder)["ready"] == 2
    assert folder.ok("plan", "-o", "json").json["workers"] == []


def test_a_handler_that_does_not_import_is_named_and_the_old_goes_on(folder: Folder) -> None:
    folder.ok("apply", "--yes", "-d")
    before = agent(folder)["pids"]
    folder.write("agents.py", "import nonsense_module\n")
    said = folder.refused("apply", "--yes")
    assert "pack does not start" in said
    assert "nonsense_module" in said
    assert agent(folder)["pids"] == before


def test_a_first_apply_with_a_handler_that_does_not_import_fails(folder: Folder) -> None:
    folder.write("agents.py", "import nonsense_module\n")
    said = folder.refused("apply", "--yes", "-d")
    assert "pack" in said
    assert "nonsense_module" in said
    assert "orchestrator stop" in said
    folder.ok("stop")


def test_ctrl_c_in_the_foreground_drains_and_exits_with_0(folder: Folder, start: Start) -> None:
    running = start("apply", "--yes")
    running.wait_for("pack.0 is ready")
    folder.ok("publish", "order.placed", '{"item": "book"}', "--correlation-id", "one")
    wait(lambda: "parcel.packed" in folder.run("trace", "one").out, "the order was not packed")
    assert running.interrupt() == 0
    assert "Traceback" not in running.said
    assert folder.state() == "none"


def test_two_supervisors_are_one_too_many(folder: Folder, start: Start) -> None:
    start("apply", "--yes").wait_for("pack.0 is ready")
    said = folder.refused("dev")
    assert "a supervisor already runs the topology 'shop'" in said
    assert "orchestrator stop" in said
    pids = agent(folder)["pids"]
    folder.ok("apply", "--yes")  # not a second one: the edit (none) is handed over
    assert agent(folder)["pids"] == pids


def test_dev_follows_edits_and_keeps_the_last_good_running(folder: Folder, start: Start) -> None:
    dev = start("dev")
    dev.wait_for("watching")
    dev.wait_for("pack.0 is ready")
    folder.write("topology.yaml", TOPOLOGY + "nonsense: [\n")
    dev.wait_for("what ran before goes on")
    assert "topology.yaml:" in dev.said
    assert folder.path.joinpath(".orchestrator").exists()

    folder.write("topology.yaml", TOPOLOGY.replace("handler: agents:pack", "handler: agents:pack\n    replicas: 2"))
    dev.wait_for("the edit is running")
    assert agent(folder)["ready"] == 2
    assert dev.said.count("pack.1 is ready") == 1  # said by the log alone

    folder.write("agents.py", "import nonsense_module\n")
    dev.wait_for("what ran before goes on", 2)
    assert "nonsense_module" in dev.said
    assert agent(folder)["ready"] == 2

    folder.write("agents.py", AGENTS.replace('return {"item": event.payload["item"]}', 'return {"item": "a surprise"}'))
    dev.wait_for("the edit is running", 2)
    folder.ok("publish", "order.placed", '{"item": "book"}', "--correlation-id", "one")
    wait(lambda: "surprise" in folder.run("tail", "--from", "earliest", "--no-follow").out, "the old code still runs")
    assert dev.interrupt() == 0


def test_destroy_stops_the_workers_first(folder: Folder) -> None:
    folder.ok("apply", "--yes", "-d")
    folder.ok("destroy", "--yes")
    assert folder.state() == "none"
    assert {o["action"] for o in folder.ok("plan", "-o", "json").json["operations"]} == {"create"}


@pytest.mark.parametrize("when", ["after the answer", "while the workers drain"])
def test_a_destroy_that_is_overtaken_says_what_it_did_and_deletes_nothing(folder: Folder, when: str) -> None:
    """Events come between the answer and the deletion: no worker is stopped for it where that can be seen before."""
    folder.ok("apply", "--yes", "-d")

    def overtake(now: str) -> None:
        if now == when:
            folder.ok("publish", "parcel.packed", "{}")

    def decide(plan: Plan) -> Consent:
        overtake("after the answer")
        return Consent(True)

    def say(text: str) -> None:
        if text == "draining the workers":
            overtake("while the workers drain")

    listener = Listener(confirm=lambda plan: None, report=lambda step: None, progress=lambda event: None, say=say)
    with pytest.raises(RefusedError) as refused:
        asyncio.run(applying.destroy(load([folder.path / "topology.yaml"]).topology, Consent(True), decide, listener))
    assert "channel shop-parcels holds 1 event" in refused.value.message
    assert str(refused.value.hint).startswith("type the same with --yes --allow-loss=shop-parcels")
    stopped = when != "after the answer"
    assert folder.state() == ("none" if stopped else "running")
    assert ("the workers were stopped, nothing was deleted" in refused.value.message) is stopped
    assert ("orchestrator apply -d" in str(refused.value.hint)) is stopped
    assert folder.run("plan", "--exit-code").code == 0


def test_the_control_socket_is_for_its_owner_alone(folder: Folder) -> None:
    folder.ok("apply", "--yes", "-d")
    state = folder.path / ".orchestrator"
    socket = Path(json.loads((state / "supervisor.json").read_text())["socket"])
    assert os.stat(socket).st_mode & 0o777 == 0o600
    assert os.stat(socket.parent).st_mode & 0o777 == 0o700
    assert os.stat(state).st_mode & 0o777 == 0o700


def test_what_init_makes_runs_as_its_next_steps_say(tmp_path: Path) -> None:
    Folder(tmp_path).ok("init", "story")
    story = Folder(tmp_path / "story")
    story.ok("apply", "--yes", "-d")
    try:
        story.ok("publish", "task.created", '{"topic": "tides"}', "--correlation-id", "first")
        wait(lambda: "review.completed" in story.run("trace", "first").out, "tides was not reviewed")
        story.ok("publish", "task.created", '{"topic": "the impossible"}', "--correlation-id", "second")
        wait(lambda: "nobody can write" in story.run("dlq", "list").out, "the impossible did not die")
        story.ok("dlq", "redrive", "--set", "payload.topic=tides", "--yes")
        wait(lambda: "review.completed" in story.run("trace", "second").out, "the redriven one was not reviewed")
    finally:
        story.run("stop")
