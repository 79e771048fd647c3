"""A topology as JSON and back, for the control socket and for `-d`. Without marks; secrets are in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from orchestrator.errors import OrchestratorError
from orchestrator.topology.model import Topology


def dump(topology: Topology) -> bytes:
    """UTF-8 JSON of everything but the marks. Holds secrets: for a 0600 socket or a pipe only."""
    return json.dumps({"version": 1, "topology": _encode(topology)}, separators=(",", ":")).encode()


def restore(data: bytes) -> Topology:
    """What dump() made. Raises OrchestratorError when the bytes are not that."""
    try:
        raw = json.loads(data)
        if raw["version"] != 1:
            raise ValueError(f"version {raw['version']}")
        return _decode(Topology, raw["topology"])  # type: ignore[no-any-return]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise OrchestratorError(
            f"not a topology that this version can read: {error}",
            hint="stop the supervisor and start it with the same version of orchestrator",
        ) from None


def _encode(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value) if f.name != "marks"}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Path):
        return str(value)
    return value.value if isinstance(value, Enum) else value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decode(kind: Any, value: Any) -> Any:
    """`value` as `kind`, a type as model.py writes them."""
    if kind is Any or value is None:
        return value
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _decode_union([k for k in get_args(kind) if k is not NoneType], value)
    if origin is tuple:
        return tuple(_decode(get_args(kind)[0], item) for item in value)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: _decode(get_args(kind)[1], item) for key, item in value.items()}
    if is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})
    if kind is datetime:
        return datetime.fromisoformat(value)
    if isinstance(kind, type) and issubclass(kind, (Enum, Path)):
        return kind(value)
    return value


def _decode_union(kinds: list[Any], value: Any) -> Any:
    for kind in kinds:
        if get_origin(kind) is Literal and value in get_args(kind):
            return value
    rest = [kind for kind in kinds if get_origin(kind) is not Literal]
    return _decode(rest[0], value) if rest else value
