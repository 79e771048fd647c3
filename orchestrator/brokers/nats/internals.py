"""The one file that leans on the inside of nats-py (pinned >= 2.16, < 2.17); see docs/adr/0002.

Why: the public client makes about 575 Python calls for one event, most of them in its parser, its queues and its
flusher. Here frames are parsed in one loop and handed to plain callbacks, and what is written in one turn of the event
loop goes out in one write. Connecting, authentication, TLS, pings and reconnecting stay nats-py's.

Used of nats.aio.client.Client: _ps, _sid, _subs, _transport, _server_info, _server_pool, _process_msg,
_connect_to_server. Used of nats.protocol.parser.Parser: nc, parse, reset. Used of
nats.aio.subscription.Subscription: its constructor.
tests/nats/test_internals.py fails when one of them is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

#: Called with (subject, reply, header block or None, body) for each message, inside the read loop.
Receive = Callable[[bytes, bytes, bytes | None, bytes], None]

_MSG, _HMSG = b"M"[0], b"H"[0]
_MAX_LINE = 65536


class _FastParser(Parser):
    """Takes MSG and HMSG apart itself and leaves every other line to nats-py's own parser."""

    def reset(self) -> None:
        super().reset()
        self.parts: list[bytes] = []  # the beginning of a frame that has not arrived as a whole
        self.have = 0
        self.need = 0
        self.epoch = getattr(self, "epoch", 0) + 1  # a reset while a line was handled ends that parse()

    async def parse(self, data: bytes = b"") -> None:
        if self.parts:
            self.parts.append(data)
            self.have += len(data)
            if self.have < self.need:
                return
            data = b"".join(self.parts)
            self.parts = []
        client: FastClient = self.nc
        direct, epoch, position, end = client.direct, self.epoch, 0, len(data)
        need = 0
        while position < end:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                if end - position > _MAX_LINE:
                    raise ProtocolError("nats: control line too long")
                need = end - position + 1
                break
            first = data[position]
            if first != _MSG and first != _HMSG:
                line = data[position : line_end + 2]
                position = line_end + 2
                await super().parse(line)
                if self.epoch != epoch:
                    return
                continue
            args = data[position:line_end].split()
            start = line_end + 2
            stop = start + int(args[-1])
            if stop + 2 > end:
                need = stop + 2 - position
                break
            if first == _HMSG:
                split = start + int(args[-2])
                header: bytes | None = data[start:split]
                body = data[split:stop]
                reply = args[3] if len(args) == 6 else b""
            else:
                header = None
                body = data[start:stop]
                reply = args[3] if len(args) == 5 else b""
            position = stop + 2
            receive = direct.get(args[2])
            if receive is not None:
                try:
                    receive(args[1], reply, header, body)
                except Exception as error:  # a fault of ours must not end the read loop in silence
                    client.report("a message could not be processed", error)
            else:
                await client._process_msg(int(args[2]), args[1], reply, body, header or b"")
                if self.epoch != epoch:
                    return
        if position < end:
            rest = data[position:]
            self.parts, self.have, self.need = [rest], len(rest), need
        client.run_after_chunk()


class FastClient(Client):
    """nats-py's client with direct dispatch and one write for each turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.direct: dict[bytes, Receive] = {}  # sid -> receiver
        self._ps = _FastParser(self)
        self._loop = asyncio.get_running_loop()
        self._heard: dict[int, str] = {}  # sid -> subject
        self._out: list[bytes] = []
        self._hooks: list[Callable[[], None]] = []
        self._after: list[Callable[[], None]] = []
        self._scheduled = False

    @property
    def server_info(self) -> dict[str, Any]:
        """What the server said of itself when we connected."""
        return dict(self._server_info)

    def send(self, frame: bytes) -> None:
        """Queues one protocol frame; all of one loop turn leave in one write. Kept while disconnected."""
        self._out.append(frame)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush_frames)

    def before_write(self, hook: Callable[[], None]) -> None:
        """Calls `hook` once, just before this turn's write: what it sends still goes with it."""
        self._hooks.append(hook)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.flush_frames)

    def after_chunk(self, hook: Callable[[], None]) -> None:
        """Calls `hook` once, when the bytes that are being parsed have all been dispatched."""
        self._after.append(hook)

    def run_after_chunk(self) -> None:
        while self._after:
            hooks, self._after = self._after, []
            self._call(hooks)

    def _call(self, hooks: list[Callable[[], None]]) -> None:
        for hook in hooks:
            try:
                hook()
            except Exception as error:  # neither the read loop nor the next write may end with it
                self.report("a batch could not be processed", error)

    def flush_frames(self) -> None:
        """Writes everything queued, now."""
        while self._hooks:
            hooks, self._hooks = self._hooks, []
            self._call(hooks)
        self._scheduled = False
        if self._out and self.is_connected and self._transport is not None:
            data = b"".join(self._out)
            self._out.clear()
            self._transport.write(data)

    def listen(self, subject: str, receive: Receive) -> bytes:
        """Subscribes without a queue or task of nats-py; replayed by it at each reconnect. Returns the sid."""
        self._sid += 1
        key = str(self._sid).encode()
        self._subs[self._sid] = Subscription(self, self._sid, subject)
        self._heard[self._sid] = subject
        self.direct[key] = receive
        if self.is_connected:
            self.send(b"SUB %s %s\r\n" % (subject.encode(), key))
        return key

    def unlisten(self, key: bytes, late: Receive | None = None) -> None:
        """Ends a subscription. What was already on its way still goes to `late`, for five seconds."""
        if self._heard.pop(int(key), None) is None:
            return
        self._subs.pop(int(key), None)
        if self.is_connected:
            self.send(b"UNSUB %s\r\n" % key)
        if late is None:
            self.direct.pop(key, None)
        else:
            self.direct[key] = late
            self._loop.call_later(5.0, self.direct.pop, key, None)

    async def reopen(self, options: dict[str, Any]) -> None:
        """Connects again after nats-py has given up (the server ended the connection with an error)."""
        self._server_pool = []
        await self.connect(**options)
        for sid, subject in self._heard.items():
            self._subs[sid] = Subscription(self, sid, subject)
            self.send(b"SUB %s %d\r\n" % (subject.encode(), sid))

    async def _connect_to_server(self, s: Any) -> None:
        """nats-py forgets the socket of a handshake that failed: closed here, or each attempt would leak one."""
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]  # nats-py leaves it untyped
        await super()._connect_to_server(s)

    def report(self, what: str, error: Exception) -> None:
        """Tells the event loop's exception handler: the worker logs it."""
        self._loop.call_exception_handler({"message": f"nats: {what}", "exception": error})
