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


def test_doctor_fails_when_the_named_server_is_no_server(tmp_path: Path) -> None:
    done = Folder(tmp_path).run("doctor", ORCHESTRATOR_NATS_SERVER="/nowhere/nats-server")
    assert done.code == 1
    assert "must name an executable file" in done.out
