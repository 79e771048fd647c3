"""What a worker process is told when it is forked. Plain data; the supervisor makes it.

Its places are text: what a `Path` runs would be written to memory that the worker shares with the others."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.topology.model import Topology


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One process of one agent: `slot` counts from 0 among the agent's replicas on this host."""

    topology: Topology
    agent: str
    slot: int
    run_dir: str

    @property
    def name(self) -> str:
        """The stable name of this place: of its journal, its lease, its static member."""
        return f"{self.agent}.{self.slot}"

    @property
    def journal(self) -> str:
        return f"{self.run_dir}/{self.name}.journal"
