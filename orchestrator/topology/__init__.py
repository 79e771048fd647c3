"""From YAML text to a Topology that is valid and complete, with every mistake found in one go.

Walk: source (YAML nodes with marks) -> templates -> spec (shape) -> resolve (meaning) -> model.Topology.
No network and no handler import happens here.
"""
