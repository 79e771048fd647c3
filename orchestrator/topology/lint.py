"""Warnings about a valid topology: what is probably not meant, and what a broker cannot do. Last step of loading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.model import Topology


class Abilities(Protocol):
    """What lint asks of orchestrator.brokers.base.Capabilities."""

    max_events: bool
    overflow_reject: bool
    partitions: bool
    publish_dedup: bool


def lint(topology: Topology, problems: Problems, abilities: Callable[[str], Abilities | None] | None) -> None:
    """Adds a warning for each finding."""
