"""From YAML text to a Topology that is valid and complete, with every mistake found in one go.

Walk: files (YAML nodes with marks) -> templates -> document (shape) -> channels, agents (meaning) -> model.Topology.
No network and no handler import happens here. YAML and Jinja are imported when `load` is first asked for: a worker
gets its topology by `restore` and needs neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.topology.diagnostics import Diagnostic, TopologyError, render
from orchestrator.topology.handover import dump, restore

if TYPE_CHECKING:
    from orchestrator.topology.loader import Loaded, load

__all__ = ["Diagnostic", "Loaded", "TopologyError", "dump", "load", "render", "restore"]


def __getattr__(name: str) -> Any:
    if name in ("Loaded", "load"):
        from orchestrator.topology import loader  # lazy, see above

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
