"""The pinned inside of nats-py (docs/adr/0002): when an upgrade moves it, this is what goes red."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

from orchestrator.brokers.nats.internals import FastClient

Message = tuple[bytes, bytes, bytes | None, bytes]


def test_nats_py_is_the_version_that_was_read() -> None:
    assert version("nats-py").startswith("2.16."), "read internals.py against the new nats-py before moving the pin"


async def test_attributes_that_we_lean_on_are_there() -> None:
    plain = Client()
    for name in ("_ps", "_sid", "_subs", "_transport", "_server_info", "_server_pool"):
        assert name in vars(plain), f"nats-py's Client has no {name} any more"
    assert isinstance(plain._ps, Parser)
    assert plain._ps.nc is plain
    assert isinstance(plain._subs, dict)
    assert plain._sid == 0
    assert list(inspect.signature(Client._process_msg).parameters)[1:] == ["sid", "subject", "reply", "data", "headers"]
    assert inspect.iscoroutinefunction(Parser.parse)
    assert list(inspect.signature(Client._connect_to_server).parameters) == ["self", "s"]
    assert list(inspect.signature(Subscription.__init__).parameters)[1:4] == ["conn", "id", "subject"]


def test_client_still_calls_what_we_replace() -> None:
    assert "_ps.parse(" in inspect.getsource(Client._read_loop)
    assert "_subs.items()" in inspect.getsource(Client._attempt_reconnect)
    assert "reconnected_cb" in inspect.getsource(Client._attempt_reconnect)


FRAMES = (
    b"MSG a.b 7 5\r\nhello\r\n"
    b"MSG a.b 7 reply.to 2\r\n\r\n\r\n"
    b"PONG\r\n"
    b"HMSG a.b 7 22 24\r\nNATS/1.0\r\nX: y y y\r\n\r\nhi\r\n"
    b"HMSG a.b 7 $JS.ACK.x 22 22\r\nNATS/1.0\r\nX: MSG 1\r\n\r\n\r\n"
    b"MSG c 8 3\r\nabc\r\n"
)
EXPECTED: list[Message] = [
    (b"a.b", b"", None, b"hello"),
    (b"a.b", b"reply.to", None, b"\r\n"),
    (b"a.b", b"", b"NATS/1.0\r\nX: y y y\r\n\r\n", b"hi"),
    (b"a.b", b"$JS.ACK.x", b"NATS/1.0\r\nX: MSG 1\r\n\r\n", b""),
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 16, 10_000])
async def test_frames_survive_every_way_of_being_cut(size: int) -> None:
    client = FastClient()
    got: list[Message] = []
    client.direct[b"7"] = lambda *message: got.append(message)
    for start in range(0, len(FRAMES), size):
        await client._ps.parse(FRAMES[start : start + size])
    assert got == EXPECTED
    assert not client._ps.parts


async def test_large_body_in_small_reads() -> None:
    client = FastClient()
    got: list[Message] = []
    client.direct[b"1"] = lambda *message: got.append(message)
    body = bytes(range(256)) * 4096
    frame = b"MSG big 1 %d\r\n%b\r\n" % (len(body), body)
    for start in range(0, len(frame), 1000):
        await client._ps.parse(frame[start : start + 1000])
    assert got == [(b"big", b"", None, body)]


async def test_garbage_is_a_protocol_error() -> None:
    client = FastClient()
    with pytest.raises(ProtocolError):
        await client._ps.parse(b"GARBAGE\r\n")
    with pytest.raises(ProtocolError):
        await FastClient()._ps.parse(b"x" * 100_000)


async def test_fault_in_a_receiver_is_reported_and_ends_nothing() -> None:
    client = FastClient()
    reported: list[str] = []
    client._loop.set_exception_handler(lambda loop, context: reported.append(str(context["exception"])))
    got: list[bytes] = []

    def receive(subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        if body == b"hello":
            raise ValueError("a fault")
        got.append(body)

    client.direct[b"7"] = receive
    await client._ps.parse(FRAMES)
    assert reported == ["a fault"]
    assert got == [b"\r\n", b"hi", b""]
