"""for_each, then every template: the merged tree becomes a tree of plain values. Second step of loading."""

from __future__ import annotations

from itertools import product
from typing import Any

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.nodes import Broken, List, Map, Node, Scalar, is_null, plain
from orchestrator.topology.shape import shown
from orchestrator.topology.templates import Renderer

_MOST = 10_000  # agents from one for_each
_MOST_VALUES = 1_000_000
_TAKEN = ("vars", "env", "secret")


def expand(tree: Map, renderer: Renderer) -> Map:
    """The tree without `for_each` and templates. `variables:` is left as it stands: it was read before."""
    out = Map(tree.source, tree.line, tree.column)
    for key, value in tree:
        name = renderer.key(key)
        if name is None:
            continue
        if name.text == "variables":
            out.put(name, value)
        elif name.text == "agents" and isinstance(value, Map):
            out.put(name, _agents(value, renderer))
        else:
            out.put(name, renderer.render(value))
    return out


def _agents(agents: Map, renderer: Renderer) -> Map:
    out = Map(agents.source, agents.line, agents.column)
    for key, node in agents:
        loop = node.get("for_each") if isinstance(node, Map) else None
        if loop is None or is_null(loop) or not isinstance(node, Map):
            _put(out, key, node, {}, renderer)
            continue
        body = Map(node.source, node.line, node.column)
        for inner, value in node:
            if inner.text != "for_each":
                body.put(inner, value)
        scopes = _scopes(renderer.render(loop), renderer.problems)
        if len(scopes) * _size(body) > _MOST_VALUES:
            expected = f"at most {_MOST_VALUES:,} in all"
            renderer.problems.error("for-each", "`for_each` makes too many values", loop, expected=expected)
            continue
        for scope in scopes:
            if not _put(out, key, body, scope, renderer):
                break  # the next ones would fail in the same way
    return out


def _size(node: Node) -> int:
    if isinstance(node, Map):
        return 1 + sum(_size(value) for _, value in node)
    return 1 + sum(map(_size, node.items)) if isinstance(node, List) else 1


def _put(out: Map, key: Scalar, node: Node, scope: dict[str, Any], renderer: Renderer) -> bool:
    name = renderer.key(key, scope)
    if name is None:
        return False
    if name.text in out.entries:
        names = " and ".join(f"`{n}`" for n in scope)
        renderer.problems.error(
            "duplicate-key",
            f"there are two agents `{name.text}`",
            key,
            expected=f"a name that tells them apart by {names}" if scope else "a name of its own for each",
            suggestion=f"{key.text}-{{{{ {next(iter(scope))} }}}}" if scope and not key.templated else None,
        )
        return False
    before = len(renderer.problems.found)
    out.put(name, renderer.render(node, scope))
    return len(renderer.problems.found) == before or not scope


def _scopes(loop: Node, problems: Problems) -> list[dict[str, Any]]:
    """Every combination of the values, in order."""
    if not isinstance(loop, Map):
        if not isinstance(loop, Broken):
            problems.error("for-each", f"`for_each` is {shown(loop)}", loop, expected="{name: [values]}")
        return []
    names: list[str] = []
    values: list[list[Any]] = []
    count = 1
    for key, node in loop:
        if not key.text.isidentifier() or key.text in _TAKEN:
            problems.error(
                "for-each",
                f'"{key.text}" cannot be a for_each variable',
                key,
                expected="a word of letters, digits and _",
            )
            return []
        if not isinstance(node, List):
            if not isinstance(node, Broken):
                problems.error("for-each", f"`{key.text}` is {shown(node)}", node, expected="a list of values")
            return []
        count *= len(node.items)
        if count > _MOST:
            problems.error("for-each", "too many combinations", key, expected=f"at most {_MOST:,}")
            return []
        names.append(key.text)
        values.append([plain(item) for item in node.items if not isinstance(item, Broken)])
    return [dict(zip(names, combination, strict=True)) for combination in product(*values)]
