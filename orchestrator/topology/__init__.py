"""From YAML text to a Topology that is valid and complete, with every mistake found in one go.

Walk: source (YAML nodes with marks) -> templates -> spec (shape) -> resolve (meaning) -> model.Topology.
No network and no handler import happens here.
"""

from orchestrator.topology.diagnostics import Diagnostic, TopologyError, render
from orchestrator.topology.handover import dump, restore
from orchestrator.topology.loader import Loaded, load

__all__ = ["Diagnostic", "Loaded", "TopologyError", "dump", "load", "render", "restore"]
