"""Bodies, headers, ids and dead letters as they lie on a broker (contract section 3)."""

from __future__ import annotations

import hashlib
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from orchestrator import AgentEvent, wire
from orchestrator.brokers.base import Delivery, Outgoing
from orchestrator.errors import DecodeError, HandlerLoadError, PayloadError, PublishRejected, RoutingError
from orchestrator.event import NAMESPACE, position_id
from orchestrator.topology.model import Agent, Broker, Channel, Mode, Publication, Topology
from orchestrator.wire.names import several_lines, uuid5
from orchestrator.wire.routes import validator

EVENTS = Channel("events", "main", "EVENTS", Mode.LOG, ("agent.*",))
ORDERS = Channel(
    "orders", "main", "ORDERS", Mode.QUEUE, ("order.created",), key="payload.customer.id", key_required=True
)
BARE = Channel("bare", "main", "BARE", Mode.QUEUE, ("bare.thing",), codec="json", external=True)
STRICT = Channel(
    "strict",
    "main",
    "STRICT",
    Mode.QUEUE,
    ("strict.*",),
    schemas={"strict.one": {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}},
)
DEAD = Channel("dead", "main", "DEAD", Mode.LOG, (), dead_letters=True)
AGENT = Agent(
    "research",
    "",
    None,
    (),
    tuple(
        Publication(t, c)
        for t, c in (("agent.*", "events"), ("bare.thing", "bare"), ("order.created", "orders"), ("strict.*", "strict"))
    ),
)
TOPOLOGY = Topology(
    "t",
    "",
    Path(),
    (),
    {"main": Broker("main", "memory://", "memory")},
    {c.name: c for c in (EVENTS, ORDERS, BARE, STRICT, DEAD)},
    {"research": AGENT},
)
ROUTES = wire.Routes(TOPOLOGY, AGENT)


def origin(**fields: Any) -> wire.Origin:
    event = AgentEvent(event_id="e1", event_type="task.assigned", correlation_id="c1", **fields)
    return wire.Origin("research", event, "00-" + "a" * 32 + "-" + "b" * 16 + "-01", ("conversation_id", "absent"))


def built(event_type: str, payload: Any, index: int = 0, **options: Any) -> Outgoing:
    found = origin(metadata={"conversation_id": "v", "secret": 1})
    return wire.build(ROUTES.find(event_type), event_type, payload, found, index, **options)


def delivery(body: bytes = b"{}", headers: dict[str, str] | None = None, event_type: str | None = "task.x") -> Delivery:
    return Delivery(
        body=body, headers=headers or {}, event_type=event_type, channel="tasks", position="TASKS:7", token=b"t"
    )


def test_an_output_is_an_agent_event_with_its_context() -> None:
    message = built("agent.started", {"q": "Ä\n"}, target_agent="writing", metadata={"more": 1})
    event = AgentEvent.from_bytes(message.body)
    assert (event.event_type, event.source_agent, event.target_agent) == ("agent.started", "research", "writing")
    assert event.correlation_id == message.correlation_id == message.key == "c1"
    assert event.payload == {"q": "Ä\n"}
    assert event.metadata == {"conversation_id": "v", "causation_id": "e1", "more": 1}
    assert event.timestamp.tzinfo is not None
    assert message.event_id == message.message_id == event.event_id
    assert message.headers["traceparent"].startswith("00-")


@given(st.binary(max_size=64))
def test_our_uuid5_is_the_standard_one(name: bytes) -> None:
    digest = hashlib.sha1(NAMESPACE.bytes + name).digest()
    assert uuid5(name) == str(uuid.UUID(bytes=digest[:16], version=5))


def test_child_ids_are_stable_and_depend_on_the_content() -> None:
    same = {built("agent.started", {"a": 1}).event_id for _ in range(3)}
    others = {
        built("agent.started", {"a": 2}).event_id,
        built("agent.started", {"a": 1}, index=1).event_id,
        built("agent.completed", {"a": 1}).event_id,
        built("agent.started", {"a": 1}, target_agent="x").event_id,
    }
    assert len(same) == 1
    assert len(others | same) == 5


def test_a_model_is_a_payload_and_a_list_is_none() -> None:
    class Result(BaseModel):
        n: int

    assert AgentEvent.from_bytes(built("agent.started", Result(n=3)).body).payload == {"n": 3}
    for wrong in ([1], "x", 3, {"x": object()}, {"x": "\ud800"}):
        with pytest.raises(PayloadError):
            built("agent.started", wrong)


