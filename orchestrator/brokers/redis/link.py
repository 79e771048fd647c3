"""Connections to the servers behind one URL: standalone, Sentinel or Cluster; and what their errors mean.

The library connects, authenticates and encrypts; then a Wire speaks for itself. Its clients retry by themselves and
double what they send, and took half the time of a batch; here an unanswered command is its sender's to judge.
"""

from __future__ import annotations

import asyncio
import contextlib
from binascii import crc_hqx
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cache
from hashlib import sha1
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from hiredis import Reader, pack_command
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError, TimeoutError

from orchestrator.brokers.options import blamed, check, taken_by
from orchestrator.errors import BrokerError, BrokerUnavailable, OrchestratorError
from orchestrator.topology.model import Broker

#: What passes by itself: lost connections, failover, loading, resharding. After a _MOVING one, somebody else answers.
_PASSING = (ConnectionError, TimeoutError, OSError)
_MOVING = ("READONLY", "MOVED ", "ASK ", "CLUSTERDOWN", "MASTERDOWN")
_PASSING_WORDS = (*_MOVING, "MISCONF", "NOREPLICAS", "LOADING", "TRYAGAIN", "BUSY ")
ERRORS = (RedisError, OSError)  # all that comes from below
_MORE = object()


def passing(error: BaseException | str) -> bool:
    """Whether trying the same again later may work."""
    return isinstance(error, _PASSING) or str(error).startswith(_PASSING_WORDS)


def base(stream: str) -> str:
    """The prefix of all keys beside `stream`, in its slot."""
    start = stream.find("{")
    tagged = start >= 0 and stream.find("}", start) > start + 1
    return stream if tagged else "{" + stream + "}"


