"""What should run: the topology, its code, and what people asked for since. Plain data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from orchestrator.brokers import registry
from orchestrator.supervisor.rollout import Wanted, agent_digest
from orchestrator.topology.model import Agent, Topology


@dataclass(frozen=True)
class Target:
    """`code` are the digests of the handlers' code, by agent (code.digests)."""

    topology: Topology
    code: Mapping[str, str] = field(default_factory=dict)
    scaled: Mapping[str, int] = field(default_factory=dict)
    paused: Mapping[str, str] = field(default_factory=dict)  # agent -> reason
    rounds: Mapping[str, int] = field(default_factory=dict)  # restarts asked for

    def digest(self, agent: Agent) -> str:
        code = f"{self.code.get(agent.name, '')}:{self.rounds.get(agent.name, 0)}"
        return agent_digest(self.topology, agent, code)

    def replicas(self, agent: Agent) -> int:
        return self.scaled.get(agent.name, agent.replicas)

    def agents(self) -> dict[str, Agent]:
        """Those that we start."""
        return {name: agent for name, agent in self.topology.agents.items() if not agent.external}

    @property
    def key(self) -> str:
        """The topology's name in the warm parent."""
        return self.topology.revision()

    def wanted(self, gate: Collection[str] = ()) -> dict[str, Wanted]:
        return {
            name: Wanted(self.digest(agent), self.replicas(agent), self.overlap(agent), name in gate)
            for name, agent in self.agents().items()
        }

    def overlap(self, agent: Agent) -> bool:
        """Whether old and new workers of `agent` may run side by side on every broker that it reads from."""
        kinds = {self.topology.brokers[s.broker].kind for s in agent.subscriptions}
        return all(registry.adapter(kind).capabilities.overlap for kind in kinds)
