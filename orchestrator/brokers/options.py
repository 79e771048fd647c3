"""Raw options of a client library (`brokers.<name>.client`), looked at before anything is sent.

What a library's function takes is read from its own signature. It would say nothing of a wrong type before it computes
with it, some seconds later, in a task of its own.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import EnumType
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from orchestrator.errors import OrchestratorError
from orchestrator.topology.diagnostics import listing
from orchestrator.topology.model import Broker
from orchestrator.topology.near import near

_WORDS = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def taken_by(*functions: Callable[..., Any]) -> dict[str, list[type]]:
    """The parameters of these functions together, with the types that a file can give them; without those that take
    only functions and other objects."""
    found: dict[str, list[type]] = {}
    for function in functions:
        found |= {name: _plain(hint) for name, hint in get_type_hints(function).items() if name != "self"}
    return {name: kinds for name, kinds in found.items() if set(kinds) - {NoneType}}


def check(broker: Broker, taken: Mapping[str, Sequence[type]]) -> None:
    """Raises OrchestratorError for an option of `broker` that is not in `taken` or cannot be of that type."""
    for option, value in broker.client.items():
        where = f"brokers.{broker.name}.client.{option}"
        if option not in taken:
            hint = near(option, taken) or f"it takes {listing(sorted(taken))}"
            raise OrchestratorError(f"{where}: the client library takes no such option from a file", hint=hint)
        if not any(_fits(value, kind) for kind in taken[option]):
            wanted = " or ".join(dict.fromkeys(_WORDS[kind] for kind in taken[option]))
            raise OrchestratorError(f"{where} cannot be {_WORDS[type(value)]}", hint=f"give {wanted}")


@contextmanager
def blamed(broker: Broker, *expected: type[Exception]) -> Iterator[None]:
    """What fails in here while raw options are given, and is no error `expected` of a connection, fails by them.

    Raises OrchestratorError instead."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (OrchestratorError, *expected)) or not broker.client:
            raise
        raise OrchestratorError(
            f"brokers.{broker.name}.client: {str(error) or type(error).__name__}",
            hint=f"the client library fails with these options: {', '.join(broker.client)}",
        ) from error


def _plain(hint: Any) -> list[type]:
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _plain(part)]
    kind = get_origin(hint) or hint
    if kind is abc.Mapping:
        kind = dict
    elif isinstance(kind, EnumType) and issubclass(kind, int):
        kind = int
    return [kind] if kind in _WORDS else []


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind in (int, float) else kind)
