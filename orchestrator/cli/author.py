"""Commands about the file alone, without a broker: init, validate, graph, schema."""

from __future__ import annotations

import os
import re
import shlex
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli import console
from orchestrator.cli.options import Files, Output, OutputOption, Sets, Sources, VarsFiles, load_all, load_topology
from orchestrator.errors import OrchestratorError


class Drawing(StrEnum):
    MERMAID = "mermaid"
    DOT = "dot"
    JSON = "json"


def register(app: typer.Typer) -> None:
    app.command()(init)
    app.command()(validate)
    app.command()(graph)
    app.command()(schema)


def init(
    name: Annotated[str, typer.Argument(metavar="FOLDER", help="The new folder; its name names the topology.")],
    output: OutputOption = Output.TEXT,
) -> None:
    """Make a folder with a topology and handlers that run."""
    if not name.strip():
        raise typer.BadParameter("FOLDER is empty; for the folder that you are in, write .")
    folder = Path(name)
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(os.path.abspath(folder)).lower()).strip("-") or "topology"
    slug = (slug if slug[0].isalpha() else f"t-{slug}")[:63].rstrip("-")
    starter = resources.files("orchestrator.cli") / "starter"
    files = {
        "topology.yaml": (starter / "topology.yaml")
        .read_text(encoding="utf-8")
        .replace("{name: NAME,", f"{{name: {slug},"),
        "agents.py": (starter / "agents.py").read_text(encoding="utf-8"),
        ".gitignore": ".orchestrator/\n__pycache__/\n",
    }
    try:
        taken = [file for file in files if (folder / file).exists()]
        if taken:
            raise OrchestratorError(
                f"{folder / taken[0]} exists already; nothing was written",
                hint="choose another folder: orchestrator init NAME",
            )
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OrchestratorError(f"cannot write {folder}: {error.strerror}", hint="choose another folder") from None
    if output is Output.JSON:
        console.data_json({"version": 1, "topology": slug, "folder": str(folder), "files": list(files)})
        return
    console.data(
        f"""{folder}/ is ready: topology.yaml says what runs, agents.py what it does.

  cd {"-- " * name.startswith("-")}{shlex.quote(str(folder))}
  orchestrator dev                                       # starts it all and follows your edits

and in a second terminal, in the same folder:

  orchestrator publish task.created '{{"topic": "tides"}}' --correlation-id first
  orchestrator trace first                               # what became of it
  orchestrator publish task.created '{{"topic": "the impossible"}}'
  orchestrator dlq list                                  # after three attempts
  orchestrator dlq redrive --set payload.topic=tides     # mend it and try again
"""
    )


def validate(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    handlers: Annotated[bool, typer.Option("--handlers", help="Import every handler and codec too.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the effective topology, secrets redacted.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check a topology offline: shape and meaning, all mistakes at once."""
    # YAML, Jinja and pydantic take longer to import than `--help` takes to print
    from orchestrator.operate import check
    from orchestrator.topology.diagnostics import TopologyError, render

    try:
        loaded = load_all([*(sources or []), *(files or [])], sets, vars_files, lint=True)
        found = [*loaded.warnings]
        for problem in [*check.handlers(loaded.topology), *check.codecs(loaded.topology)] if handlers else ():
            found.append(problem.diagnostic)
            if problem.traceback:
                console.say(problem.traceback.rstrip())
        errors = [d for d in found if strict or d.severity == "error"]
        if errors:
            raise TopologyError(found)
    except TopologyError as error:
        if output is Output.JSON:
            console.data_json({"version": 1, "valid": False, "diagnostics": check.diagnostics_json(error.diagnostics)})
        raise
    if found:
        console.say(render(found, color=console.wants_color(err=True)), painted=True)
    if output is Output.JSON:
        console.data_json(
            {
                "version": 1,
                "valid": True,
                "topology": loaded.topology.name,
                "revision": loaded.topology.revision(),
                "diagnostics": check.diagnostics_json(found),
                **({"effective": loaded.document()} if show else {}),
            }
        )
    elif show:
        console.data(loaded.show())
    else:
        t = loaded.topology
        counts = (("agent", t.agents), ("channel", t.channels), ("broker", t.brokers))
        parts = [f"{len(found)} {word}{'' if len(found) == 1 else 's'}" for word, found in counts]
        console.data(f"{t.name}: valid ({', '.join(parts)})")


def graph(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: Annotated[Drawing, typer.Option("-o", "--output", help="mermaid, dot or json.")] = Drawing.MERMAID,
) -> None:
    """Draw agents and channels, as Mermaid or Graphviz text."""
    # needs the loader
    from orchestrator.operate import graph as drawing

    topology = load_topology([*(sources or []), *(files or [])], sets, vars_files)
    if output is Drawing.JSON:
        console.data_json(drawing.to_json(topology))
    else:
        console.data(drawing.mermaid(topology) if output is Drawing.MERMAID else drawing.dot(topology))


def schema(output: OutputOption = Output.TEXT) -> None:
    """Print the JSON Schema of a topology file, for editors."""
    # pydantic
    from orchestrator.topology.schema import generate, text

    if output is Output.JSON:
        console.data_json({"version": 1, **generate()})  # a schema still: what it does not know it ignores
    else:
        console.data(text())
