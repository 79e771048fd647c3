"""doctor: the machine, and each broker."""

from __future__ import annotations

from pathlib import Path

from tests.cli.rig import Folder


def test_doctor_without_a_topology_checks_the_machine(tmp_path: Path) -> None:
    done = Folder(tmp_path).ok("doctor")
    assert "embedded server" in done.out
    assert "only the machine" in done.err


def test_doctor_looks_at_the_embedded_broker(folder: Folder) -> None:
    facts = folder.ok("doctor", "-o", "json").json["facts"]
    assert {f["section"].split(" ")[0] for f in facts} == {"machine", "default"}
    assert {f["level"] for f in facts} <= {"ok", "warning"}


def test_doctor_looks_at_all_else_when_the_embedded_server_cannot_be_started(folder: Folder) -> None:
    done = folder.run("doctor", "-o", "json", ORCHESTRATOR_NATS_SERVER="/nowhere/nats-server")
    assert done.code == 1
    facts = {(f["section"], f["name"]): f for f in done.json["facts"]}
    assert facts["machine", "python"]["level"] == "ok"
    assert "/nowhere/nats-server" in facts["embedded", "reachable"]["value"]


def test_doctor_looks_at_all_else_when_the_state_folder_cannot_be_used(folder: Folder) -> None:
    folder.write(".orchestrator", "a file, not a folder")
    done = folder.run("doctor", "-o", "json")
    assert done.code == 1
    facts = {(f["section"], f["name"]): f for f in done.json["facts"]}
    assert (facts["machine", "python"]["level"], facts["machine", "state folder"]["level"]) == ("ok", "error")
    assert "Not a directory" in facts["embedded", "reachable"]["value"]


def test_doctor_fails_when_the_named_server_is_no_server(tmp_path: Path) -> None:
    done = Folder(tmp_path).run("doctor", ORCHESTRATOR_NATS_SERVER="/nowhere/nats-server")
    assert done.code == 1
    assert "must name an executable file" in done.out
