"""plan, apply and destroy on the embedded server, right and wrong."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import PlanError
from orchestrator.reconcile.plan import Plan
from tests.cli.conftest import TOPOLOGY
from tests.cli.rig import Folder
from tests.patience import PATIENCE
from tests.servers.nats import NatsServer
from tests.servers.ports import free_port

SMALLER = TOPOLOGY.replace("parcels: {", "parcels: {retention: {max_events: 1}, ")
RIVAL = TOPOLOGY.replace("name: shop", "name: rival").replace("parcels: {", "parcels: {address: shop-parcels, ")


def test_a_second_apply_is_empty(folder: Folder) -> None:
    assert "embedded: development" in folder.ok("plan").out
    assert folder.run("plan", "--exit-code").code == 3
    folder.ok("apply", "--yes", "--no-workers")
    again = folder.ok("plan", "--exit-code", "-o", "json").json
    assert (again["operations"], again["pending"]) == ([], False)
    assert "Nothing to do" in folder.ok("apply", "--no-workers").out  # and so nothing to confirm


def test_apply_without_a_terminal_asks_for_yes(folder: Folder) -> None:
    assert "--yes" in folder.refused("apply", "--no-workers", code=2)
    assert folder.run("plan", "--exit-code").code == 3


def test_detached_and_no_workers_at_once_is_a_usage_error(folder: Folder) -> None:
    assert "one of them" in folder.refused("apply", "--yes", "-d", "--no-workers", code=2)


def test_a_setting_is_changed_in_place(folder: Folder) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    folder.write("topology.yaml", TOPOLOGY.replace("parcels: {", "parcels: {retention: {max_age: 2d}, "))
    plan = folder.ok("plan").out
    assert "~ update  channel shop-parcels   topology.yaml:6:" in plan
    assert "172800" in plan
    folder.ok("apply", "--yes", "--no-workers")
    assert folder.run("plan", "--exit-code").code == 0


def test_what_would_lose_events_needs_their_names(folder: Folder) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    for n in range(3):
        folder.ok("publish", "parcel.packed", json.dumps({"n": n}))
    folder.write("topology.yaml", SMALLER)
    said = folder.run("apply", "--yes", "--no-workers")
    assert said.code == 1
    assert "--allow-loss=shop-parcels" in said.out + said.err
    assert len(folder.ok("tail", "--from", "earliest", "--no-follow").out.splitlines()) == 3
    folder.ok("apply", "--yes", "--no-workers", "--allow-loss=shop-parcels")
    assert len(folder.ok("tail", "--from", "earliest", "--no-follow").out.splitlines()) == 1


def test_what_the_file_no_longer_names_is_listed_and_goes_when_told(folder: Folder) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "parcel.packed", "{}")
    folder.ok("publish", "order.placed", '{"item": "book"}')
    text = TOPOLOGY.replace("  parcels: {events: [parcel.*], mode: log}\n", "")
    folder.write("topology.yaml", text.replace("publish: [parcel.packed]", "").replace("  pack:", "  wrap:"))
    listed = folder.ok("plan", "-o", "json").json["operations"]
    # the events of the orders channel wait in the old agent's subscription, so that is kept too
    assert {(o["action"], o["name"]) for o in listed if o["kind"] != "internal"} == {
        ("create", "shop-orders/shop-wrap"),
        ("keep", "shop-orders/shop-pack"),
        ("keep", "shop-parcels"),
    }
    refused = folder.run("apply", "--yes", "--no-workers", "--prune")
    assert refused.code == 1
    assert "--allow-loss=shop-parcels" in refused.out
    folder.ok(
        *("apply", "--yes", "--no-workers", "--prune"),
        *("--allow-loss=shop-parcels", "--allow-loss=shop-orders/shop-pack"),
    )
    assert folder.run("plan", "--exit-code").code == 0


def test_a_subscription_without_events_goes_with_its_agent(folder: Folder) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    folder.write("topology.yaml", TOPOLOGY.replace("  pack:", "  wrap:"))
    plan = folder.ok("plan", "-o", "json").json["operations"]
    assert {(o["action"], o["name"]) for o in plan} == {
        ("create", "shop-orders/shop-wrap"),
        ("delete", "shop-orders/shop-pack"),
    }


def test_a_stale_plan_is_refused(folder: Folder) -> None:
    folder.ok("plan", "--out", "plan.json")
    folder.ok("apply", "--plan", "plan.json", "--no-workers")
    said = folder.refused("apply", "--plan", "plan.json", "--no-workers")
    assert "stale" in said
    assert "orchestrator plan --out" in said
    folder.write("topology.yaml", SMALLER)
    assert "the topology has changed" in folder.refused("apply", "--plan", "plan.json", "--no-workers")


@pytest.mark.parametrize(
    "text", ["[]", "", "{", "{}", '{"version": 1, "operations": 5}', "[" * 200_000, "\udcff", None]
)
def test_a_plan_file_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(PlanError, match=r"plan (file|has version)") as refused:
        Plan.read(file if text is not None else Path("/dev/zero"))
    assert "orchestrator plan --out FILE" in str(refused.value.hint)


def test_what_is_not_ours_is_not_touched(folder: Folder) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "parcel.packed", "{}")
    folder.write(
        "topology.yaml",
        RIVAL,
    )
    done = folder.run("apply", "--yes", "--no-workers")
    assert done.code == 1
    assert "belongs to topology shop" in done.out
    assert "`address:`" in done.out
    folder.write("topology.yaml", TOPOLOGY)
    assert folder.run("plan", "--exit-code").code == 0


def test_what_another_topology_on_the_broker_takes_is_refused_by_the_plan(
    folder: Folder, nats_server: NatsServer, tmp_path: Path
) -> None:
    text = TOPOLOGY + f"brokers: {{main: {{url: '{nats_server.url}', prefix: '{tmp_path.name}.'}}}}\n"
    folder.write("topology.yaml", text)
    folder.ok("apply", "--yes", "--no-workers")
    folder.write("rival.yaml", text.replace("name: shop", "name: rival"))
    planned = folder.run("plan", "rival.yaml")
    assert planned.code == 1
    assert "which belongs to topology shop" in planned.out
    assert "`prefix:`" in planned.out
    folder.refused("apply", "rival.yaml", "--yes", "--no-workers")
    assert folder.run("plan", "rival.yaml", "--exit-code", "-o", "json").json["refused"]
    folder.write("topology.yaml", text.replace("  orders: {", "  purchases: {"))
    renamed = folder.run("plan").out
    address = f"{tmp_path.name}-shop-orders"
    assert f"`address: {address}`" in renamed
    folder.write("topology.yaml", text.replace("  orders: {", f"  purchases: {{address: {address}, "))
    folder.ok("apply", "--yes", "--no-workers")


def test_an_external_channel_must_exist(folder: Folder) -> None:
    text = TOPOLOGY.replace(
        "parcels: {", "invoices: {address: INVOICES, external: true, events: [invoice.*]}\n  parcels: {"
    )
    folder.write("topology.yaml", text)
    done = folder.run("apply", "--yes", "--no-workers")
    assert done.code == 1
    assert "let its owner create INVOICES" in done.out
    assert folder.run("plan", "--exit-code").code == 1


def test_destroy_leaves_nothing_and_refuses_to_lose_events_unasked(folder: Folder) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "parcel.packed", "{}")
    assert "--allow-loss=shop-parcels" in folder.refused("destroy", "--yes")
    assert folder.run("plan", "--exit-code").code == 0
    hint = folder.refused("destroy", "--yes").partition("type the same with ")[2].partition(",")[0]
    folder.ok("destroy", *hint.split())
    after = folder.ok("plan", "-o", "json").json["operations"]
    assert {o["action"] for o in after} == {"create"}
    assert "nothing on the broker is labelled shop" in folder.ok("destroy").err


def test_protected_channels_survive_destroy(folder: Folder) -> None:
    folder.write("topology.yaml", TOPOLOGY.replace("parcels: {", "parcels: {protect: true, "))
    folder.ok("apply", "--yes", "--no-workers")
    assert "protect" in folder.refused("destroy", "--yes")
    folder.write("topology.yaml", TOPOLOGY.replace("parcels: {", "parcels: {protect: false, "))
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("destroy", "--yes")


def test_the_wrong_cluster_is_not_touched(folder: Folder, nats_server: NatsServer) -> None:
    broker = f'brokers: {{main: {{url: "{nats_server.url}", cluster_id: production}}}}\n'
    folder.write("topology.yaml", TOPOLOGY.replace("name: shop", "name: shop-cluster") + broker)
    said = folder.refused("apply", "--yes", "--no-workers")
    assert "is cluster 'test'" in said
    assert "cluster_id to 'test'" in said
    folder.write("topology.yaml", (folder.path / "topology.yaml").read_text().replace("production", "test"))
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("destroy", "--yes")


def test_a_broker_that_is_not_there_is_named_with_the_next_step(folder: Folder) -> None:
    port = free_port()
    auth = "auth: {mechanism: plain, username: u, password: hunter2}"
    folder.write("topology.yaml", TOPOLOGY + f'brokers: {{main: {{url: "nats://127.0.0.1:{port}", {auth}}}}}\n')
    for command in (
        ["plan"],
        ["apply", "--yes"],
        ["publish", "parcel.packed", "{}"],
        ["tail"],
        ["dlq", "list"],
        ["doctor"],
    ):
        done = folder.run(*command)
        assert done.code == 1, (command, done)
        assert f"127.0.0.1:{port}" in done.out + done.err, (command, done)
        assert "→" in done.out + done.err
        assert "hunter2" not in done.out + done.err


def test_two_applies_at_once_both_succeed(folder: Folder) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "apply", "--yes", "--no-workers"]
    both = [
        subprocess.Popen(command, cwd=folder.path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(p.communicate(timeout=2 * PATIENCE), p.returncode)[1] for p in both] == [0, 0]
    assert folder.run("plan", "--exit-code").code == 0


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from orchestrator.brokers.connections import Connections
from orchestrator.brokers.embedded import serving
from orchestrator.reconcile import service
from orchestrator.topology import load

async def main(survives):
    topology = load([Path("topology.yaml")]).topology
    async with serving(topology):
        done = 0
        def report(operation):
            nonlocal done
            done += 1
            if done == survives:
                os.kill(os.getpid(), signal.SIGKILL)
        await service.apply(topology, Connections(topology, name="test"), report=report)

asyncio.run(main(int(sys.argv[1])))
"""


