"""Commands about events: publish, request, tail, trace, replay."""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import console
from orchestrator.cli.options import Files, Output, OutputOption, Sets, VarsFiles, Yes, given, load_topology, understood
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.event import AgentEvent
    from orchestrator.operate.reading import Read

# The modules of `operate` import pydantic, the wire and the broker's client: they are imported where a command runs,
# so that `--help` and usage errors answer at once.

EventTypeArgument = Annotated[
    str, typer.Argument(metavar="TYPE", callback=given, help="The event type, such as task.created.")
]
PayloadArgument = Annotated[str, typer.Argument(metavar="PAYLOAD", help="A JSON object, @FILE, or - for stdin.")]

EventId = Annotated[
    str | None, typer.Option("--id", callback=given, help="The event_id; twice the same takes effect once.")
]
Key = Annotated[
    str | None, typer.Option("--key", callback=given, help="What orders and partitions; default: the channel's key.")
]
CorrelationId = Annotated[
    str | None,
    typer.Option("--correlation-id", callback=given, help="What `trace` goes by; default: a new one."),
]
Target = Annotated[str | None, typer.Option("--target", callback=given, help="The one agent that is to handle it.")]


def register(app: typer.Typer) -> None:
    for command in (publish, request, tail, trace, replay):
        app.command()(command)


def publish(
    event_type: EventTypeArgument,
    payload: PayloadArgument,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    event_id: EventId = None,
    key: Key = None,
    correlation_id: CorrelationId = None,
    target: Target = None,
    delay: Annotated[str, typer.Option("--delay", help="Readers see it only then: 30s, 1h.")] = "0s",
    output: OutputOption = Output.TEXT,
) -> None:
    """Publish one event; returns when the broker has confirmed it."""
    from orchestrator.operate import publish as operate
    from orchestrator.operate.reading import duration

    wait = understood(duration, delay)
    content = operate.read_payload(payload)
    topology = load_topology(files, sets, vars_files)
    event = asyncio.run(
        operate.publish(
            topology,
            event_type,
            content,
            event_id=event_id,
            key=key,
            correlation_id=correlation_id,
            target_agent=target,
            delay=wait,
        )
    )
    if output is Output.JSON:
        console.data_json({"version": 1, "event": event.model_dump(mode="json")})
    else:
        channel = topology.channel_for(event_type)
        console.data(f"{event.event_type} {event.event_id} is in {channel.name}")
        if event_id is not None:
            window = f"within {channel.dedup_window:g} s, the dedup_window of {channel.name}"
            console.say(f"unless an event of this id was published {window}: then this one has no effect")
        if doubt := operate.foretell(topology, event_type, target):
            console.say(doubt)
        console.say(f"what becomes of it: orchestrator trace {shlex.quote(event.correlation_id)}")


def request(
    event_type: EventTypeArgument,
    payload: PayloadArgument,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    key: Key = None,
    correlation_id: CorrelationId = None,
    target: Target = None,
    timeout: Annotated[str, typer.Option("--timeout", help="How long to wait for the reply.")] = "30s",
    output: OutputOption = Output.TEXT,
) -> None:
    """Publish one event and wait for the reply of the agent that handles it. Exit code 1 when that says it failed."""
    from orchestrator.operate import publish as operate
    from orchestrator.operate.reading import duration

    patience = understood(duration, timeout)
    content = operate.read_payload(payload)
    topology = load_topology(files, sets, vars_files)
    if doubt := operate.foretell(topology, event_type, target):
        console.say(doubt)
    reply = asyncio.run(
        operate.request(
            topology,
            event_type,
            content,
            timeout=patience,
            key=key,
            correlation_id=correlation_id,
            target_agent=target,
        )
    )
    if output is Output.JSON:
        console.data_json({"version": 1, "reply": reply.model_dump(mode="json")})
    else:
        console.data_json(reply.payload)
    failure = reply.payload.get("error")
    if reply.payload.keys() == {"error"} and isinstance(failure, dict) and "type" in failure:
        raise OrchestratorError(
            f"the request failed: {failure['type']}: {failure.get('message', '')}",
            hint=f"orchestrator trace {shlex.quote(reply.correlation_id)} shows what became of it",
        )


def tail(
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="[TYPE]...", help="Event types; * is one token, > the rest.")
    ] = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    channel: Annotated[list[str] | None, typer.Option("--channel", help="Only this channel. Repeatable.")] = None,
    start: Annotated[
        str, typer.Option("--from", metavar="WHEN", help="latest, earliest, 15m (ago), or a time.")
    ] = "latest",
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Go on, or end at the present end.")] = True,
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=1, help="End after so many events.")] = None,
    correlation_id: Annotated[str | None, typer.Option("--correlation-id", callback=given, help="Only these.")] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Follow events as they are published; no queue and no agent notices."""
    from orchestrator.operate import tail as operate
    from orchestrator.operate.reading import when

    begin = understood(when, start)
    topology = load_topology(files, sets, vars_files)
    for doubt in operate.unheard(topology, channel or [], patterns or []):
        console.say(doubt)

    async def run() -> None:
        shown = 0
        async for read in operate.tail(
            topology, channels=channel or [], patterns=patterns or [], start=begin, follow=follow
        ):
            if correlation_id is not None and (read.event is None or read.event.correlation_id != correlation_id):
                continue
            if output is Output.JSON:
                console.data_line({"version": 1, **read.to_json()})
            else:
                console.data(_line(read))
            shown += 1
            if shown == limit:
                return

    asyncio.run(run())


def trace(
    correlation_id: Annotated[str, typer.Argument(metavar="CORRELATION_ID", callback=given)],
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Draw what became of one correlation id, over all channels, as a causal tree."""
    from orchestrator.operate import trace as operate

    topology = load_topology(files, sets, vars_files)
    found = asyncio.run(operate.trace(topology, correlation_id))
    if not found:
        raise OrchestratorError(
            f"nothing is stored under the correlation id {correlation_id!r}",
            hint="see what is there: orchestrator tail --from earliest --no-follow",
        )
    if output is Output.JSON:
        console.data_json(operate.to_json(correlation_id, found))
    else:
        console.data(operate.draw(topology, operate.tree(found)))


def replay(
    agent: Annotated[str, typer.Argument(metavar="AGENT")],
    start: Annotated[str, typer.Option("--from", metavar="WHEN", help="earliest, latest, 1h (ago), or a time.")],
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    yes: Yes = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Move an agent's position in the logs that it reads, so that it handles events again, or leaves some out."""
    from orchestrator.operate import replay as operate

    begin = understood(operate.place, start)
    topology = load_topology(files, sets, vars_files)
    subscriptions = operate.replayable(topology, agent)
    names = ", ".join(s.channel for s in subscriptions)
    console.confirm(f"Move {agent} to {start} in {names}?", yes=yes)
    asyncio.run(operate.replay(topology, subscriptions, begin))
    if output is Output.JSON:
        console.data_json({"version": 1, "agent": agent, "from": start, "channels": [s.channel for s in subscriptions]})
    else:
        console.data(f"{agent} goes on from {start} in {names}")


def _line(read: Read) -> str:
    from orchestrator.operate.reading import time_of_day

    event: AgentEvent | None = read.event
    if event is None:
        return f"{'?':>12}  {read.channel.name}  {read.stored.event_type or '?'}  {read.problem}"
    who = f"{event.source_agent or '-'}{f' → {event.target_agent}' if event.target_agent else ''}"
    payload = console.compact(event.payload)
    return f"{time_of_day(event)}  {read.channel.name}  {event.event_type}  {who}  {event.correlation_id}  {payload}"
