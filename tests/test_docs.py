"""The docs are true: their files load, their code runs, their commands exist, their links lead somewhere.

A fence says by a second word what it is: ```yaml is a whole topology, ```yaml fragment is laid over BASE, ```yaml wrong
is followed by what `validate` says of it; ```python nats (kafka, redis) is a client that really talks to that server.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from orchestrator.brokers import registry
from orchestrator.cli.main import app
from orchestrator.topology.diagnostics import TopologyError, render
from orchestrator.topology.loader import load
from orchestrator.worker.handlers import bind
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    page
    for place in ("*.md", "docs/**/*.md", "examples/**/*.md", "topologies/**/*.md", "tests/*.md", "benchmarks/*.md")
    for page in ROOT.glob(place)
)

BASE = """
apiVersion: orchestrator/v1
kind: Topology
metadata: {name: base}
channels:
  tasks: {events: [task.*], mode: queue}
  events: {events: [agent.*], mode: log}
  dead-letters: {mode: log}
agents:
  research:
    handler: agents:research
    subscribe: [task.assigned]
    dead_letter: dead-letters
"""


@dataclass(frozen=True)
class Block:
    """One fenced block; `info` is what follows the backticks."""

    page: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """Every fenced block of every page."""
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M):
            yield Block(page, text[: found.start()].count("\n") + 1, found[1].strip(), found[2])


BLOCKS = list(blocks())


def of(*infos: str) -> list[Block]:
    return [block for block in BLOCKS if block.info in infos]


# --- topologies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_a_topology_in_the_docs_is_valid_without_a_warning(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(block.text)
    assert not load([file]).warnings


@pytest.mark.parametrize("block", of("yaml fragment"), ids=str)
def test_a_fragment_in_the_docs_fits_into_a_topology(block: Block, tmp_path: Path) -> None:
    base, fragment = tmp_path / "base.yaml", tmp_path / "fragment.yaml"
    base.write_text(BASE)
    fragment.write_text(block.text)
    load([base, fragment])


@pytest.mark.parametrize("block", of("yaml wrong"), ids=str)
def test_a_wrong_topology_is_reported_as_shown(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("topology.yaml").write_text(block.text)
    shown = next(other for other in of("text") if other.page == block.page and other.line > block.line)
    with pytest.raises(TopologyError) as error:
        load(["topology.yaml"])
    shown_errors, _, count = shown.text.strip().rpartition("\n")
    assert render(error.value.diagnostics).strip() == shown_errors
    assert count == f"{len(error.value.diagnostics)} errors"


def test_every_key_of_the_file_is_in_its_reference() -> None:
    """The reference cannot fall behind the schema."""
    code = " ".join(re.findall(r"`[^`\n]+`", (ROOT / "docs/topology.md").read_text()))
    schema = json.loads((ROOT / "schemas/topology.v1.schema.json").read_text())
    for name, definition in schema["$defs"].items():
        if name in ("AgentDefaults", "ChannelDefaults"):
            continue  # keys of other sections again
        for key in definition.get("properties", {}):
            assert re.search(rf"\b{key}\b", code), f"docs/topology.md does not tell of {name}: {key}"


# --- code -----------------------------------------------------------------------------------------------------


def run(block: Block, name: str) -> types.ModuleType:
    """The block as a module of its own."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(block.text, str(block), "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_code_in_the_docs_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name = f"docs_block_{block.page.stem}_{block.line}"
    try:
        module = run(block, name)
        tests = [value for word, value in vars(module).items() if word.startswith("test_")]
        for test in tests:
            test(**{"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {})
    finally:
        del sys.modules[name]


def test_handlers_in_the_docs_are_handlers(tmp_path: Path) -> None:
    """Every function of a handler block, but for lifespans and tests, is one that a worker would call."""
    found = 0
    for block in of("python"):
        if "Context" not in block.text:
            continue
        name = f"docs_handlers_{block.line}"
        module = run(block, name)
        try:
            for function in vars(module).values():
                own = inspect.isfunction(function) and function.__module__ == name
                if own and function.__name__ != "lifespan" and not function.__name__.startswith("test_"):
                    bind(function, "docs")
                    found += 1
        finally:
            del sys.modules[name]
    assert found >= 6


# --- clients from outside -------------------------------------------------------------------------------------


def orchestrator(*args: str, cwd: Path) -> str:
    command = [sys.executable, "-m", "orchestrator.cli", *args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["nats", "kafka", "redis"])
def test_an_outside_client_joins_as_shown(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(f"{kind}_server")
    url = str(server.url)
    wire = ROOT / "docs/wire.md"
    [topology] = [block for block in of("yaml") if block.page == wire]
    (tmp_path / "topology.yaml").write_text(topology.text)
    chosen = ("--set", f"url={url}")
    orchestrator("apply", "--yes", "--no-workers", *chosen, cwd=tmp_path)
    try:
        [client] = of(f"python {kind}")
        name = f"docs_client_{kind}"
        asyncio.run(run(client, name).main(url))
        del sys.modules[name]
        stored = tail(tmp_path, chosen)
        assert [(e["event_id"], e["payload"]) for e in stored] == [("order-17", {"query": "tides"})]

        tool = {"kafka": "kcat", "redis": "redis-cli"}.get(kind)
        if tool is not None and shutil.which(tool):
            host, port = url.rpartition("/")[2].rsplit(":", 1)
            for line in lines_of(wire, tool):
                line = line.replace("127.0.0.1:9092", f"{host}:{port}")
                line = line.replace("redis-cli", f"redis-cli -h {host} -p {port.split('/')[0]}")
                done = subprocess.run(
                    ["bash", "-c", line], capture_output=True, text=True, timeout=2 * PATIENCE, check=False
                )
                assert done.returncode == 0, done.stdout + done.stderr
                assert "ERR" not in done.stdout
            assert [e["payload"] for e in tail(tmp_path, chosen)] == [{"query": "tides"}] * 2
    finally:
        losses = [f"--allow-loss={name}" for name in ("hello-tasks", "{hello}-tasks")]
        orchestrator("destroy", "--yes", *losses, *chosen, cwd=tmp_path)


def tail(folder: Path, chosen: tuple[str, ...]) -> list[dict[str, Any]]:
    out = orchestrator("tail", "task.*", "--from", "earliest", "--no-follow", "-o", "json", *chosen, cwd=folder)
    return [json.loads(line) for line in out.splitlines()]


def lines_of(page: Path, tool: str) -> list[str]:
    """The commands of that tool which the page shows."""
    return [
        line.removeprefix("$ ")
        for block in of("console")
        if block.page == page
        for line in block.text.splitlines()
        if tool in line
    ]


# --- commands -------------------------------------------------------------------------------------------------


def commands() -> list[tuple[Block, str]]:
    """(block, words) of each `orchestrator …` that a console block shows."""
    return [
        (block, part.strip())
        for block in of("console")
        for line in block.text.splitlines()
        for part in re.split(r"&&|;", line.removeprefix("$ ").partition(" #")[0])
        if part.strip().startswith("orchestrator ")
    ]


@pytest.mark.parametrize(("block", "line"), commands(), ids=str)
def test_a_command_in_the_docs_exists_with_its_options(block: Block, line: str) -> None:
    understood(shlex.split(line)[1:])


def test_commands_in_running_text_exist() -> None:
    for page in PAGES:
        for line in re.findall(r"`orchestrator ([a-z][^`]*)`", page.read_text()):
            words = [word for word in shlex.split(line) if word != "…"]
            understood(words, complete=False)


def understood(words: list[str], *, complete: bool = True) -> None:
    """Walks down to the command, and lets it parse the rest; `complete` asks for its arguments too."""
    command: Any = typer.main.get_command(app)
    context = click.Context(command, info_name="orchestrator")
    while hasattr(command, "commands"):
        assert words, f"{context.command_path} is no command by itself"
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
        context = click.Context(command, parent=context)
    if complete:
        command.make_context(command.name, words, parent=context.parent)
        return
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    for word in words:
        assert not word.startswith("-") or word.partition("=")[0] in known, f"{command.name} has no {word}"


# --- links and tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else Path(os.path.normpath(page.parent / path))
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", there.read_text(), re.M)
            assert anchor in {anchor_of(heading) for heading in headings}, f"{target}: no such heading"


def anchor_of(heading: str) -> str:
    """As forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


#: A row of docs/brokers.md, by the capability that it tells.
ROWS = {
    "lease: an event of a vanished host runs elsewhere after": "lease",
    "outputs and settlement take effect in one step": "atomic_settle",
    "`retention.max_events`": "max_events",
    "`overflow: reject`": "overflow_reject",
    "`dedup_window` at publish": "publish_dedup",
    "`partitions`": "partitions",
    "`ctx.publish(delay=)`": "delayed_publish",
    "ordered by the channel's `key` within a partition": "key_order",
    "a queue's space comes back when an event is settled": "frees_on_settle",
    "at a reload the new worker consumes while the old one drains": "overlap",
}


def test_the_table_of_capabilities_is_the_adapters_own() -> None:
    adapters = [registry.adapter(kind).capabilities for kind in ("nats", "kafka", "redis")]
    told = set(ROWS.values()) | {"kind", "notes"}
    assert told == set(type(adapters[0]).__dataclass_fields__), "docs/brokers.md does not tell of every capability"
    rows = {
        cells[0]: cells[1:]
        for line in (ROOT / "docs/brokers.md").read_text().splitlines()
        if line.startswith("| ") and len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 4
    }
    for words, name in ROWS.items():
        values = [getattr(each, name) for each in adapters]
        shown = [f"{v:g} s" if name == "lease" else "yes" if v else "no" for v in values]
        assert rows[words] == shown, words


def test_every_decision_is_in_the_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text()
    for decision in (ROOT / "docs/adr").glob("0*.md"):
        assert f"({decision.name})" in index
        assert decision.read_text().startswith("# " + str(int(decision.name[:4])) + ". ")