@cache
def digest(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


class Wire(asyncio.Protocol):
    """One connection. What is sent is answered in order; when the answers stay away, it ends."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection  # its stream writer would close the socket if it were forgotten
        self._writer = cast(Any, connection)._writer
        self._patience = float(connection.socket_timeout or 5.0)
        self._loop = asyncio.get_running_loop()
        self._reader = Reader(replyError=cast(Any, ResponseError), notEnoughData=_MORE)
        self._waiting: deque[tuple[asyncio.Future[list[Any]], int, list[Any]]] = deque()
        self._since = 0.0  # when the server was last heard of, or first asked
        self._watch: asyncio.TimerHandle | None = None
        self.closed = False
        self._writer.transport.set_protocol(self)

    def send(self, *commands: tuple[Any, ...]) -> asyncio.Future[list[Any]]:
        """Sends commands in one write; the answer to each, which may be a ResponseError. Fails with ConnectionError."""
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if self.closed:
            future.set_exception(ConnectionError("the connection was lost"))
            return future
        if not self._waiting:
            self._since = self._loop.time()
            if self._watch is None:
                self._watch = self._loop.call_later(self._patience, self._look)
        try:
            data = b"".join(map(pack_command, commands))
        except UnicodeEncodeError:  # text that stands for bytes
            data = b"".join(pack_command(tuple(map(_encoded, command))) for command in commands)
        self._waiting.append((future, len(commands), []))
        self._writer.transport.write(data)
        return future

    async def ask(self, *command: Any) -> Any:
        """One command. Raises the library's errors."""
        (answer,) = await self.send(command)
        if isinstance(answer, ResponseError):
            raise answer
        return answer

    def data_received(self, data: bytes) -> None:
        self._since = self._loop.time()
        reader, waiting = self._reader, self._waiting
        reader.feed(data)
        while waiting:
            answer = reader.gets()
            if answer is _MORE:
                return
            future, count, answers = waiting[0]
            answers.append(answer)
            if len(answers) == count:
                waiting.popleft()
                if not future.done():
                    future.set_result(answers)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(ConnectionError(str(error) if error else "the server closed the connection"))

    def close(self) -> None:
        self._end(ConnectionError("the connection was closed"))

    def _look(self) -> None:
        self._watch = None
        if not self._waiting:
            return
        left = self._since + self._patience - self._loop.time()
        if left > 0:
            self._watch = self._loop.call_later(left, self._look)
        else:
            self._end(TimeoutError(f"no answer within {self._patience:g} s"))

    def _end(self, error: RedisError) -> None:
        if self.closed:
            return
        self.closed = True
        if self._watch is not None:
            self._watch.cancel()
        self._writer.transport.abort()
        cast(Any, self._connection)._close()
        for future, *_ in self._waiting:
            if not future.done():
                future.set_exception(error)
                future.exception()  # whoever asked may be gone
        self._waiting.clear()


class Link:
    """The servers behind one URL. One wire is shared by all that writes; who blocks takes a fresh one."""

    def __init__(self, broker: Broker, name: str) -> None:
        url = urlsplit(broker.url)
        self.cluster = url.scheme == "redis+cluster"
        self._sentinel = url.scheme == "redis+sentinel"
        where, _, hosts = url.netloc.rpartition("@")
        self._hosts = [_host(text, 26379 if self._sentinel else 6379) for text in hosts.split(",")]
        self.address = f"{url.scheme}://{hosts}{url.path}"
        path = [unquote(part) for part in url.path.split("/") if part]
        self._service = path[0] if path and self._sentinel else ""
        user, _, password = where.partition(":")
        self._options: dict[str, Any] = {
            "db": int(path[-1]) if path and path[-1].isdigit() else 0,
            "protocol": 2,
            "socket_timeout": 5.0,
            "socket_connect_timeout": 3.0,
            "client_name": "".join(c if c.isprintable() and c != " " else "-" for c in name),
            "retry": Retry(NoBackoff(), 0),
            "driver_info": None,  # to name its version the library would import a parser of e-mails into each worker
            "username": unquote(user) or None,
            "password": unquote(password) or None,
        }
        if broker.auth is not None:
            if broker.auth.mechanism != "plain":
                raise OrchestratorError(
                    f"Redis knows no {broker.auth.mechanism} authentication",
                    hint=f"brokers.{broker.name}.auth: {{mechanism: plain, username: …, password: …}}",
                )
            self._options |= {"username": broker.auth.username, "password": broker.auth.password}
        self._kind: type[Connection] = Connection
        if broker.tls is not None or url.scheme == "rediss" or parse_qs(url.query).get("ssl") == ["true"]:
            self._kind = SSLConnection
            tls = broker.tls
            files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key} if tls else {}
            self._options |= {key: value for key, value in files.items() if value}
        if broker.client:
            makers = [vars(each)["__init__"] for each in self._kind.__mro__[:-1] if "__init__" in vars(each)]
            check(broker, {name: kind for name, kind in taken_by(*makers).items() if name not in ("host", "port")})
        self._options |= broker.client
        self._broker = broker
        self._shared: dict[tuple[str, int], Wire] = {}
        self._connecting = asyncio.Lock()
        self._slots: list[tuple[int, int, tuple[str, int]]] = []

    def slot(self, key: str) -> int:
        """Keys of one script must have the same; one number for all when there is no cluster."""
        if not self.cluster:
            return 0
        start = key.find("{") + 1
        end = key.find("}", start)
        return crc_hqx((key[start:end] if 0 < start < end else key).encode(), 0) % 16384

    async def at(self, key: str = "") -> Wire:
        """The shared wire to the server that holds `key`. Raises the library's errors."""
        node = await self._node(key)
        wire = self._shared.get(node)
        if wire is None or wire.closed:
            async with self._connecting:
                wire = self._shared.get(node)
                if wire is None or wire.closed:
                    wire = self._shared[node] = await self._open(node)
        return wire

    async def fresh(self, key: str) -> Wire:
        """A wire of one's own; the caller closes it. Raises the library's errors."""
        return await self._open(await self._node(key))

    async def call(self, key: str, *command: object) -> Any:
        """One command about `key`. Raises BrokerUnavailable, or BrokerError when the server says no."""
        with self.translated():
            return await (await self.at(key)).ask(*command)

    async def script(self, script: str, keys: Sequence[str], *args: object) -> Any:
        """One script on the server of its first key. Raises as call()."""
        with self.translated():
            wire = await self.at(keys[0])
            try:
                return await wire.ask("EVALSHA", digest(script), len(keys), *keys, *args)
            except ResponseError as error:
                if not str(error).startswith("NOSCRIPT"):
                    raise
                return await wire.ask("EVAL", script, len(keys), *keys, *args)

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except ERRORS as error:
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> BrokerError:
        """What an error means; after it another server may have to be asked."""
        if str(error).startswith(_MOVING):
            for wire in self._shared.values():
                wire.close()
        if not passing(error):
            hint = "look at the server's permissions (ACL) and state"
            return BrokerError(f"{self.address} refused: {error}", hint=hint)
        self._slots = []
        hint = "is the server running, and is the url right?"
        return BrokerUnavailable(f"{self.address} does not answer: {error}", hint=hint)

    def close(self) -> None:
        for wire in self._shared.values():
            wire.close()
        self._shared.clear()

    async def _open(self, node: tuple[str, int]) -> Wire:
        if self._sentinel:
            node = await self._master()
        with blamed(self._broker, *ERRORS):
            connection = self._kind(host=node[0], port=node[1], **self._options)
            await cast(Any, connection).connect()
            return Wire(connection)

    async def _master(self) -> tuple[str, int]:
        """Where the first sentinel that knows a running master says it is."""
        quick = {key: value for key, value in self._options.items() if key.startswith("socket_") or key == "retry"}
        finder = cast(Any, Sentinel)(self._hosts, sentinel_kwargs=quick)
        known: set[str] = set()
        try:
            for sentinel in finder.sentinels:
                with contextlib.suppress(ConnectionError, TimeoutError):  # another may answer
                    masters = await sentinel.sentinel_masters()
                    state = masters.get(self._service)
                    if state and finder.check_master_state(state, self._service):
                        return state["ip"], state["port"]
                    known |= masters.keys()
        finally:
            for client in finder.sentinels:
                await client.aclose()
        if not known:
            raise ConnectionError("no sentinel answers that knows a master")
        if self._service in known:
            raise ConnectionError(f"the sentinels say that the master {self._service} is down")
        raise ConnectionError(f"the sentinels know no master {self._service}, only {', '.join(sorted(known))}")

    async def _node(self, key: str) -> tuple[str, int]:
        if not self.cluster:
            return self._hosts[0]
        if not self._slots:
            await self._find_slots()
        slot = self.slot(key)
        for first, last, node in self._slots:
            if first <= slot <= last:
                return node
        self._slots = []
        raise ConnectionError(f"no server of the cluster holds slot {slot}")

    async def _find_slots(self) -> None:
        error: BaseException = ConnectionError("the cluster has no servers")
        for seed in [*self._hosts, *(node for node in self._shared if node not in self._hosts)]:
            try:
                wire = await self._open(seed)
                try:
                    found = await wire.ask("CLUSTER", "SLOTS")
                finally:
                    wire.close()
                self._slots = [(f, t, ((node[0] or b"").decode() or seed[0], node[1])) for f, t, node, *_ in found]
                return
            except ERRORS as failure:
                error = failure
        raise error


def _encoded(part: Any) -> Any:
    return part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part


def _host(text: str, default: int) -> tuple[str, int]:
    parsed = urlsplit(f"//{text}")
    try:
        return parsed.hostname or "localhost", parsed.port or default
    except ValueError:  # its words would repeat what may be half a password
        raise OrchestratorError(
            "a broker's url names a port that is no number", hint="write / # ? @ : in a password as %2F %23 %3F %40 %3A"
        ) from None