def test_what_an_agent_may_publish() -> None:
    with pytest.raises(RoutingError) as caught:
        built("task.created", {})
    assert "agent.*" in str(caught.value.hint)
    with pytest.raises(RoutingError):
        wire.Routes(TOPOLOGY).find("bare.thing")  # external: only by its name
    assert wire.Routes(TOPOLOGY).find("bare.thing", "bare").channel is BARE


@pytest.mark.parametrize("name", ["agent.a\r\nX: y", "agent. x", "agent.*", "agent..x", "agent.", "", "agent.\x00"])
def test_a_hostile_type_is_refused(name: str) -> None:
    with pytest.raises(PublishRejected):
        ROUTES.find(name)


def test_the_channel_key_orders_and_must_be_there() -> None:
    assert built("order.created", {"customer": {"id": 7}}).key == "7"
    assert built("order.created", {}, key="given").key == "given"
    with pytest.raises(PayloadError, match=r"payload\.customer\.id"):
        built("order.created", {"customer": {}})


def test_schemas_are_checked_at_publish() -> None:
    assert built("strict.one", {"n": 1}).channel is STRICT
    with pytest.raises(PayloadError, match=r"\$\.n.*strict|strict.*\$\.n"):
        built("strict.one", {"n": "x"})
    built("strict.two", {"n": "x"})


def test_a_schema_without_an_end_fails_the_payload() -> None:
    check = validator(replace(STRICT, schemas={"strict.one": {"$ref": "#"}}), "strict.one")
    assert check is not None
    with pytest.raises(PayloadError, match="without an end"):
        check({})


def test_the_json_codec_keeps_the_envelope_in_headers() -> None:
    message = built("bare.thing", {"n": 1}, target_agent="writing")
    assert json.loads(message.body) == {"n": 1}
    back = wire.decode(
        Delivery(
            body=message.body,
            headers={**message.headers, "correlation-id": "c1"},
            event_type=None,
            channel="bare",
            position="BARE:1",
            token=b"",
        ),
        wire.codec("json"),
        "bare.thing",
    )
    assert (back.event_id, back.source_agent, back.target_agent, back.correlation_id, back.payload) == (
        message.event_id,
        "research",
        "writing",
        "c1",
        {"n": 1},
    )


def test_a_bare_json_body_gets_a_stable_id() -> None:
    how = wire.codec("json")
    first, again = (wire.decode(delivery(b'{"n":1}'), how) for _ in range(2))
    assert first.event_id == again.event_id == first.correlation_id == position_id("TASKS:7")


@pytest.mark.parametrize("body", [b"", b"\xff", b"[1]", b"3", b"{", b"null", b"[" * 100_000, b"9" * 5_000])
@pytest.mark.parametrize("name", ["json", "agent-event"])
def test_bytes_that_are_no_event(body: bytes, name: str) -> None:
    with pytest.raises(DecodeError):
        wire.decode(delivery(body), wire.codec(name))


def test_a_codec_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lines_codec.py").write_text(
        "from orchestrator import AgentEvent\n"
        "class Lines:\n"
        "    def decode(self, body, headers, event_type, position):\n"
        "        return AgentEvent(event_type=event_type, payload={'lines': body.decode().split('|')})\n"
        "    def encode(self, event):\n"
        "        return '|'.join(event.payload['lines']).encode()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    how = wire.codec("lines_codec:Lines")
    event = wire.decode(delivery(b"a|b"), how)
    assert (event.payload, how.encode(event)) == ({"lines": ["a", "b"]}, b"a|b")
    with pytest.raises(DecodeError, match="UnicodeDecodeError"):
        wire.decode(delivery(b"\xff"), how)
    with pytest.raises(HandlerLoadError, match="no_codec"):
        wire.codec("no_codec:X")


# --- dead letters ---------------------------------------------------------------------------------------------

FAILURE = wire.Failure("exhausted", "agents.Boom", "no\nÄ", "Trace\n  back\n", 3, 1_000_000.0, 1_000_060.0)


def letter(body: bytes, headers: dict[str, str] | None = None, limit: int | None = None) -> wire.Outgoing:
    return wire.dead_letter(
        DEAD, delivery(body, headers), agent="research", group="g", failure=FAILURE, event=None, limit=limit
    )


