"""The options that many commands share, and how they become a topology."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from orchestrator.cli import console
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.brokers.base import Capabilities
    from orchestrator.topology.loader import Loaded
    from orchestrator.topology.model import Topology

DEFAULT_FILE = "topology.yaml"

S = TypeVar("S")
T = TypeVar("T")


class Output(StrEnum):
    """`-o` of commands with a text and a JSON form."""

    TEXT = "text"
    JSON = "json"


def given(value: T) -> T:
    """For what is acted upon: an empty value is a variable of the shell that was not set, and is not taken for none."""
    if value == "" or (isinstance(value, list) and "" in value):
        raise typer.BadParameter("it is empty: give a value, or leave it out")
    return value


Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TOPOLOGY]...",
        callback=given,
        help="Topology files; a later one overrides an earlier; - is stdin.",
    ),
]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "-f",
        "--file",
        metavar="TOPOLOGY",
        callback=given,
        help="Topology file; a later one overrides an earlier; - is stdin.",
    ),
]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Sets a variable of the topology.")]
VarsFiles = Annotated[list[Path] | None, typer.Option("--vars", metavar="FILE", help="YAML file of variables.")]
OutputOption = Annotated[Output, typer.Option("-o", "--output", help="text, or json for programs.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
AllowLoss = Annotated[
    list[str] | None,
    typer.Option("--allow-loss", metavar="RESOURCE", help="Accept that this resource loses what it holds. Repeatable."),
]


def understood(read: Callable[[S], T], value: S) -> T:
    """What `read` makes of an option's value; what it cannot read was typed wrongly (exit code 2)."""
    try:
        return read(value)
    except OrchestratorError as error:
        console.misused(error.message, hint=error.hint)


def assignments(values: list[str] | None) -> dict[str, str]:
    """["a=1"] as {"a": "1"}. A value without `=` is a usage error."""
    result: dict[str, str] = {}
    for value in values or []:
        name, sign, text = value.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"--set takes NAME=VALUE, not {value!r}")
        result[name] = text
    return result


def load_all(
    sources: list[str] | None, sets: list[str] | None, vars_files: list[Path] | None, *, lint: bool = False
) -> Loaded:
    """The topology with its warnings; `lint` also warns of what its brokers cannot do, which imports their clients.

    Raises TopologyError, or OrchestratorError when no file is named or found.
    """
    # YAML, Jinja and pydantic take longer to import than `--help` takes to print
    from orchestrator.topology.loader import load
    from orchestrator.topology.source import MAX_BYTES

    names = sources or [DEFAULT_FILE]
    if not sources and not Path(DEFAULT_FILE).exists():
        raise OrchestratorError(
            f"there is no {DEFAULT_FILE} here",
            hint="name your file, or make a new topology: orchestrator init my-topology",
        )
    stdin = sys.stdin.read(MAX_BYTES + 1) if "-" in names else None
    loaded = load(
        names,
        sets=assignments(sets),
        vars_files=vars_files or [],
        stdin=stdin,
        abilities=_abilities if lint else None,
    )
    console.hide(loaded.topology.secrets)
    return loaded


def load_topology(sources: list[str] | None, sets: list[str] | None, vars_files: list[Path] | None) -> Topology:
    """As load_all, for commands to which the file's warnings do not matter."""
    return load_all(sources, sets, vars_files).topology


def _abilities(kind: str) -> Capabilities | None:
    # imports the client library of that broker
    from orchestrator.brokers import registry

    try:
        return registry.adapter(kind).capabilities
    except OrchestratorError:
        return None  # not installed: said by whatever connects
