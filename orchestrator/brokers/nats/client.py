"""One connection to a NATS server: opened as a topology describes it, guarded, asked, and read from.

Everything else of this package talks to the server through Link. It turns nats-py's exceptions into ours.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import nats.errors

from orchestrator.brokers.nats.internals import FastClient
from orchestrator.brokers.nats.resources import headers_of, status_of
from orchestrator.brokers.options import blamed, check, taken_by
from orchestrator.errors import BrokerError, BrokerUnavailable, OrchestratorError, ResourceMissing
from orchestrator.topology.model import Auth, Broker

T = TypeVar("T")
Json = dict[str, Any]
_NOT_FOUND = frozenset({10059, 10014, 10037})  # stream, consumer, message
_FAILURES = (nats.errors.Error, OSError, TimeoutError, ValueError)  # of a connection that cannot be opened


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


def when(text: str) -> float:
    """Unix seconds, to a microsecond, of an RFC 3339 text."""
    return datetime.fromisoformat(text).timestamp()


class Link:
    """A connection that comes back by itself for ever. `listeners` are told True and False as it comes and goes."""

    def __init__(self, client: FastClient, url: str, domain: str | None) -> None:
        self.client = client
        self.url = url
        self.listeners: list[Callable[[bool], None]] = []
        self.denied: Callable[[str], None] = lambda subject: None  # told, in lower case, where we may not publish
        self.closed_reason: str | None = None
        self.api_root = f"$JS.{domain}.API." if domain else "$JS.API."
        self.inbox = f"_INBOX.{secrets.token_hex(11)}."
        self._cut = len(self.inbox)
        self._waiting: dict[bytes, Callable[[bytes | None, bytes], None]] = {}
        self._count = 0
        self._loop = asyncio.get_running_loop()
        self._open = False  # True from the first connection to close()
        self._reopening: asyncio.Task[None] | None = None

    def opened(self) -> None:
        """The first connection stands."""
        self.client.listen(self.inbox + "*", self._on_reply)
        self._open = True

    @property
    def connected(self) -> bool:
        return self.client.is_connected

    def _on_reply(self, subject: bytes, _reply: bytes, header: bytes | None, body: bytes) -> None:
        receive = self._waiting.get(subject[self._cut :])
        if receive is not None:
            receive(header, body)

    async def _ask(
        self, subject: str, body: bytes, take: Callable[[bytes | None, bytes], T | None], timeout: float = 5.0
    ) -> T:
        """Sends a request and gives `take` what comes back (header block, body) until it returns something.

        Raises BrokerUnavailable when that does not happen in time, or there is no connection."""
        if not self.connected:
            raise self.unavailable()
        answer: asyncio.Future[T] = self._loop.create_future()

        def receive(header: bytes | None, data: bytes) -> None:
            if not answer.done() and (result := take(header, data)) is not None:
                answer.set_result(result)

        self._count += 1
        token = b"%x" % self._count
        self._waiting[token] = receive
        try:
            self.client.send(
                b"PUB %b %b%b %d\r\n%b\r\n" % (subject.encode(), self.inbox.encode(), token, len(body), body)
            )
            async with asyncio.timeout(timeout):  # (wait_for forgets a cancellation that comes with the answer)
                return await answer
        except TimeoutError:
            what = f"no answer from NATS at {self.url}"
            raise BrokerUnavailable(what, hint="is the server up, or overloaded?") from None
        finally:
            del self._waiting[token]

    async def request(self, subject: str, body: bytes = b"", *, timeout: float = 5.0) -> tuple[bytes | None, bytes]:
        """One request, one reply: its header block and body. Raises BrokerUnavailable."""
        return await self._ask(subject, body, lambda header, data: (header, data), timeout)

    async def api(self, verb: str, body: Json | None = None) -> Json:
        """One call of the JetStream API. Raises ResourceMissing, ApiError or BrokerUnavailable."""
        data = json.dumps(body).encode() if body is not None else b""
        header, reply = await self.request(self.api_root + verb, data)
        if status_of(header)[0] == 503:
            raise ApiError(verb, 503, "JetStream does not answer", hint="start nats-server with -js, or wait for it")
        result: Json = json.loads(reply)
        if (error := result.get("error")) is not None:
            code, text = int(error.get("err_code", 0)), str(error.get("description", "refused"))
            if code in _NOT_FOUND:
                kind, _, *names = verb.split(".")
                raise ResourceMissing(f"{kind.lower()} {'/'.join(names)}: {text}", hint="run `orchestrator apply`")
            raise ApiError(verb, code, text)
        return result

    async def api_pages(self, verb: str, field: str) -> list[Json]:
        """Every entry of a paged listing."""
        found: list[Json] = []
        while True:
            page = await self.api(verb, {"offset": len(found)})
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

    async def read(self, stream: str, *, start: int = 1, subject: str = ">") -> AsyncIterator[Raw]:
        """Messages from `start` to the present end, in order, disturbing nobody: 256 at a time where the stream has
        allow_direct and the server is of 2.11, else one at a time."""
        direct = True
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

        def take(header: bytes | None, data: bytes) -> bool | None:
            status, _ = status_of(header)
            named = headers_of(header)
            if status or "Nats-Sequence" not in named:
                return status in (204, 404)
            at = when(named["Nats-Time-Stamp"])
            found.append(Raw(int(named["Nats-Sequence"]), named["Nats-Subject"], header, data, at))
            return None if "Nats-Num-Pending" in named else True  # a server that knows no batches sends one message

        ask = json.dumps({"seq": start, "next_by_subj": subject, "batch": 256, "max_bytes": 4 << 20}).encode()
        return found if await self._ask(f"{self.api_root}DIRECT.GET.{stream}", ask, take) else None

    async def flush(self, timeout: int = 5) -> None:
        """Sends what is queued; returns when the server has taken it. Raises BrokerUnavailable."""
        self.client.flush_frames()  # before the ping that is waited for
        try:
            await self.client.flush(timeout=timeout)
        except (nats.errors.Error, OSError, TimeoutError):
            raise self.unavailable() from None

    def unavailable(self) -> BrokerUnavailable:
        why = f": {self.closed_reason}" if self.closed_reason else ""
        return BrokerUnavailable(f"not connected to NATS at {self.url}{why}", hint="is the server up and reachable?")

    def heard_error(self, text: str) -> None:
        """Keeps why there is no connection, and tells publishers which subject they may not publish to."""
        if not self.connected:
            self.closed_reason = text.removeprefix("nats: ")
        denied = re.search(r'permissions violation for publish to "?([^"\s]+)', text, re.IGNORECASE)
        if denied is not None:
            self.denied(denied[1].lower())

    def changed(self, up: bool) -> None:
        if up:
            self.closed_reason = None
            self.client.flush_frames()
        for listener in list(self.listeners):
            listener(up)

    def given_up(self, options: Json) -> None:
        """The server ended the connection for good (credentials revoked, say): nats-py stops then, we do not."""
        if not self._open:
            return
        self.closed_reason = str(self.client.last_error or "closed by the server")
        self.changed(False)
        if self._reopening is None or self._reopening.done():
            self._reopening = asyncio.create_task(self._reopen(options), name="nats-reopen")

    async def _reopen(self, options: Json) -> None:
        while True:
            await asyncio.sleep(0.5)
            try:
                async with asyncio.timeout(5.0):
                    await self.client.reopen(options)
            except (nats.errors.Error, OSError, TimeoutError) as error:
                self.closed_reason = str(error) or self.closed_reason
            else:
                self.changed(True)
                return

    async def close(self) -> None:
        """Sends what is queued and closes."""
        self._open = False
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.gather(self._reopening, return_exceptions=True)
        self.listeners.clear()
        with contextlib.suppress(BrokerUnavailable):  # what was unconfirmed is redelivered
            await self.flush(2)
        await self.client.close()


# --- opening --------------------------------------------------------------------------------------------------


async def open_link(broker: Broker, url: str, *, name: str, patience: float, root: Path) -> Link:
    """Connects and guards the connection; paths start at `root`. Raises BrokerUnavailable after `patience` seconds."""
    if broker.client:
        check(broker, taken_by(FastClient.connect) | {"domain": [str]})
    raw = dict(broker.client)
    client = FastClient()
    link = Link(client, safe_url(url), raw.pop("domain", None))
    failures: list[BaseException] = []

    async def failed(error: Exception) -> None:
        telling = [e for e in failures[:1] if _unauthorized(e) or _insecure(e)]
        failures[:] = [*telling, error]  # a reset that comes after it says less
        link.heard_error(str(error))

    options: Json = {
        "servers": [part.strip() for part in url.split(",")],
        "name": name,
        "allow_reconnect": True,
        "max_reconnect_attempts": -1,
        "reconnect_time_wait": 0.25,
        "connect_timeout": 2,
        "ping_interval": 1,
        "max_outstanding_pings": 2,
        "pending_size": 8 << 20,
        "error_cb": failed,
        "disconnected_cb": _told(link.changed, False),
        "reconnected_cb": _told(link.changed, True),
        "closed_cb": _told(lambda: link.given_up(options)),
        **(_credentials(broker.auth, f"brokers.{broker.name}.auth", root) if broker.auth is not None else {}),
        **_tls(broker, root),
        **raw,
    }
    try:
        with blamed(broker, *_FAILURES):
            async with asyncio.timeout(patience):
                await client.connect(**options)
    except Exception as error:
        with contextlib.suppress(AssertionError):  # refused before there was anything to close
            await client.close()
        if not isinstance(error, _FAILURES):
            raise
        cause = failures[0] if failures and (isinstance(error, TimeoutError) or _unauthorized(failures[0])) else error
        hint = "is nats-server running there, and is the address right?"
        if _unauthorized(cause):
            hint = f"check brokers.{broker.name}.auth: the server does not know this user, or not any more"
        elif _insecure(cause):
            hint = f"check brokers.{broker.name}.tls"
        what = f"cannot connect to NATS at {link.url}: {str(cause) or type(cause).__name__}"
        raise BrokerUnavailable(what, hint=hint) from None
    link.opened()
    return link


def _told(call: Callable[..., None], *arguments: Any) -> Callable[[], Coroutine[Any, Any, None]]:
    async def callback() -> None:
        call(*arguments)

    return callback


def safe_url(url: str) -> str:
    """The addresses without user and password."""
    parts = [urlsplit(part.strip()) for part in url.split(",")]
    return ",".join(f"{part.scheme or 'nats'}://{part.hostname or ''}:{part.port or 4222}" for part in parts)


def _unauthorized(error: BaseException) -> bool:
    return isinstance(error, nats.errors.AuthorizationError) or "authorization" in str(error).lower()


def _insecure(error: BaseException) -> bool:
    return isinstance(error, ssl.SSLError) or "tls" in str(error).lower()


def _credentials(auth: Auth, where: str, root: Path) -> Json:
    """Options of nats-py. Raises OrchestratorError for what cannot work, before anything is sent."""
    match auth.mechanism:
        case "plain":
            return {"user": auth.username or "", "password": auth.password or ""}
        case "token":
            return {"token": auth.token or ""}
        case "nkey" | "creds":
            try:
                nkeys = importlib.import_module("nkeys")  # an extra: only these two mechanisms need it
            except ModuleNotFoundError:
                what = f"{where}: {auth.mechanism} needs the package nkeys"
                raise OrchestratorError(what, hint="pip install 'orchestrator[nkeys]'") from None
            if auth.mechanism == "nkey":
                _key_pair(nkeys, auth.seed or "", f"{where}.seed")
                return {"nkeys_seed_str": auth.seed}

            def read() -> tuple[bytes, Any]:
                return _read_creds(nkeys, root / (auth.file or ""), f"{where}.file")

            read()  # anew at each connect, because such files are replaced; nats-py's reader hangs at a broken one
            return {
                "user_jwt_cb": lambda: read()[0],
                "signature_cb": lambda nonce: base64.b64encode(read()[1].sign(nonce.encode())),
            }
    raise OrchestratorError(f"{where}.mechanism: NATS has no {auth.mechanism}", hint="use plain, token, nkey or creds")


class _Unusable(OrchestratorError, nats.errors.Error):
    """Ours when it is raised before connecting; while it reconnects nats-py survives only errors of its own."""


def _key_pair(nkeys: Any, seed: str, where: str) -> Any:
    """The signing key of a user's seed."""
    try:
        if seed.strip().startswith("SU"):
            return nkeys.from_seed(bytearray(seed.strip().encode()))
    except (nkeys.NkeysError, ValueError):
        pass  # said below, without the seed
    raise _Unusable(f"{where} holds no seed of a NATS user", hint="it is one word that begins with SU")


