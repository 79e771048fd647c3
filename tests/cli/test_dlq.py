"""dlq list, show, redrive, purge: right and wrong."""

from __future__ import annotations

import pytest

from tests.cli.conftest import AGENTS, TOPOLOGY
from tests.cli.rig import Folder, wait

FAILS_TWO_WAYS = AGENTS.replace(
    "    return", '    if event.payload["item"] == 7:\n        event.payload["item"].upper()\n    return'
)

SECOND_READER = """\
  count:
    handler: agents:count
    subscribe: [order.placed]
"""


def dead(folder: Folder, *args: str) -> list[dict[str, object]]:
    return list(folder.ok("dlq", "list", "-o", "json", *args).json["dead_letters"])


@pytest.fixture
def broken(folder: Folder) -> Folder:
    """Two dead letters of `pack`: a ValueError and an AttributeError; a second agent reads the same events."""
    folder.write("topology.yaml", TOPOLOGY + SECOND_READER)
    folder.write(
        "agents.py", FAILS_TWO_WAYS + "\n\nasync def count(event, ctx):\n    open('counted', 'a').write('1')\n"
    )
    folder.ok("apply", "--yes", "-d")
    folder.ok("publish", "order.placed", '{"item": "glass"}', "--id", "fragile", "--correlation-id", "one")
    folder.ok("publish", "order.placed", '{"item": 7}', "--id", "number", "--correlation-id", "two")
    wait(lambda: len(dead(folder)) == 2, "there are not two dead letters")
    return folder


def test_dead_letters_are_listed_grouped_filtered_and_shown(broken: Folder) -> None:
    table = broken.ok("dlq", "list").out
    assert "too fragile" in table
    assert {d["event_id"] for d in dead(broken)} == {"fragile", "number"}
    assert [d["event_id"] for d in dead(broken, "--error", "fragile")] == ["fragile"]
    assert [d["event_id"] for d in dead(broken, "--error", "attributeerror")] == ["number"]
    assert dead(broken, "--agent", "count") == []
    assert dead(broken, "--until", "1h") == []
    assert len(dead(broken, "--since", "1h")) == 2
    assert [d["attempts"] for d in dead(broken, "frag")] == [2]
    groups = broken.ok("dlq", "list", "-o", "json").json["groups"]
    assert {(g["agent"], g["error"], g["count"]) for g in groups} == {
        ("pack", "ValueError", 1),
        ("pack", "AttributeError", 1),
    }
    assert "COUNT" in broken.ok("dlq", "list", "--groups").out
    shown = broken.ok("dlq", "show", "fragile").out
    assert 'raise ValueError("too fragile")' in shown
    assert '{"item":"glass"}' in shown
    assert "orchestrator dlq list" in broken.refused("dlq", "show", "unknown")
    tailed = broken.ok("tail", "--channel", "dead-letters", "--from", "earliest", "--no-follow").out
    assert len(tailed.splitlines()) == 2


def test_a_mended_dead_letter_goes_back_to_the_agent_that_failed_alone(broken: Folder) -> None:
    counted = broken.path / "counted"
    wait(lambda: counted.exists() and counted.read_text() == "11", "the other agent did not count both")
    dry = broken.ok("dlq", "redrive", "fragile", "--set", "payload.item=book", "--dry-run")
    assert "would give 1 dead letter back" in dry.out
    assert len(dead(broken)) == 2
    broken.ok("dlq", "redrive", "fragile", "--set", "payload.item=book", "--yes")
    wait(lambda: "parcel.packed" in broken.run("trace", "one").out, "it was not packed")
    packed = broken.ok("trace", "one", "-o", "json").json["events"][-1]
    assert (packed["event_type"], packed["causation_id"], packed["payload"]) == (
        "parcel.packed",
        "fragile",
        {"item": "book"},
    )
    assert [d["event_id"] for d in dead(broken)] == ["number"]
    assert counted.read_text() == "11"


def test_a_redrive_that_fails_again_is_a_dead_letter_again(broken: Folder) -> None:
    lies_at = dead(broken, "fragile")[0]["dead_letter_position"]
    broken.ok("dlq", "redrive", "fragile", "--yes", "--rate", "100")
    wait(lambda: [d["dead_letter_position"] != lies_at for d in dead(broken, "fragile")] == [True], "not dead again")
    assert dead(broken, "fragile")[0]["attempts"] == 2


def test_redrives_that_cannot_be_are_refused_and_change_nothing(broken: Folder) -> None:
    assert "--yes" in broken.refused("dlq", "redrive", "fragile", code=2)
    assert "payload.<name>" in broken.refused("dlq", "redrive", "--set", "event.id=x", "--yes", code=2)
    assert "not an object" in broken.refused("dlq", "redrive", "fragile", "--set", "payload.item.colour=red", "--yes")
    broken.ok("stop")
    broken.write("topology.yaml", (broken.path / "topology.yaml").read_text().replace("  pack:", "  wrap:"))
    assert "pack no longer reads orders" in broken.refused("dlq", "redrive", "--yes")
    assert len(dead(broken)) == 2


@pytest.mark.parametrize("which", [[""], ["--agent", ""], ["--error", ""], ["--since", ""], ["--until", ""]], ids=str)
def test_a_variable_of_the_shell_that_was_not_set_selects_nothing(folder: Folder, which: list[str]) -> None:
    """An empty id would be the beginning of every id."""
    for command in (["purge", "--all"], ["redrive"], ["show"], ["list"]):
        done = folder.run("dlq", *command, *which)
        assert (done.code, done.out) == (2, "")
        assert "it is empty" in done.err


def test_an_id_that_is_no_dead_letters_is_said_and_the_others_are_done(broken: Folder) -> None:
    for command in (["show"], ["redrive", "--dry-run"], ["purge", "--yes"]):
        done = broken.run("dlq", *command, "nothing", "fragile")
        assert done.code == 1
        assert "no dead letter fits nothing: orchestrator dlq list" in done.err
        assert done.out
    assert [d["event_id"] for d in dead(broken)] == ["number"]


def test_purge_deletes_what_was_named(broken: Folder) -> None:
    assert "--all" in broken.refused("dlq", "purge", "--yes", code=2)
    assert "would delete 2" in broken.ok("dlq", "purge", "--all", "--dry-run").out
    assert broken.ok("dlq", "purge", "--error", "fragile", "--yes", "-o", "json").json["purged"] == 1
    assert [d["event_id"] for d in dead(broken)] == ["number"]
    broken.ok("dlq", "purge", "--all", "--yes")
    assert broken.ok("dlq", "list").err.strip() == "no dead letters"
