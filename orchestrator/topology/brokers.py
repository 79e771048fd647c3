"""Which adapter serves a broker's URL, and what a broker entry means. Part of meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from orchestrator.topology import spec
from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.model import Auth, Broker, Tls
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Map, Scalar
from orchestrator.topology.schemes import SCHEMES
from orchestrator.topology.shape import Entry

#: The broker of a topology that names none.
EMBEDDED = Broker(name="default", url="embedded", kind="nats")

_WANTED = "embedded, or a URL: nats:// tls:// kafka:// redis:// rediss:// redis+sentinel:// redis+cluster://"
_NEEDS = {
    "plain": ("username", "password"),
    "scram-sha-256": ("username", "password"),
    "scram-sha-512": ("username", "password"),
    "token": ("token",),
    "nkey": ("seed",),
    "creds": ("file",),
}
_SPEAKS = {
    "nats": ("plain", "token", "nkey", "creds"),
    "kafka": ("plain", "scram-sha-256", "scram-sha-512"),
    "redis": ("plain",),
    "memory": (),
}


@dataclass(frozen=True, slots=True)
class Address:
    """A URL taken apart as far as it needs to be checked."""

    scheme: str
    hosts: tuple[str, ...]


def address(url: str) -> Address:
    """Takes a broker URL apart; several servers stand behind one another with commas. Raises ValueError."""
    if url in ("embedded", "memory"):
        return Address(url, ())
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES or scheme == "embedded":
        raise ValueError(f"`{scheme}://` is no scheme of a broker" if separator else "it is no URL")
    hosts = []
    for piece in re.split(r"[/?#]", rest, maxsplit=1)[0].split(",") if scheme == "redis+sentinel" else rest.split(","):
        server = re.split(r"[/?#]", piece.removeprefix(f"{scheme}://"), maxsplit=1)[0]
        host = server.rpartition("@")[2]
        name, port = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(.*))?", host, re.DOTALL).groups() if host else ("", None)  # type: ignore[union-attr]
        if not name or re.search(r"[\s\x00-\x1f]", name):
            raise ValueError("a host is missing")
        if port is not None and not (
            port.isascii() and port.isdigit() and 0 < len(port) <= 5 and 0 < int(port) < 65536
        ):
            raise ValueError("the port is no number from 1 to 65535")
        hosts.append(host)
    path = re.sub(r"^[^/?#]*|[?#].*$", "", rest, flags=re.DOTALL)
    if scheme == "redis+sentinel" and not re.fullmatch(r"/[^/]+(/[0-9]*)?", path):
        raise ValueError("behind the hosts belongs the master's name, as in redis+sentinel://one:26379/mymaster/0")
    if scheme in ("redis", "rediss", "redis+cluster") and not re.fullmatch(r"(/[0-9]*)?", path):
        raise ValueError(f"{path} is no number of a database")
    return Address(scheme, tuple(hosts))


def credentials(tree: Map) -> list[str]:
    """What must never be shown: passwords, tokens and seeds in `brokers:`, secret() or not, right or wrong."""
    section = tree.get("brokers")
    found: list[str] = []
    for _, broker in section if isinstance(section, Map) else ():
        url, auth = (broker.get("url"), broker.get("auth")) if isinstance(broker, Map) else (None, None)
        if isinstance(url, Scalar):
            for password in re.findall(r"[/,][^/,@:]*:([^@/]*)@", url.text):
                found += [password, unquote(password)]
        for name in ("password", "token", "seed"):
            node = auth.get(name) if isinstance(auth, Map) else None
            if isinstance(node, Scalar) and node.value is not None:
                found.append(node.text)
    return [text for text in found if len(text) > 3]  # redacting "x" would make every message unreadable


def stand_in(name: str) -> Broker:
    """For a broker that was reported as wrong: what else is said of its channels can still be checked."""
    return Broker(name=name, url="", kind="unknown")


def resolve_broker(entry: Entry[spec.BrokerSpec], problems: Problems) -> Broker:
    """The broker; one that stands in for it when its URL is unusable."""
    said = entry.spec
    if said.url is None:
        if not entry.given("url"):
            problems.error("missing-key", f"the broker `{entry.name}` has no `url`", entry.key, expected=_WANTED)
        return stand_in(entry.name)
    try:
        found = address(said.url)
    except ValueError as error:
        scheme = said.url.partition("://")[0]
        hint = near(scheme, [s for s in SCHEMES if s != "memory"]) if scheme not in SCHEMES else None
        problems.error("url", f"not a broker's URL: {error}", entry.at("url"), expected=_WANTED, suggestion=hint)
        return stand_in(entry.name)
    kind = SCHEMES[found.scheme]
    folder = entry.node.source.folder
    return Broker(
        name=entry.name,
        url=said.url,
        kind=kind,
        prefix=said.prefix or "",
        auth=_auth(entry, kind, folder, problems),
        tls=_tls(said.tls, folder),
        cluster_id=said.cluster_id,
        client=said.client or {},
    )


def _auth(entry: Entry[spec.BrokerSpec], kind: str, folder: Path, problems: Problems) -> Auth | None:
    said = entry.spec.auth
    if said is None:
        return None
    if said.mechanism is None:
        if "auth" not in entry.dropped:
            choices = " | ".join(_SPEAKS[kind])
            problems.error("missing-key", "`auth` has no `mechanism`", entry.at("auth"), expected=choices)
        return None
    if said.mechanism not in _SPEAKS[kind] and kind != "memory":
        message = f"{kind} does not know the mechanism {said.mechanism}, only {', '.join(_SPEAKS[kind])}"
        problems.warning("unsupported", message, entry.at("auth", "mechanism"))
    for name in _NEEDS[said.mechanism]:
        optional = kind == "redis" and name == "username"  # `requirepass` alone has no user
        if getattr(said, name) is None and not optional and "auth" not in entry.dropped:
            problems.error("missing-key", f"{said.mechanism} needs `{name}`", entry.at("auth"), expected=f"auth.{name}")
    return Auth(
        mechanism=said.mechanism,
        username=said.username,
        password=said.password,
        token=said.token,
        seed=said.seed,
        file=_beside(folder, said.file),
    )


def _tls(said: spec.TlsSpec | None, folder: Path) -> Tls | None:
    if said is None:
        return None
    return Tls(ca=_beside(folder, said.ca), cert=_beside(folder, said.cert), key=_beside(folder, said.key))


def _beside(folder: Path, path: str | None) -> str | None:
    return None if path is None else str(folder / Path(path).expanduser())
