"""Commands that talk to the supervisor over its socket: stop, status, logs, restart, scale, pause, resume."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestrator.cli import console
from orchestrator.cli.options import DEFAULT_FILE, Files, Output, OutputOption, Sets, Sources, VarsFiles, load_topology
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.supervisor.control import ControlClient
    from orchestrator.topology.model import Topology

# The control client imports asyncio streams and the topology's dump: imported where a command runs.

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT")]
AgentsArgument = Annotated[list[str] | None, typer.Argument(metavar="[AGENT]...", help="Default: all.")]

_COLORS = {"running": "32", "failed": "31", "crash-loop": "31", "unhealthy": "31", "degraded": "31", "paused": "33"}


def register(app: typer.Typer) -> None:
    for command in (stop, status, logs, restart, scale, pause, resume):
        app.command()(command)


def stop(
    files: Files = None, sets: Sets = None, vars_files: VarsFiles = None, output: OutputOption = Output.TEXT
) -> None:
    """Drain the workers and end the supervisor. What is on the brokers stays."""
    topology = _running(files, sets, vars_files)
    control = _control(topology)
    asyncio.run(control.ping())  # nothing is said to be draining where nothing runs
    console.say(f"draining the workers of {topology.name}")
    asyncio.run(control.stop())
    _done(output, topology, f"{topology.name} has stopped")


def status(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what runs: each agent's state, workers, backlog and dead letters."""
    topology = _running([*(sources or []), *(files or [])], sets, vars_files)
    found = asyncio.run(_control(topology).status())
    if output is Output.JSON:
        console.data_json(found)
        return
    header = ["AGENT", "STATE", "READY", "RESTARTS", "LAG", "IN FLIGHT", "OLDEST", "DEAD"]
    rows = [
        [
            agent["name"],
            agent["state"],
            f"{agent['ready']}/{agent['replicas']}",
            str(agent["restarts"]),
            _number(agent["lag"]),
            _number(agent["in_flight"]),
            "-" if agent["oldest_s"] is None else f"{agent['oldest_s']:.1f}s",
            _number(agent["dead"]),
        ]
        for agent in found["agents"]
    ]
    state = console.paint_out(found["state"], _COLORS.get(found["state"], "0"))
    console.data(f"{found['topology']} (revision {found['revision']}): {state}", painted=True)
    console.data(console.table(header, rows))
    for agent in found["agents"]:
        if agent.get("reason"):
            console.say(f"{agent['name']} is {agent['state']}: {agent['reason']}")
        for text in agent.get("alarms", []):
            console.say(f"{agent['name']}: {text}")


def logs(
    agents: AgentsArgument = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    follow: Annotated[bool, typer.Option("--follow", "-F", help="Go on with new lines.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last lines.")] = 100,
    output: OutputOption = Output.TEXT,
) -> None:
    """Show what agents and supervisor have written."""
    from orchestrator.supervisor.logfiles import recent
    from orchestrator.supervisor.logs import Painter

    topology = _running(files, sets, vars_files)
    unknown = [a for a in agents or [] if a not in topology.agents and a != "supervisor"]
    if unknown:
        raise OrchestratorError(
            f"there is no agent {unknown[0]!r}", hint=f"the agents are: {', '.join(topology.agents)}; or supervisor"
        )
    painter = Painter(console.colored(sys.stdout))
    painter.align(topology.agents)

    def show(record: dict[str, Any]) -> None:
        if output is Output.JSON:
            console.data_line({"version": 1, **record})
        else:
            shown = {key: console.plain(value) if isinstance(value, str) else value for key, value in record.items()}
            console.data(painter.paint(shown), painted=True)

    async def stream() -> None:
        async for record in _control(topology).logs(agents or [], lines=lines, follow=True):
            show(record)

    if follow:
        asyncio.run(stream())
    else:
        found = recent(topology.state_dir / "logs", agents or [], lines)
        for record in found:
            show(record)
        if not found:
            console.say(f"{', '.join(agents or [topology.name])}: nothing has been written yet")


def restart(
    agent: Annotated[str | None, typer.Argument(metavar="[AGENT]", help="Default: all.")] = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Replace workers: new ones are ready before the old drain."""
    topology = _running(files, sets, vars_files)
    text = f"{agent or 'all agents'} restarted"
    _ask(output, topology, lambda control: control.restart(agent, console.progress), text, agent=agent)


def scale(
    agent: AgentArgument,
    replicas: Annotated[
        int, typer.Argument(min=0, max=10_000, metavar="REPLICAS", help="Worker processes on this host.")
    ],
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Change an agent's number of workers until the next apply."""
    topology = _running(files, sets, vars_files)
    text = f"{agent} has {replicas} worker{'' if replicas == 1 else 's'}, until the next apply"
    scaled = {"agent": agent, "replicas": replicas}
    _ask(output, topology, lambda control: control.scale(agent, replicas, console.progress), text, **scaled)


def pause(
    agent: AgentArgument,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let an agent finish what it handles and fetch nothing new."""
    text = f"{agent} is paused; go on with: orchestrator resume {agent}"
    _ask(output, _running(files, sets, vars_files), lambda control: control.pause(agent), text, agent=agent)


def resume(
    agent: AgentArgument,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """Let a paused agent go on."""
    topology = _running(files, sets, vars_files)
    _ask(output, topology, lambda control: control.resume(agent), f"{agent} goes on", agent=agent)


def _running(files: list[str] | None, sets: list[str] | None, vars_files: list[Path] | None) -> Topology:
    """The file's topology; when an edit broke the file, what the supervisor beside it runs: that can be looked at and
    stopped all the same. Raises what is wrong with the file when nothing runs."""
    from orchestrator.supervisor.control import ControlClient

    try:
        return load_topology(files, sets, vars_files)
    except OrchestratorError as broken:
        first = (files or [DEFAULT_FILE])[0]
        folder = Path.cwd() if first == "-" else Path(os.path.abspath(first)).parent
        try:
            topology = asyncio.run(ControlClient(folder / ".orchestrator").topology())
        except OrchestratorError:
            raise broken from None
        console.hide(topology.secrets)
        console.complain(broken)
        console.warn(f"this is about {topology.name} as it runs, whatever the file says")
        return topology


def _control(topology: Topology) -> ControlClient:
    from orchestrator.supervisor.control import ControlClient

    return ControlClient(topology.state_dir)


def _ask(
    output: Output,
    topology: Topology,
    request: Callable[[ControlClient], Coroutine[Any, Any, None]],
    text: str,
    **more: Any,
) -> None:
    """One request of the supervisor, and what is said when it has done it."""
    asyncio.run(request(_control(topology)))
    _done(output, topology, text, **more)


def _done(output: Output, topology: Topology, text: str, **more: Any) -> None:
    if output is Output.JSON:
        console.data_json({"version": 1, "topology": topology.name, "done": True, **more})
    else:
        console.data(text)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
