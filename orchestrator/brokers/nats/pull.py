"""One durable consumer pulled by one inbox: requests ahead of demand, heartbeats, and what the server says of itself.

Walk "an event": the step before Consumer takes a message. nats-py's fetch() is not used: it goes silent over a server
restart and returns nothing when the consumer was deleted.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

from orchestrator.brokers.nats.client import Link, headers_of, status_of
from orchestrator.brokers.nats.internals import Receive

_EXPIRES = 30.0  # seconds a request stays with the server
_HEARTBEAT = 1.0  # seconds between the server's signs of life while there is nothing
_SILENCE = 2.6  # seconds without any sign until a request counts as lost


class Lane:
    """Keeps up to `room` messages requested. Told of trouble: `lost(reason, missing)`."""

    def __init__(
        self,
        link: Link,
        stream: str,
        durable: str,
        receive: Receive,
        late: Receive,
        lost: Callable[[Lane, str, bool], None],
    ) -> None:
        self.stream = stream
        self.durable = durable
        self.requested = 0  # messages asked for and not arrived
        self._link = link
        self._receive = receive
        self._late = late
        self._lost = lost
        self._subject = link.api_subject(f"CONSUMER.MSG.NEXT.{stream}.{durable}").encode()
        self._inbox = b""
        self._sid = b""
        self._heard = 0.0
        self._clock = asyncio.get_running_loop().time

    def open(self) -> None:
        self._inbox = b"_INBOX." + secrets.token_hex(11).encode()
        self._sid = self._link.client.listen(self._inbox.decode(), self._on_message)
        self.requested = 0

    def pull(self, room: int) -> None:
        """Asks for what is missing to `room`, once half of it is missing: one request serves many events."""
        missing = room - self.requested
        if missing > 0 and missing * 2 >= room:
            ask = b'{"batch":%d,"expires":%d,"idle_heartbeat":%d}' % (missing, _EXPIRES * 1e9, _HEARTBEAT * 1e9)
            if not self.requested:
                self._heard = self._clock()
            self.requested += missing
            self._link.client.send(b"PUB %b %b %d\r\n%b\r\n" % (self._subject, self._inbox, len(ask), ask))

    def stop(self) -> None:
        """Withdraws every request; what is on its way goes to `late`."""
        if self._sid:
            self._link.client.unlisten(self._sid, self._late)
            self._sid = b""
        self.requested = 0

    def restart(self) -> None:
        """Withdraws every request and starts with a new inbox."""
        self.stop()
        self.open()

    def check(self) -> bool:
        """False when the server has been silent for too long; the requests are then withdrawn."""
        if not self.requested or not self._link.connected or self._clock() - self._heard < _SILENCE:
            return True
        self.restart()
        return False

    def _on_message(self, subject: bytes, reply: bytes, header: bytes | None, body: bytes) -> None:
        self._heard = self._clock()
        if reply.startswith(b"$JS.ACK."):
            if self.requested:
                self.requested -= 1
            self._receive(subject, reply, header, body)
            return
        code, words = status_of(header)
        if code == 100:
            return
        left = headers_of(header).get("Nats-Pending-Messages", "")
        if left.isdigit():
            self.requested = max(0, self.requested - int(left))
        elif code:
            self.requested = 0
        if code == 503:
            self._lost(self, "the stream or consumer does not answer", True)
        elif code == 409 and "deleted" in words.lower():
            self._lost(self, words, True)
        else:  # 408 expired, 404 nothing, other 409: ask again
            self._lost(self, words, False)
