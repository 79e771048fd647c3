"""publish, request, tail, trace, replay: right and wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from orchestrator.event import AgentEvent
from orchestrator.operate.reading import time_of_day
from tests.cli.conftest import TOPOLOGY
from tests.cli.rig import Folder, Foreground, wait


@pytest.fixture
def applied(folder: Folder) -> Folder:
    folder.ok("apply", "--yes", "--no-workers")
    return folder


@pytest.fixture
def running(folder: Folder) -> Folder:
    folder.ok("apply", "--yes", "-d")
    return folder


def everything(folder: Folder) -> list[dict[str, object]]:
    out = folder.ok("tail", "--from", "earliest", "--no-follow", "-o", "json").out
    return [json.loads(line) for line in out.splitlines()]


def test_publish_takes_json_a_file_and_stdin(applied: Folder) -> None:
    applied.write("order.json", '{"item": "file"}')
    applied.ok("publish", "order.placed", '{"item": "argument"}', "--id", "one", "--correlation-id", "c", "--key", "k")
    applied.ok("publish", "order.placed", "@order.json", "--target", "pack")
    done = applied.ok("publish", "order.placed", "-", "-o", "json", stdin='{"item": "stdin"}')
    assert done.json["event"]["payload"] == {"item": "stdin"}
    found = everything(applied)
    assert [e["payload"] for e in found] == [{"item": "argument"}, {"item": "file"}, {"item": "stdin"}]
    assert (found[0]["event_id"], found[0]["correlation_id"]) == ("one", "c")
    assert found[1]["target_agent"] == "pack"


def test_what_is_to_be_typed_next_can_be_typed(applied: Folder) -> None:
    said = applied.ok("publish", "parcel.packed", "{}", "--correlation-id", "two words; rm").err
    assert "orchestrator trace 'two words; rm'" in said


def test_publish_says_when_nobody_will_handle_it(applied: Folder) -> None:
    assert "no agent" not in applied.ok("publish", "order.placed", '{"item": "cup"}').err
    assert "no agent of shop subscribes to order.changed" in applied.ok("publish", "order.changed", "{}").err
    assert "pack will not handle it" in applied.ok("publish", "order.placed", '{"item": 1}', "--target", "pakc").err
    said = applied.refused("request", "order.changed", "{}", "--timeout", "200ms")
    assert "no agent of shop subscribes to order.changed" in said


@pytest.mark.parametrize("option", ["--id", "--key", "--target", "--correlation-id"])
def test_an_empty_option_is_no_absent_option(applied: Folder, option: str) -> None:
    assert "it is empty" in applied.refused("publish", "parcel.packed", "{}", option, "", code=2)
    assert everything(applied) == []


def test_the_same_id_twice_takes_effect_once(applied: Folder) -> None:
    assert "dedup_window" not in applied.ok("publish", "order.changed", "{}").err
    for _ in range(2):
        assert (
            "within 120 s, the dedup_window of parcels"
            in applied.ok("publish", "parcel.packed", "{}", "--id", "one").err
        )
    assert [e["event_type"] for e in everything(applied)] == ["order.changed", "parcel.packed"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["order.placed", "{"], "is not JSON"),
        (["order.placed", "[1]"], "instead of an object"),
        (["order.placed", "@nowhere.json"], "nowhere.json"),
        (["order.placed", '{"thing": 1}'], "item"),
        (["order.placed", "@/nowhere"], "cannot read the payload from /nowhere: No such file or directory\n"),
        (["weather.changed", "{}"], "no channel routes the event type 'weather.changed'"),
        (["ordr.placed", "{}"], "did you mean `order.placed`?"),
        (["order.placed\r\nX: y", '{"item": 1}'], "cannot be an event type"),
        (["parcel.packed", '{"a":' * 20_000 + "1" + "}" * 20_000], "nested too deep"),
        (["parcel.packed", '{"a":' * 300 + "1" + "}" * 300], "cannot be written as JSON"),
        (["parcel.packed", "@/dev/zero"], "/dev/zero is too large"),
        (["parcel.packed", '{"a": "\\ud800"}'], "cannot be written as JSON"),
        (["parcel.packed", '{"a": NaN}'], "NaN is no number that can be sent"),
        (["parcel.packed", '{"a": -1e999}'], "-1e999 is no number that can be sent"),
        (["parcel.packed", "@"], "@ names no file"),
    ],
    ids=[
        "no JSON",
        "no object",
        "no file",
        "no such place",
        "breaks its schema",
        "nothing routes it",
        "misspelt",
        "hostile type",
        "too deep to read",
        "too deep to write",
        "endless",
        "half a character",
        "no number",
        "too large a number",
        "no file's name",
    ],
)
def test_a_wrong_publish_is_refused_and_publishes_nothing(applied: Folder, args: list[str], expected: str) -> None:
    said = applied.refused("publish", *args)
    assert expected in said
    assert everything(applied) == []


def test_publish_before_apply_says_what_is_missing(folder: Folder) -> None:
    said = folder.refused("publish", "parcel.packed", "{}")
    assert "orchestrator apply" in said


def test_what_an_event_holds_does_nothing_to_the_terminal(applied: Folder) -> None:
    applied.ok("publish", "parcel.packed", '{"a": "\\u009b2J"}', "--correlation-id", "\x1b[31m\x1b]0;owned\x07")
    for output in ("text", "json"):
        shown = applied.ok("tail", "--from", "1h", "--no-follow", "-o", output).out
        assert not {"\x1b", "\x07", "\x9b"} & set(shown)
    assert (json.loads(shown)["correlation_id"], json.loads(shown)["payload"]) == (
        "\x1b[31m\x1b]0;owned\x07",
        {"a": "\x9b2J"},
    )


def test_a_time_that_no_clock_here_knows_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        moments = [datetime(1, 1, 1, tzinfo=UTC), datetime(2026, 1, 31, 12, tzinfo=UTC)]
        shown = [time_of_day(AgentEvent(event_type="a.b", timestamp=moment)) for moment in moments]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert shown == ["00:00:00.000", "07:00:00.000"]


@pytest.mark.parametrize("start", ["0001-01-01T00:00:00+14:00", "36500d"])
def test_from_before_there_were_brokers_is_from_the_beginning(applied: Folder, start: str) -> None:
    applied.ok("publish", "parcel.packed", "{}")
    assert len(applied.ok("tail", "--from", start, "--no-follow").out.splitlines()) == 1


def test_request_prints_the_reply_and_times_out_with_a_hint(running: Folder) -> None:
    assert running.ok("request", "order.placed", '{"item": "book"}').json == {"item": "book"}
    reply = running.ok("request", "order.placed", '{"item": "book"}', "-o", "json").json["reply"]
    assert reply["event_type"] == "order.placed.reply"
    given = ("--correlation-id", "mine", "--key", "k", "--target", "pack")
    assert (
        running.ok("request", "order.placed", '{"item": 1}', *given, "-o", "json").json["reply"]["correlation_id"]
        == "mine"
    )
    asked = running.ok("trace", "mine", "-o", "json").json["events"][0]
    assert (asked["event_type"], asked["target_agent"]) == ("order.placed", "pack")
    running.ok("stop")
    assert "status" in running.refused("request", "order.placed", '{"item": "book"}', "--timeout", "300ms")


def test_a_request_that_failed_prints_the_reply_and_exits_with_1(running: Folder) -> None:
    failed = running.run("request", "order.placed", '{"item": "glass"}')
    assert failed.code == 1
    assert failed.json["error"]["type"] == "ValueError"
    assert "the request failed: ValueError: too fragile" in failed.err


def test_tail_follows_without_disturbing_anyone(applied: Folder, start: Callable[..., Foreground]) -> None:
    applied.ok("publish", "parcel.packed", '{"n": "before"}')
    tail = start("tail", "parcel.*", "-o", "json")
    missed = 0

    def heard() -> bool:  # tail has no word for "I listen now": publish until it hears
        nonlocal missed
        missed += 1
        applied.ok("publish", "parcel.packed", json.dumps({"n": missed}))
        return '"n":' in tail.said

    wait(heard, "tail heard nothing")
    applied.ok("publish", "order.placed", '{"item": "book"}')
    assert '"before"' not in tail.said
    assert tail.interrupt() == 130
    assert "order.placed" not in tail.said
    lag = applied.ok("plan", "-o", "json").json
    assert lag["pending"] is False


def test_tail_selects(applied: Folder) -> None:
    applied.ok("publish", "parcel.packed", "{}", "--correlation-id", "a")
    applied.ok("publish", "order.placed", '{"item": 1}', "--correlation-id", "b")
    applied.ok("publish", "order.placed", '{"item": 2}', "--correlation-id", "a")
    applied.ok("publish", "parcel.packed", '{"last": true}')
    base = ("tail", "--from", "1h", "--no-follow", "-o", "json")
    everything_in_order = [json.loads(line)["payload"] for line in applied.ok(*base).out.splitlines()]
    assert everything_in_order == [{}, {"item": 1}, {"item": 2}, {"last": True}], "channel by channel"
    assert len(applied.ok(*base, "order.*").out.splitlines()) == 2
    assert len(applied.ok(*base, "--channel", "parcels").out.splitlines()) == 2
    assert len(applied.ok(*base, "--correlation-id", "a").out.splitlines()) == 2
    assert len(applied.ok(*base, "-n", "1").out.splitlines()) == 1
    assert "the channels are: orders, parcels" in applied.refused("tail", "--channel", "nowhere")
    said = applied.ok("tail", "--from", "1h", "--no-follow", "ordr.placed", "order.*").err
    assert said.splitlines() == ["no channel takes ordr.placed: did you mean `order.placed`?"]


def test_trace_draws_what_caused_what(running: Folder) -> None:
    running.ok("publish", "order.placed", '{"item": "book"}', "--correlation-id", "one", "--id", "cause")
    wait(lambda: "parcel.packed" in running.run("trace", "one").out, "the order was not packed")
    drawn = running.ok("trace", "one").out.splitlines()
    assert drawn[0].startswith("order.placed")
    assert drawn[1].startswith("└─ parcel.packed  pack")
    events = running.ok("trace", "one", "-o", "json").json["events"]
    assert [(e["event_type"], e["causation_id"]) for e in events] == [
        ("order.placed", None),
        ("parcel.packed", "cause"),
    ]
    assert "nothing is stored" in running.refused("trace", "nothing")
    nothing = running.run("trace", "nothing", "-o", "json")
    assert (nothing.code, nothing.out) == (1, "")


def test_trace_names_what_a_queue_has_let_go_by_what_its_handler_reads(folder: Folder) -> None:
    folder.write("topology.yaml", TOPOLOGY.replace("mode: log, schemas", "mode: queue, schemas"))
    folder.ok("apply", "--yes", "-d")
    folder.ok("publish", "order.placed", '{"item": "book"}', "--correlation-id", "one", "--id", "cause")
    wait(lambda: "parcel.packed" in folder.run("trace", "one").out, "the order was not packed")
    drawn = folder.ok("trace", "one").out.splitlines()
    assert drawn[0] == "order.placed  (no longer stored; handled by pack)  cause"
    assert drawn[1].startswith("└─ parcel.packed  pack")


def test_replay_lets_an_agent_handle_events_again(running: Folder) -> None:
    running.ok("publish", "order.placed", '{"item": "book"}', "--id", "one")

    def handled() -> int:
        return int(running.ok("status", "-o", "json").json["agents"][0]["handled"])

    wait(lambda: handled() == 1, "the order was not handled")
    running.ok("replay", "pack", "--from", "earliest", "--yes")
    wait(lambda: handled() == 2, "the order was not handled again")
    assert "--yes" in running.refused("replay", "pack", "--from", "earliest", code=2)
    assert "the agents are: pack" in running.refused("replay", "nobody", "--from", "earliest", "--yes")


def test_a_queue_cannot_be_replayed(folder: Folder) -> None:
    folder.write("topology.yaml", TOPOLOGY.replace("mode: log, schemas", "mode: queue, schemas"))
    folder.ok("apply", "--yes", "--no-workers")
    assert "mode: log" in folder.refused("replay", "pack", "--from", "earliest", "--yes")


def test_a_codec_beside_the_topology_is_found(folder: Folder) -> None:
    folder.write("topology.yaml", TOPOLOGY.replace("parcels: {", 'parcels: {codec: "shouting:Codec", '))
    folder.write(
        "shouting.py",
        "from orchestrator import AgentEvent\n\n\nclass Codec:\n"
        "    def encode(self, event):\n        return event.to_bytes().upper()\n\n"
        "    def decode(self, body, headers, event_type, position):\n"
        "        return AgentEvent.from_bytes(body.lower(), position=position)\n",
    )
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "parcel.packed", '{"item": "quiet"}')
    assert [e["payload"] for e in everything(folder)] == [{"item": "quiet"}]


def test_a_secret_is_redacted_wherever_it_shows_up(folder: Folder) -> None:
    broker = """brokers: {default: {url: embedded, auth: {mechanism: token, token: "{{ secret('env:TOKEN') }}"}}}\n"""
    folder.write("topology.yaml", TOPOLOGY + broker)
    folder.run("apply", "--yes", "--no-workers", TOKEN="opensesame")
    folder.run("publish", "parcel.packed", '{"said": "opensesame"}', TOKEN="opensesame")
    for command in (["tail", "--from", "earliest", "--no-follow"], ["plan"], ["validate", "--show"]):
        done = folder.run(*command, TOKEN="opensesame")
        assert done.code == 0, done
        assert "opensesame" not in done.out + done.err
    assert "***" in folder.run("tail", "--from", "earliest", "--no-follow", TOKEN="opensesame").out