@pytest.mark.parametrize("survives", [1, 3, 5])
def test_an_apply_killed_between_operations_is_finished_by_the_next(folder: Folder, survives: int) -> None:
    folder.write("killed.py", KILLED)
    killed = subprocess.run(
        [sys.executable, "killed.py", str(survives)], cwd=folder.path, timeout=2 * PATIENCE, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    missing = folder.ok("plan", "-o", "json").json["operations"]
    assert missing
    assert {o["action"] for o in missing} == {"create"}
    folder.ok("apply", "--yes", "--no-workers")
    assert folder.run("plan", "--exit-code").code == 0


def test_a_port_that_something_else_has_taken_is_no_broker(folder: Folder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        folder.write("topology.yaml", TOPOLOGY + f'brokers: {{main: {{url: "nats://127.0.0.1:{port}"}}}}\n')
        said = folder.refused("plan")
    assert f"127.0.0.1:{port}" in said
    assert "→" in said


@pytest.mark.parametrize("command", [["plan"], ["apply", "--yes", "--no-workers"]])
def test_a_loss_allowed_for_a_name_of_nothing_changes_nothing(folder: Folder, command: list[str]) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    said = folder.refused(*command, "--allow-loss=shop-parcel", code=2)
    assert "--allow-loss=shop-parcel names nothing" in said
    assert "did you mean `shop-parcels`?" in said
    assert folder.run("plan", "--exit-code").code == 0


def test_destroy_says_which_loss_was_allowed_for_nothing(folder: Folder) -> None:
    """It loses nothing by it, and a script may destroy twice."""
    folder.ok("apply", "--yes", "--no-workers")
    done = folder.ok("destroy", "--yes", "--allow-loss=shop-parcel")
    assert "--allow-loss=shop-parcel names nothing" in done.err
    assert "did you mean `shop-parcels`?" in done.err
    folder.ok("destroy", "--yes", "--allow-loss=shop-parcels")
