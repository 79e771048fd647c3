"""Moves an agent's position in the logs that it reads: the command `replay`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from orchestrator.brokers.base import Start
from orchestrator.errors import OrchestratorError
from orchestrator.operate.reading import when
from orchestrator.operate.session import session
from orchestrator.supervisor.control import ControlClient, running
from orchestrator.topology.model import Mode, Subscription, Topology


def place(text: str) -> Start:
    """Where to go on, as reading.when; a time that has not come yet would leave out all until then."""
    found = when(text)
    if isinstance(found, datetime) and found > datetime.now(UTC):
        raise OrchestratorError(f"{text} lies in the future", hint="write latest to leave out all that is there now")
    return found


def replayable(topology: Topology, agent: str) -> list[Subscription]:
    """The agent's subscriptions to logs. Raises OrchestratorError when there is no such agent, or it reads no log."""
    if agent not in topology.agents:
        raise OrchestratorError(f"there is no agent {agent!r}", hint=f"the agents are: {', '.join(topology.agents)}")
    found = [s for s in topology.agents[agent].subscriptions if topology.channels[s.channel].mode is Mode.LOG]
    if not found:
        raise OrchestratorError(
            f"agent {agent} reads no log, and a queue forgets what was handled",
            hint="set `mode: log` on the channel to be able to replay it",
        )
    return found


async def replay(topology: Topology, subscriptions: Sequence[Subscription], start: Start) -> None:
    """Drains the agent's workers if a supervisor runs them, moves its positions, and lets it go on.

    Raises SupervisorError, BrokerUnavailable, ResourceMissing.
    """
    agents = {s.agent for s in subscriptions}
    control = ControlClient(topology.state_dir)
    async with session(topology, name="replay") as connections:
        drained: dict[str, int] = {}
        try:
            if running(topology.state_dir):
                for row in (await control.status())["agents"]:
                    if row["name"] in agents:
                        drained[row["name"]] = row["replicas"]
                        await control.scale(row["name"], 0)
            for subscription in subscriptions:
                connection = await connections.get(subscription.broker)
                await connection.seek(subscription, start)
        finally:
            for agent, replicas in drained.items():
                await control.scale(agent, replicas)
