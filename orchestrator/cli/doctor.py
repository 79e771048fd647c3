"""The command `doctor`: what this machine and its brokers are, and what to mend."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from orchestrator.cli import console
from orchestrator.cli.options import DEFAULT_FILE, Files, Output, OutputOption, Sets, VarsFiles, load_topology

if TYPE_CHECKING:
    from orchestrator.brokers.base import Fact

_SIGNS = {"ok": ("✓", "32"), "warning": ("!", "33"), "error": ("✗", "31")}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Check this machine, and the brokers of the topology if there is one. Exit code 1 when something is broken."""
    # imports the brokers' client libraries
    from orchestrator.operate import doctor as operate

    sections: list[tuple[str, list[Fact]]] = [("machine", operate.machine())]
    if files or Path(DEFAULT_FILE).exists():
        topology = load_topology(files, sets, vars_files)
        sections[0][1].append(operate.state(topology))

        async def look() -> None:
            sections.extend([section async for section in operate.brokers(topology)])

        asyncio.run(look())
    else:
        console.say(f"no {DEFAULT_FILE} here: only the machine is checked (name one with -f)")
    if output is Output.JSON:
        rows = [
            {"section": name, "name": f.name, "value": f.value, "level": f.level, "hint": f.hint}
            for name, facts in sections
            for f in facts
        ]
        console.data_json({"version": 1, "facts": rows})
    else:
        console.data("\n".join(_section(name, facts) for name, facts in sections), painted=True)
    if any(fact.level == "error" for _, facts in sections for fact in facts):
        raise typer.Exit(1)


def _section(name: str, facts: list[Fact]) -> str:
    lines = [name]
    width = max(len(fact.name) for fact in facts)
    for fact in facts:
        sign, color = _SIGNS[fact.level]
        lines.append(f"  {console.paint_out(sign, color)} {fact.name:<{width}}  {console.plain(fact.value)}")
        if fact.hint:
            lines.append(f"    {'':<{width}}  → {console.plain(fact.hint)}")
    return "\n".join(lines)
