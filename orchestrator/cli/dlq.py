"""Commands about dead letters: dlq list, show, redrive, purge."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import console
from orchestrator.cli.options import Files, Output, OutputOption, VarsFiles, Yes, given, load_topology, understood
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.operate.dlq import Selection
    from orchestrator.operate.reading import Read
    from orchestrator.topology.model import Topology

app = typer.Typer(help="Look at dead letters, give them back, or throw them away.", no_args_is_help=True)

Ids = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ID]...", callback=given, help="Event ids, beginnings of them, or positions."),
]
AgentFilter = Annotated[str | None, typer.Option("--agent", callback=given, help="Only those that died in this agent.")]
ErrorFilter = Annotated[
    str | None, typer.Option("--error", metavar="TEXT", callback=given, help="Only errors that contain this.")
]
Since = Annotated[
    str | None, typer.Option("--since", metavar="WHEN", callback=given, help="Only since: 15m (ago), or a time.")
]
Until = Annotated[
    str | None, typer.Option("--until", metavar="WHEN", callback=given, help="Only until: 15m (ago), or a time.")
]
All = Annotated[bool, typer.Option("--all", help="Every dead letter that the filters take.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
Variables = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Sets a variable of the topology.")
]


@dataclass(frozen=True, slots=True)
class Which:
    """The options that say which dead letters are meant; every one that is given must fit."""

    ids: Ids = None
    agent: AgentFilter = None
    error: ErrorFilter = None
    since: Since = None
    until: Until = None

    @property
    def given(self) -> bool:
        return any(astuple(self))

    def selection(self) -> Selection:
        # imports the brokers' client libraries
        from orchestrator.operate.dlq import Selection
        from orchestrator.operate.reading import moment

        since, until = (understood(moment, text) if text else None for text in (self.since, self.until))
        return Selection(tuple(self.ids or ()), self.agent, self.error, since, until)


def selecting(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of Which before its own; they come to it as one, called `which`."""
    options = list(inspect.signature(Which, eval_str=True).parameters.values())
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "which"]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        which = Which(**{option.name: values.pop(option.name) for option in options})
        command(which, **values)

    run.__signature__ = inspect.Signature([*options, *own])  # type: ignore[attr-defined]
    return run


