"""Reads `variables:`, --set and --vars into Inputs. Runs after the files are merged, before any template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.topology.diagnostics import Problems, listing
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Broken, Map, Node, Scalar, Source, is_null, plain
from orchestrator.topology.shape import shown
from orchestrator.topology.source import parse, read
from orchestrator.topology.spec import VariableSpec
from orchestrator.topology.variables import Declared, Inputs


def declare(tree: Map, inputs: Inputs, problems: Problems) -> None:
    """Takes `variables:` out of the merged tree's view: names, defaults (unrendered) and descriptions."""
    section = tree.get("variables")
    if section is None or is_null(section) or isinstance(section, Broken):
        return
    if not isinstance(section, Map):
        problems.error("value", f"`variables` is {shown(section)}", section, expected="a mapping")
        return
    for key, node in section:
        if not key.text.isidentifier():
            problems.error("name", f'"{key.text}" cannot be a variable', key, expected="letters, digits and _")
        inputs.declared[key.text] = _declared(key, node, problems)


def _declared(key: Scalar, node: Node, problems: Problems) -> Declared:
    default, description = None, ""
    known = tuple(VariableSpec.model_fields)
    if isinstance(node, Map):
        for inner, value in node:
            if inner.text == "default":
                default = value
            elif inner.text == "description" and isinstance(value, Scalar) and isinstance(value.value, str):
                description = value.value
            elif inner.text in known:
                problems.error("value", f"`description` is {shown(value)}", value, expected="text")
            else:
                hint = near(inner.text, known)
                problems.error(
                    "unknown-key", f"unknown key `{inner.text}`", inner, expected=listing(known), suggestion=hint
                )
    elif not is_null(node) and not isinstance(node, Broken):
        expected = "{default: …, description: …}"
        hint = f"write {key.text}: {{default: {node.text}}}" if isinstance(node, Scalar) else None
        problems.error("value", f"the variable `{key.text}` is {shown(node)}", node, expected=expected, suggestion=hint)
        default = node  # meant as the default: its uses are no further mistakes
    return Declared(key.text, default, description)


def give(inputs: Inputs, sets: Mapping[str, str], vars_files: Sequence[Path], problems: Problems) -> list[Path]:
    """Values from outside; --set goes over --vars. Returns the files read."""
    read_files = []
    for path in vars_files:
        read_files.append(path.absolute())
        source = read(path.absolute(), str(path), problems)
        node = parse(source, problems) if source else None
        if isinstance(node, Map):
            for key, value in node:
                if key.text not in inputs.declared:
                    hint = near(key.text, inputs.declared)
                    problems.warning("unknown-variable", f"no topology declares `{key.text}`", key, suggestion=hint)
                inputs.given[key.text] = plain(value)
        elif node is not None and not is_null(node) and not isinstance(node, Broken):
            problems.error("value", f"{path} holds no mapping", node, expected="name: value")
    for name, said in sets.items():
        if name not in inputs.declared:
            problems.error(
                "unknown-variable",
                f"--set {name}: no such variable",
                expected=listing(inputs.declared) or "a topology with `variables:`",
                suggestion=near(name, inputs.declared),
            )
            continue
        node = parse(Source(f"--set {name}", None, Path.cwd(), said), problems)
        inputs.given[name] = plain(node) if node is not None else None
    return read_files
