"""One connection to a NATS server: how it is guarded, requests and their replies, and reading a stream.

Everything else of this package talks to the server through Link. It turns nats-py's exceptions into ours.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import nats.errors

from orchestrator.brokers.nats.internals import FastClient
from orchestrator.errors import BrokerError, BrokerUnavailable, ResourceMissing

#: Called with (header block or None, body); header None and body b"" never happen together for a real reply.
Reply = Callable[[bytes | None, bytes], None]

Json = dict[str, Any]
_NOT_FOUND = frozenset({10059, 10014, 10037})  # stream, consumer, message
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


class ApiError(BrokerError):
    """The JetStream API said no; `code` is its err_code."""

    def __init__(self, what: str, code: int, description: str, *, hint: str | None = None) -> None:
        super().__init__(f"{what}: {description}" + (f" ({code})" if code else ""), hint=hint)
        self.code = code


@dataclass(frozen=True, slots=True)
class Raw:
    """One message as it lies in a stream."""

    seq: int
    subject: str
    header: bytes | None
    body: bytes
    time: float


def headers_of(block: bytes | None) -> dict[str, str]:
    """The headers of a block as text; names that no one could send again are left out."""
    if not block:
        return {}
    found: dict[str, str] = {}
    for line in block.decode("utf-8", "surrogateescape").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon and _TOKEN.fullmatch(name):
            found[name] = value.strip()
    return found


def status_of(block: bytes | None) -> tuple[int, str]:
    """(code, words) of an inline status such as `NATS/1.0 503`, or (0, "")."""
    if block is None or not block.startswith(b"NATS/1.0 "):
        return 0, ""
    line = block[9 : block.find(b"\r\n")].decode("ascii", "replace")
    code = line[:3]
    return (int(code), line[4:].strip()) if code.isdigit() else (0, line)


def when(text: str) -> float:
    """Unix seconds of an RFC 3339 text with up to nine digits of a second."""
    head, dot, tail = text.partition(".")
    if not dot:
        return datetime.fromisoformat(text).timestamp()
    digits = tail.rstrip("Z") if tail.endswith("Z") else re.split(r"[+-]", tail)[0]
    return datetime.fromisoformat(head + (tail[len(digits) :] or "Z")).timestamp() + float(f"0.{digits}")


class Link:
    """A connection that comes back by itself for ever. `listeners` are told True and False as it comes and goes."""

    def __init__(self, client: FastClient, url: str, options: Mapping[str, Any]) -> None:
        self.client = client
        self.url = url
        self.listeners: list[Callable[[bool], None]] = []
        self.denied: list[Callable[[str], None]] = []
        self.closed_reason: str | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._closing = False
        domain = options.get("domain")
        self._api = f"$JS.{domain}.API." if domain else "$JS.API."
        self.inbox_open = False  # True once the first connection stands
        self.inbox = f"_INBOX.{secrets.token_hex(11)}."
        self._cut = len(self.inbox)
        self.waiting: dict[bytes, Reply] = {}
        self._count = 0
        self._loop = asyncio.get_running_loop()

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    @property
    def info(self) -> Json:
        """What the server said of itself when we connected."""
        return self.client.server_info

    @property
    def max_payload(self) -> int:
        return int(self.client.max_payload)

    def token(self) -> bytes:
        """A new reply token; the reply subject is `inbox` + token."""
        self._count += 1
        return b"%x" % self._count

    def api_subject(self, verb: str) -> str:
        return self._api + verb

    def on_reply(self, subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
        receive = self.waiting.get(subject[self._cut :])
        if receive is not None:
            receive(header, body)

    async def request(self, subject: str, body: bytes = b"", *, timeout: float = 5.0) -> tuple[bytes | None, bytes]:
        """One request, one reply. Raises BrokerUnavailable when there is none in time or no connection."""
        if not self.connected:
            raise self.unavailable()
        answer: asyncio.Future[tuple[bytes | None, bytes]] = self._loop.create_future()
        token = self.token()

        def receive(header: bytes | None, data: bytes) -> None:
            if not answer.done():
                answer.set_result((header, data))

        self.waiting[token] = receive
        try:
            self.client.send(
                b"PUB %s %s%s %d\r\n%s\r\n" % (subject.encode(), self.inbox.encode(), token, len(body), body)
            )
            return await asyncio.wait_for(answer, timeout)
        except TimeoutError:
            raise BrokerUnavailable(
                f"no answer from NATS at {self.url} within {timeout:g} s", hint="is the server up, or overloaded?"
            ) from None
        finally:
            self.waiting.pop(token, None)

    async def api(self, verb: str, body: Json | None = None, *, timeout: float = 5.0) -> Json:
        """One call of the JetStream API. Raises ResourceMissing, ApiError or BrokerUnavailable."""
        data = json.dumps(body).encode() if body is not None else b""
        header, reply = await self.request(self._api + verb, data, timeout=timeout)
        if status_of(header)[0] == 503:
            raise ApiError(verb, 503, "JetStream does not answer", hint="start nats-server with -js, or wait for it")
        result: Json = json.loads(reply)
        if (error := result.get("error")) is not None:
            code, text = int(error.get("err_code", 0)), str(error.get("description", "refused"))
            if code in _NOT_FOUND:
                raise ResourceMissing(f"{verb.rpartition('.')[2] or verb}: {text}", hint="run `orchestrator apply`")
            raise ApiError(verb, code, text)
        return result

    async def api_pages(self, verb: str, field: str, body: Json | None = None) -> list[Json]:
        """Every entry of a paged listing."""
        found: list[Json] = []
        while True:
            page = await self.api(verb, {**(body or {}), "offset": len(found)})
            entries = page.get(field) or []
            found += entries
            if not entries or len(found) >= int(page.get("total", 0)):
                return found

    async def message(self, stream: str, ask: Json) -> Raw | None:
        """One message by {"seq": n}, {"last_by_subj": s} or {"seq": n, "next_by_subj": s}; None when there is none."""
        try:
            got = (await self.api(f"STREAM.MSG.GET.{stream}", ask))["message"]
        except ResourceMissing:
            return None
        return Raw(
            seq=int(got["seq"]),
            subject=got["subject"],
            header=base64.b64decode(got["hdrs"]) if got.get("hdrs") else None,
            body=base64.b64decode(got.get("data") or b""),
            time=when(got["time"]),
        )

    async def read(self, stream: str, *, start: int = 1, subject: str = ">", direct: bool = True) -> AsyncIterator[Raw]:
        """Messages from `start` to the present end, in order, disturbing nobody. `direct` reads 256 at a time and
        needs allow_direct and a server of 2.11; else one at a time."""
        while True:
            page = await self._page(stream, start, subject) if direct else None
            if page is None:
                direct = False
                one = await self.message(stream, {"seq": start, "next_by_subj": subject})
                page = [one] if one is not None else []
            for raw in page:
                yield raw
            if not page:
                return
            start = page[-1].seq + 1

    async def _page(self, stream: str, start: int, subject: str) -> list[Raw] | None:
        """Up to 256 messages by one direct request; None when the server or stream does not offer that."""
        found: list[Raw] = []
        end: asyncio.Future[bool] = self._loop.create_future()
        token = self.token()

        def receive(header: bytes | None, data: bytes) -> None:
            status, _ = status_of(header)
            if not status:
                named = headers_of(header)
                if "Nats-Sequence" not in named:
                    status = 503
                else:
                    found.append(
                        Raw(
                            int(named["Nats-Sequence"]),
                            named["Nats-Subject"],
                            header,
                            data,
                            when(named["Nats-Time-Stamp"]),
                        )
                    )
                    if "Nats-Num-Pending" not in named:
                        status = 204  # a server that knows no batches sent the one message
            if status and not end.done():
                end.set_result(status in (204, 404))

        self.waiting[token] = receive
        try:
            ask = json.dumps({"seq": start, "next_by_subj": subject, "batch": 256, "max_bytes": 4 << 20}).encode()
            to = f"{self._api}DIRECT.GET.{stream}".encode()
            self.client.send(b"PUB %s %s%s %d\r\n%s\r\n" % (to, self.inbox.encode(), token, len(ask), ask))
            complete = await asyncio.wait_for(end, 5.0)
        except TimeoutError:
            raise BrokerUnavailable(f"no answer from NATS at {self.url} while reading {stream}") from None
        finally:
            self.waiting.pop(token, None)
        return found if complete else None

    def unavailable(self) -> BrokerUnavailable:
        why = f": {self.closed_reason}" if self.closed_reason else ""
        return BrokerUnavailable(f"not connected to NATS at {self.url}{why}", hint="is the server up and reachable?")

    def heard_error(self, text: str) -> None:
        """Keeps why there is no connection, and tells publishers which subject they may not publish to."""
        if not self.connected:
            self.closed_reason = text.removeprefix("nats: ")
        denied = re.search(r'permissions violation for publish to "?([^"\s]+)', text, re.IGNORECASE)
        if denied is not None:
            for tell in self.denied:
                tell(denied[1].lower())

    def changed(self, up: bool) -> None:
        if up:
            self.closed_reason = None
            self.client.flush_frames()
        for listener in list(self.listeners):
            listener(up)

    def given_up(self, options: Json) -> None:
        """The server ended the connection for good (credentials revoked, say): nats-py stops then, we do not."""
        if self._closing or not self.inbox_open:
            return
        self.closed_reason = str(self.client.last_error or "closed by the server")
        self.changed(False)
        if self._reopening is None or self._reopening.done():
            self._reopening = asyncio.create_task(self._reopen(options), name="nats-reopen")

    async def _reopen(self, options: Json) -> None:
        while True:
            await asyncio.sleep(0.5)
            try:
                await asyncio.wait_for(self.client.reopen(options), 5.0)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                self.closed_reason = str(error) or self.closed_reason
                continue
            self.closed_reason = None
            self.changed(True)
            return

    async def close(self) -> None:
        """Sends what is queued and closes."""
        self._closing = True
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
        self.listeners.clear()
        self.client.flush_frames()
        if self.connected:
            try:
                await self.client.flush(timeout=2)
            except (nats.errors.Error, OSError, TimeoutError):
                pass  # the connection broke while it was being closed: what was unconfirmed is redelivered
        await self.client.close()


def iso(seconds: float) -> str:
    """RFC 3339 in UTC, as the JetStream API wants it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