@app.command("list")
@selecting
def list_(
    which: Which,
    files: Files = None,
    sets: Variables = None,
    vars_files: VarsFiles = None,
    groups: Annotated[bool, typer.Option("--groups", help="Count them by agent and error.")] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """List dead letters of all brokers."""
    # imports the brokers' client libraries
    from orchestrator.operate import dlq

    topology = load_topology(files, sets, vars_files)
    found = asyncio.run(dlq.search(topology, which.selection()))
    if output is Output.JSON:
        console.data_json(
            {
                "version": 1,
                "dead_letters": [dlq.letter_json(read) for read in found],
                "groups": [
                    {"agent": g.agent, "error": g.error, "count": g.count, "first": g.first, "last": g.last}
                    for g in dlq.groups(found)
                ],
            }
        )
    elif not found:
        console.say("no dead letters")
    elif groups:
        rows = [[str(g.count), g.agent, g.error, g.first, g.last] for g in dlq.groups(found)]
        console.data(console.table(["COUNT", "AGENT", "ERROR", "FIRST", "LAST"], rows))
    else:
        console.data(console.table(["ID", "TYPE", "AGENT", "ATTEMPTS", "DIED", "ERROR"], [_row(r) for r in found]))
        console.say("more: orchestrator dlq show ID · try again: orchestrator dlq redrive ID")


@app.command()
@selecting
def show(
    which: Which,
    files: Files = None,
    sets: Variables = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show dead letters in full: error, traceback, headers and payload."""
    # imports the brokers' client libraries
    from orchestrator.operate import dlq

    topology = load_topology(files, sets, vars_files)
    found, missing = _search(topology, which.selection())
    if output is Output.JSON:
        console.data_json({"version": 1, "dead_letters": [dlq.letter_json(read, full=True) for read in found]})
    else:
        console.data("\n\n".join(_full(read) for read in found))
    if missing:
        raise typer.Exit(1)


@app.command()
@selecting
def redrive(
    which: Which,
    files: Files = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="payload.X=VALUE", help="Mends the event first; or sets a variable: NAME=VALUE."),
    ] = None,
    vars_files: VarsFiles = None,
    rate: Annotated[float | None, typer.Option("--rate", min=0.001, help="At most so many a second.")] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Give dead letters back to the agent where they died, and to no other; attempts start anew."""
    # imports the brokers' client libraries
    from orchestrator.operate import dlq

    variables = [s for s in sets or [] if not _is_edit(s)]
    changes = understood(dlq.edits, dict(_split(s) for s in sets or [] if _is_edit(s)))
    topology = load_topology(files, variables, vars_files)
    found, missing = _search(topology, which.selection())
    if not dry_run:
        console.confirm(f"Give {_many(found)} back to {_agents(found)}?", yes=yes)
    results = asyncio.run(dlq.redrive_all(topology, found, changes, rate=rate, dry_run=dry_run))
    done = [r for r in results if not r.problem]
    if output is Output.JSON:
        rows = [{**dlq.letter_json(r.read), "redriven": not r.problem, "problem": r.problem} for r in results]
        console.data_json({"version": 1, "dry_run": dry_run, "results": rows})
    else:
        console.data(f"{'would give' if dry_run else 'gave'} {_many([r.read for r in done])} back")
    for result in results:
        if result.problem:
            console.warn(f"{_id(result.read)} stays: {result.problem}")
    if len(done) < len(results) or missing:
        raise typer.Exit(1)


@app.command()
@selecting
def purge(
    which: Which,
    files: Files = None,
    sets: Variables = None,
    vars_files: VarsFiles = None,
    everything: All = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Delete dead letters for good."""
    # imports the brokers' client libraries
    from orchestrator.operate import dlq

    if not (everything or which.given):
        raise typer.BadParameter("say which: IDs, --agent, --error, --since, --until, or --all")
    topology = load_topology(files, sets, vars_files)
    found, missing = _search(topology, which.selection())
    if dry_run:
        count = len(found)
    else:
        console.confirm(f"Delete {_many(found)} for good?", yes=yes)
        count = asyncio.run(dlq.purge_all(topology, found))
    if output is Output.JSON:
        console.data_json({"version": 1, "dry_run": dry_run, "purged": count})
    else:
        console.data(f"{'would delete' if dry_run else 'deleted'} {count} dead letter{'' if count == 1 else 's'}")
    if missing:
        raise typer.Exit(1)


def _search(topology: Topology, selection: Selection) -> tuple[list[Read], list[str]]:
    """The selected dead letters, and the ids that are none's, which are said; the rest of them is acted upon."""
    # imports the brokers' client libraries
    from orchestrator.operate import dlq

    found = asyncio.run(dlq.search(topology, selection))
    if not found:
        raise OrchestratorError("no dead letter fits", hint="see what is there: orchestrator dlq list")
    missing = selection.missing(found)
    for wanted in missing:
        console.warn(f"no dead letter fits {wanted}: orchestrator dlq list shows what is there")
    return found, missing


def _row(read: Read) -> list[str]:
    letter = read.letter
    assert letter is not None  # the search yields nothing else
    kind = read.event.event_type if read.event else read.stored.event_type or "?"
    lines = f"{letter.error_type}: {letter.message}".splitlines() or [""]
    return [_id(read), kind, letter.agent, str(letter.attempts), letter.last_failed_at[:19], lines[0][:80]]


def _full(read: Read) -> str:
    letter = read.letter
    assert letter is not None  # the search yields nothing else
    event = read.event
    lines = [
        f"{event.event_type if event else read.stored.event_type}  {event.event_id if event else read.stored.position}",
        f"  died in         {letter.agent}, reading {letter.channel} at {letter.position}",
        f"  reason          {letter.reason}, after {letter.attempts} attempt{'' if letter.attempts == 1 else 's'}",
        f"  failed          {letter.first_failed_at} … {letter.last_failed_at}",
        f"  lies at         {read.stored.position}",
        f"  error           {letter.error_type}: {letter.message}",
    ]
    if event is not None:
        lines.append(f"  correlation id  {event.correlation_id}")
        lines.append(f"  payload         {console.compact(event.payload)}")
    else:
        lines.append(f"  body            {read.stored.body[:2000].decode('utf-8', 'backslashreplace')}")
    if letter.traceback:
        lines += ["", *(f"  {line}" for line in letter.traceback.splitlines())]
    return "\n".join(lines)


def _id(read: Read) -> str:
    return read.event.event_id if read.event else read.stored.position


def _many(found: list[Read]) -> str:
    return f"{len(found)} dead letter{'' if len(found) == 1 else 's'}"


def _agents(found: list[Read]) -> str:
    return ", ".join(sorted({read.letter.agent for read in found if read.letter}))


def _is_edit(assignment: str) -> bool:
    """Variables have no dots in their names; paths into an event do."""
    return "." in assignment.partition("=")[0]


def _split(assignment: str) -> tuple[str, str]:
    name, sign, value = assignment.partition("=")
    if not sign:
        raise typer.BadParameter(f"--set takes payload.NAME=VALUE, not {assignment!r}")
    return name, value
