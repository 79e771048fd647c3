"""Opens a connection to NATS as a topology describes it: address, credentials, certificates."""

from __future__ import annotations

import asyncio
import importlib
import ssl
from pathlib import Path
from urllib.parse import urlsplit

import nats.errors

from orchestrator.brokers.nats.client import Json, Link
from orchestrator.brokers.nats.internals import FastClient
from orchestrator.errors import BrokerUnavailable, OrchestratorError
from orchestrator.topology.model import Broker


def safe_url(url: str) -> str:
    """The address without user and password."""
    return ",".join(_bare(part) for part in url.split(","))


def _bare(url: str) -> str:
    parts = urlsplit(url.strip())
    host = parts.hostname or ""
    return f"{parts.scheme or 'nats'}://{host}:{parts.port or 4222}"


async def open_link(broker: Broker, url: str, *, name: str, patience: float, root: Path) -> Link:
    """Connects and guards the connection. Raises BrokerUnavailable after `patience` seconds."""
    raw = dict(broker.client)
    domain = {"domain": raw.pop("domain")} if "domain" in raw else {}
    client = FastClient()
    link = Link(client, safe_url(url), domain)
    failures: list[BaseException] = []

    async def failed(error: Exception) -> None:
        failures[:] = [*(e for e in failures[:1] if _unauthorized(e)), error]  # that says more than the reset after it
        link.heard_error(str(error))

    async def up() -> None:
        link.changed(True)

    async def down() -> None:
        link.changed(False)

    async def closed() -> None:
        link.given_up(options)

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
        "disconnected_cb": down,
        "reconnected_cb": up,
        "closed_cb": closed,
        **_credentials(broker, root),
        **_tls(broker, root),
        **raw,
    }
    try:
        await asyncio.wait_for(client.connect(**options), patience)
    except (nats.errors.Error, OSError, TimeoutError, ValueError) as error:
        await client.close()
        cause = failures[0] if failures and (isinstance(error, TimeoutError) or _unauthorized(failures[0])) else error
        raise BrokerUnavailable(
            f"cannot connect to NATS at {safe_url(url)}: {str(cause) or type(cause).__name__}",
            hint=_connect_hint(cause, broker),
        ) from None
    client.listen(link.inbox + "*", link.on_reply)
    link.inbox_open = True
    return link


def _unauthorized(error: BaseException) -> bool:
    return isinstance(error, nats.errors.AuthorizationError) or "authorization" in str(error).lower()


def _connect_hint(error: BaseException, broker: Broker) -> str:
    if _unauthorized(error):
        return f"check brokers.{broker.name}.auth"
    if isinstance(error, ssl.SSLError):
        return f"check brokers.{broker.name}.tls"
    return "is nats-server running there, and is the address right?"


def _credentials(broker: Broker, root: Path) -> Json:
    auth = broker.auth
    if auth is None:
        return {}
    match auth.mechanism:
        case "plain":
            return {"user": auth.username or "", "password": auth.password or ""}
        case "token":
            return {"token": auth.token or ""}
        case "nkey" | "creds":
            try:
                importlib.import_module("nkeys")  # optional: only these two mechanisms need it
            except ModuleNotFoundError:
                raise OrchestratorError(
                    f"brokers.{broker.name}.auth: {auth.mechanism} needs the package nkeys",
                    hint="pip install 'nats-py[nkeys]'",
                ) from None
            if auth.mechanism == "nkey":
                return {"nkeys_seed_str": auth.seed or ""}
            return {"user_credentials": str(root / (auth.file or ""))}
    raise OrchestratorError(
        f"brokers.{broker.name}.auth.mechanism: NATS has no {auth.mechanism}",
        hint="use plain, token, nkey or creds",
    )


def _tls(broker: Broker, root: Path) -> Json:
    tls = broker.tls
    if tls is None:
        return {"tls": ssl.create_default_context()} if broker.url.startswith("tls:") else {}
    try:
        context = ssl.create_default_context(cafile=str(root / tls.ca) if tls.ca else None)
        if tls.cert:
            context.load_cert_chain(str(root / tls.cert), str(root / tls.key) if tls.key else None)
    except (OSError, ssl.SSLError) as error:
        raise OrchestratorError(
            f"brokers.{broker.name}.tls: {error}",
            hint="the files must be PEM and readable; paths start at the topology file",
        ) from None
    return {"tls": context}
