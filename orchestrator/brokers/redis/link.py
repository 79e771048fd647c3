"""Connections to the servers behind one URL: standalone, Sentinel or Cluster; and what their errors mean.

The library's clients retry by themselves and double what they send; here they never do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterError,
    ConnectionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
    TryAgainError,
)

from orchestrator.brokers.redis import scripts
from orchestrator.errors import BrokerError, BrokerUnavailable, OrchestratorError
from orchestrator.topology.model import Broker

#: What passes by itself: lost connections, failover, loading, resharding.
_PASSING = (ConnectionError, TimeoutError, OSError, ReadOnlyError, ClusterError, AskError, TryAgainError)
_PASSING_WORDS = ("READONLY", "MISCONF", "NOREPLICAS", "LOADING", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "BUSY ")
ERRORS = (RedisError, OSError)  # all that the library raises


def passing(error: BaseException | str) -> bool:
    """Whether trying the same again later may work."""
    if isinstance(error, str):
        return error.startswith(_PASSING_WORDS)
    return isinstance(error, _PASSING) or str(error).startswith(_PASSING_WORDS)


def base(stream: str) -> str:
    """The prefix of all keys beside `stream`, in its slot."""
    start = stream.find("{")
    tagged = start >= 0 and stream.find("}", start) > start + 1
    return stream if tagged else "{" + stream + "}"


class Link:
    """The servers behind one URL. One client is shared by all that writes; who blocks takes a fresh one."""

    def __init__(self, broker: Broker, name: str) -> None:
        url = urlsplit(broker.url)
        self.kind = url.scheme
        self.cluster = url.scheme == "redis+cluster"
        where, _, hosts = url.netloc.rpartition("@")
        self._hosts = [_host(text, 26379 if url.scheme == "redis+sentinel" else 6379) for text in hosts.split(",")]
        self.address = f"{url.scheme}://{hosts}{url.path}"
        self._path = [unquote(part) for part in url.path.split("/") if part]
        self._options: dict[str, Any] = {
            "protocol": 2,
            "socket_timeout": 5.0,
            "socket_connect_timeout": 3.0,
            "client_name": "".join(c if c.isprintable() and c != " " else "-" for c in name),
            "retry": Retry(NoBackoff(), 0),
        }
        user, _, password = where.partition(":")
        self._options |= {"username": unquote(user) or None, "password": unquote(password) or None}
        if broker.auth is not None:
            if broker.auth.mechanism != "plain":
                raise OrchestratorError(
                    f"Redis knows no {broker.auth.mechanism} authentication",
                    hint=f"brokers.{broker.name}.auth: {{mechanism: plain, username: …, password: …}}",
                )
            self._options |= {"username": broker.auth.username, "password": broker.auth.password}
        if broker.tls is not None or url.scheme == "rediss" or parse_qs(url.query).get("ssl") == ["true"]:
            self._options["ssl"] = True
            tls = broker.tls
            files = {"ssl_ca_certs": tls.ca, "ssl_certfile": tls.cert, "ssl_keyfile": tls.key} if tls else {}
            self._options |= {key: value for key, value in files.items() if value}
        self._options |= broker.client
        self._shared: dict[tuple[str, int], Redis] = {}
        self._finder: Any = None  # asks the sentinels for the master
        self._slots: list[tuple[int, int, tuple[str, int]]] = []

    def slot(self, key: str) -> int:
        """Keys of one script must have the same; one number for all when there is no cluster."""
        return key_slot(key.encode()) if self.cluster else 0

    async def at(self, key: str = "") -> Redis:
        """The shared client of the server that holds `key`."""
        node = await self._node(key)
        if node not in self._shared:
            self._shared[node] = self._client(node)
        return self._shared[node]

    async def fresh(self, key: str, **options: Any) -> Redis:
        """A client of one's own; the caller closes it."""
        return self._client(await self._node(key), **options)

    async def call(self, key: str, *command: object) -> Any:
        """One command about `key`. Raises BrokerUnavailable, or BrokerError when the server says no."""
        with self.translated():
            return await cast(Any, await self.at(key)).execute_command(*command)

    async def script(self, script: str, keys: Sequence[str], *args: object) -> Any:
        """One script on the server of its first key. Raises as call()."""
        with self.translated():
            return await self.raw(script, keys, *args)

    async def raw(self, script: str, keys: Sequence[str], *args: object) -> Any:
        """As script(), with the library's own errors."""
        try:
            return await scripts.run(await self.at(keys[0]), script, list(keys), list(args))
        except ERRORS as error:
            self.doubt(error)
            raise

    async def commit(self, key: str, args: Sequence[Any]) -> Any:
        """The COMMIT script. Raises as raw()."""
        try:
            client = await self.at(key)
            (answer,) = await exchange(client, ("EVALSHA", scripts.COMMIT_DIGEST, 1, key, *args))
            if isinstance(answer, NoScriptError):
                (answer,) = await exchange(client, ("EVAL", scripts.COMMIT, 1, key, *args))
            if isinstance(answer, ResponseError):
                raise answer
            return answer
        except ERRORS as error:
            self.doubt(error)
            raise

    def doubt(self, error: BaseException) -> None:
        """After an error: slots may have moved."""
        if passing(error):
            self._slots = []

    @contextlib.contextmanager
    def translated(self) -> Iterator[None]:
        try:
            yield
        except ERRORS as error:
            self.doubt(error)
            raise self.explain(error) from error

    def explain(self, error: BaseException) -> BrokerError:
        if passing(error):
            return BrokerUnavailable(
                f"{self.address} does not answer: {error}", hint="is the server running, and is the url right?"
            )
        return BrokerError(f"{self.address} refused: {error}", hint="look at the server's permissions (ACL) and state")

    async def close(self) -> None:
        for client in self._shared.values():
            await client.aclose()
        self._shared.clear()
        for client in self._finder.sentinels if self._finder is not None else ():
            await client.aclose()

    def _client(self, node: tuple[str, int], **options: Any) -> Redis:
        database = int(self._path[-1]) if self._path and self._path[-1].isdigit() else 0
        given = {**self._options, "db": database, **options}
        if self.kind == "redis+sentinel":
            if self._finder is None:
                quick = {key: value for key, value in given.items() if key.startswith("socket_")}
                self._finder = cast(Any, Sentinel)(self._hosts, sentinel_kwargs={**quick, "retry": given["retry"]})
            client = cast(Redis, self._finder.master_for(self._path[0], **given))
        else:
            client = Redis(host=node[0], port=node[1], **given)
        client.response_callbacks.clear()  # answers as the server gives them
        return client

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
            client = self._client(seed)
            try:
                found = await cast(Any, client).execute_command("CLUSTER", "SLOTS")
                self._slots = [(f, t, ((node[0] or b"").decode() or seed[0], node[1])) for f, t, node, *_ in found]
                return
            except ERRORS as failure:
                error = failure
            finally:
                await client.aclose()
        raise error


async def exchange(client: Redis, *commands: tuple[Any, ...]) -> list[Any]:
    """Sends commands in one write and returns the answer to each, which may be a ResponseError. For the hot paths: the
    library's own pipeline and its packing in Python took half the time of a batch. Raises the library's errors."""
    pool: Any = client.connection_pool
    connection = await pool.get_connection()
    answers: list[Any] = []
    try:
        await connection.send_packed_command(b"".join(map(pack_command, commands)))
        for _ in commands:
            try:
                answers.append(await connection.read_response())
            except ResponseError as error:
                answers.append(error)
        return answers
    except BaseException:  # an answer may still come: nobody may take it for his own
        await connection.disconnect(nowait=True)
        raise
    finally:
        await pool.release(connection)


def _host(text: str, default: int) -> tuple[str, int]:
    parsed = urlsplit(f"//{text}")
    try:
        return parsed.hostname or "localhost", parsed.port or default
    except ValueError:  # its words would repeat what may be half a password
        raise OrchestratorError(
            "a broker's url names a port that is no number", hint="write / # ? @ : in a password as %2F %23 %3F %40 %3A"
        ) from None