def _read_creds(nkeys: Any, file: Path, where: str) -> tuple[bytes, Any]:
    """A user's JWT and signing key from a credentials file."""
    try:
        with file.open() as stream:
            text = stream.read(2**20)  # bounded: a device has no end
    except (OSError, ValueError) as error:
        raise _Unusable(f"{where}: cannot read {file}: {error}", hint="paths start at the topology file") from None
    jwt = re.search(r"-BEGIN NATS USER JWT-+\s+(\S+)", text)
    seed = re.search(r"-BEGIN USER NKEY SEED-+\s+(\S+)", text)
    if jwt is None or seed is None:
        raise _Unusable(f"{where}: {file} holds no user JWT with its seed", hint="`nsc generate creds` makes one")
    return jwt[1].encode(), _key_pair(nkeys, seed[1], where)


def _tls(broker: Broker, root: Path) -> Json:
    tls = broker.tls
    if tls is None:
        return {"tls": ssl.create_default_context()} if broker.url.startswith("tls:") else {}
    try:
        context = ssl.create_default_context(cafile=str(root / tls.ca) if tls.ca else None)
        if tls.cert:
            context.load_cert_chain(str(root / tls.cert), str(root / tls.key) if tls.key else None)
    except (OSError, ssl.SSLError) as error:
        hint = "the files must be PEM and readable; paths start at the topology file"
        raise OrchestratorError(f"brokers.{broker.name}.tls: {error}", hint=hint) from None
    return {"tls": context}