def test_a_dead_letter_is_verbatim_and_says_why() -> None:
    body = b"\x00\xffnot json"
    found = letter(body, {"traceparent": "00-x", "x-y": "\udcff", "dlq-reason": "old"})
    assert found.body == body
    assert found.message_id == "dlq:g:TASKS:7"
    assert (found.headers["traceparent"], found.headers["x-y"]) == ("00-x", "\udcff")
    ours = {k: v for k, v in found.headers.items() if k.startswith("dlq-")}
    assert all(v.isascii() and v.isprintable() for v in ours.values())
    said = wire.parse(found.headers)
    assert said is not None
    assert (said.agent, said.channel, said.position, said.attempts) == ("research", "tasks", "TASKS:7", 3)
    assert (said.reason, said.error_type, said.message) == ("exhausted", "agents.Boom", "no\nÄ")
    assert said.traceback == "Trace\n  back\n"
    assert datetime.fromisoformat(said.last_failed_at).timestamp() == 1_000_060.0
    assert wire.original_headers(found.headers) == {"traceparent": "00-x", "x-y": "\udcff"}
    assert wire.parse({"traceparent": "x"}) is None


def size_of(message: wire.Outgoing) -> int:
    return len(message.body) + sum(len(k) + len(v) + 4 for k, v in message.headers.items())


def test_too_large_a_letter_loses_its_traceback_first_then_the_end_of_its_body() -> None:
    body = b"x" * 10_000
    whole = size_of(letter(body)) + 512
    assert letter(body, limit=whole).headers["dlq-traceback"]
    shorter = letter(body, limit=whole - 1)
    assert "dlq-traceback" not in shorter.headers
    assert shorter.body == body
    cut = letter(body, limit=5_000)
    assert 0 < len(cut.body) < 5_000
    assert size_of(cut) <= 5_000
    said = wire.parse(cut.headers)
    assert said is not None
    assert (said.truncated, said.sha256) == (10_000, hashlib.sha256(body).hexdigest())
    huge = letter(body, {"big": "h" * 9_000}, limit=5_000)
    assert "big" not in huge.headers
    assert size_of(huge) <= 5_000


@given(st.text())
def test_one_line_comes_back(text: str) -> None:
    line = wire.one_line(text)
    assert line.isascii()
    assert "\n" not in line
    assert "\r" not in line
    assert several_lines(line) == text


def test_hostile_originals_cannot_break_the_letter() -> None:
    found = letter(b"{}", {"a b\r\n": "v\r\nX-Evil: 1"})
    assert found.headers["a_b__"] == "v\\r\\nX-Evil: 1"
    evil = delivery(b"{}", event_type="a.b\r\nc")
    message = wire.dead_letter(DEAD, evil, agent="a", group="g", failure=FAILURE, event=None)
    assert message.event_type == "unknown"


def test_agent_failed_tells_of_it_under_a_stable_id() -> None:
    event = AgentEvent(event_type="task.x", correlation_id="c9", payload={"q": 1})
    tell = [wire.failed_event(delivery(), agent="research", group="g", failure=FAILURE, event=event) for _ in range(2)]
    assert tell[0].event_id == tell[1].event_id
    assert tell[0].payload["original_event"]["payload"] == {"q": 1}
    assert tell[0].payload["attempts"] == 3
    assert tell[0].correlation_id == "c9"


def test_trace_context_keeps_the_trace() -> None:
    given_header = "00-" + "1" * 32 + "-" + "2" * 16 + "-00"
    child = wire.child_traceparent({"traceparent": given_header}, "c")
    assert child.split("-")[1] == "1" * 32
    assert child.split("-")[2] != "2" * 16
    assert child.endswith("-00")
    derived = [wire.child_traceparent({"traceparent": "garbage"}, "c").split("-")[1] for _ in range(2)]
    assert derived[0] == derived[1] != "0" * 32


def test_a_codec_that_makes_no_event_is_the_events_end_and_not_the_workers() -> None:
    class Odd:
        def decode(self, body: bytes, headers: Mapping[str, str], event_type: str | None, position: str) -> Any:
            return {"event_type": "x"}

        def encode(self, event: AgentEvent) -> bytes:
            return b""

    delivery = Delivery(body=b"{}", headers={}, event_type="x", channel="c", position="p:1", token=b"")
    with pytest.raises(DecodeError, match="dict"):
        wire.decode(delivery, Odd())


@pytest.mark.parametrize("text", ["def (:", "1 / 0", "class half:\n    def decode(self): ..."])
def test_a_codec_that_cannot_be_used_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "odd_codec.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_codec", raising=False)
    with pytest.raises(HandlerLoadError, match="odd_codec:half"):
        wire.codec("odd_codec:half")


@pytest.mark.parametrize(("value", "text"), [("a", "a"), (True, "true"), (1.5, "1.5"), ({"a": 1}, '{"a":1}')])
def test_a_key_is_the_same_text_at_publish_and_at_redrive(value: Any, text: str) -> None:
    assert wire.key_text(value) == text
