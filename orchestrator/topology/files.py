"""Several files become one tree of nodes: includes, then overrides. Part of the first step of loading.

Nodes keep their marks, so that an error in the merged whole still names the file and line it comes from.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.near import near
from orchestrator.topology.nodes import Broken, List, Map, Node, Scalar, Source, is_null
from orchestrator.topology.source import parse, read, text

_MOST_FILES = 1000
_SECTIONS = ("variables", "brokers", "channels", "retry_policies", "agents", "metadata", "defaults")


@dataclass(slots=True)
class Files:
    """Reads sources and what they include. `read` are all files touched, in order."""

    problems: Problems
    stdin: str | None
    render: Callable[[Node, Map], Node]  # fills templates in `include:` of the file given
    read: list[Path] = field(default_factory=list)
    root: Path | None = None  # folder of the first source
    _seen: set[Path] = field(default_factory=set)

    def merged(self, sources: Sequence[str | Path]) -> Map | None:
        """All sources as one mapping; later ones override. None when one of them cannot be read."""
        trees = [self._source(source) for source in sources]
        whole = [tree for tree in trees if tree is not None]
        if not whole or len(whole) < len(trees):
            return None
        out = whole[0]
        for tree in whole[1:]:
            out = override(out, tree)
        return out

    def _source(self, said: str | Path) -> Map | None:
        if str(said) == "-":
            here = Path.cwd()
            self.root = self.root or here
            source = text(self.stdin or "", Source("<stdin>", None, here, ""), self.problems)
            return self._tree(source, here, ()) if source else None
        path = Path(os.path.abspath(said))
        self.root = self.root or path.parent
        self.read.append(path)
        source = read(path, str(said), self.problems)
        self._seen = {path.resolve()} if path.exists() else set()
        return self._tree(source, path.parent, (path.resolve(),)) if source else None

    def _tree(self, source: Source, top: Path, chain: tuple[Path, ...]) -> Map | None:
        """One file with its includes merged in. `top` is the folder that includes must not leave."""
        node = parse(source, self.problems)
        if node is None or is_null(node):
            if not self.problems.errors:
                at = Broken(source, 1, 1)
                self.problems.error("empty", f"{source.name} is empty", at, expected="apiVersion: orchestrator/v1 …")
            return None
        if not isinstance(node, Map):
            if not isinstance(node, Broken):
                self.problems.error("value", f"{source.name} holds no mapping", node, expected="a mapping of sections")
            return None
        if "include" not in node.entries:
            return node
        included = self._included(node, top, chain)
        if included is None:
            return None
        rest = Map(node.source, node.line, node.column)
        for key, value in node:
            if key.text != "include":
                rest.put(key, value)
        return override(included, rest)

    def _included(self, node: Map, top: Path, chain: tuple[Path, ...]) -> Map | None:
        """What a file includes, merged; empty when it includes nothing."""
        out = Map(node.source, node.line, node.column)
        wanted = node.entries["include"][1]
        if wanted.templated:
            wanted = self.render(wanted, node)
        if is_null(wanted) or isinstance(wanted, Broken):
            return out
        if not isinstance(wanted, List):
            self.problems.error("value", "`include` is no list", wanted, expected="a list of files: [common/*.yaml]")
            return out
        whole = True
        for item in wanted.items:
            for path in self._matches(item, top):
                tree = self._include(path, item, top, chain)
                whole = whole and tree is not None
                if tree is not None:
                    self._join(out, tree)
        return out if whole else None

    def _matches(self, item: Node, top: Path) -> list[Path]:
        if isinstance(item, Broken):
            return []
        if not isinstance(item, Scalar) or not isinstance(item.value, str) or not item.value:
            self.problems.error("value", "an entry of `include` is no text", item, expected="a file or a glob")
            return []
        pattern = os.path.normpath(item.source.folder / item.value)
        if not Path(pattern).is_relative_to(top):
            self._outside(item, top)
            return []
        # One more than allowed is enough to know that there are too many.
        found = sorted(
            islice((Path(p) for p in glob.iglob(pattern, recursive=True) if os.path.isfile(p)), _MOST_FILES + 1)
        )
        wild = glob.has_magic(pattern)
        if wild:
            found = [p for p in found if p != item.source.path]  # *.yaml is not meant to be itself
        if not found and wild:
            self.problems.warning("include", f"nothing matches {item.value}", item)
        elif not found:
            folder = Path(pattern).parent
            hint = near(Path(pattern).name, [p.name for p in folder.iterdir()] if folder.is_dir() else ())
            self.problems.error("include", f"there is no file {item.value}", item, suggestion=hint)
        inside = [p for p in found if p.resolve().is_relative_to(top.resolve())]
        if len(inside) < len(found):
            self._outside(item, top)
        if len(self._seen) + len(inside) > _MOST_FILES:
            self.problems.error(
                "include", f"{item.value} matches too many files", item, expected=f"at most {_MOST_FILES}"
            )
            return []
        return inside

    def _outside(self, item: Scalar, top: Path) -> None:
        message = f"{item.value} leaves the folder of the topology"
        self.problems.error("include", message, item, expected=f"files in {_shown(top)} and below")

    def _include(self, path: Path, item: Node, top: Path, chain: tuple[Path, ...]) -> Map | None:
        real = path.resolve()
        if real in chain:
            names = " → ".join(p.name for p in (*chain[chain.index(real) :], real))
            self.problems.error("include-cycle", f"files include one another: {names}", item)
            return None
        if real in self._seen:
            return Map(item.source, item.line, item.column)  # by another way already
        self._seen.add(real)
        self.read.append(path)
        source = read(path, _shown(path), self.problems, item)
        return self._tree(source, top, (*chain, real)) if source else None

    def _join(self, out: Map, tree: Map) -> None:
        """Adds an included file; the same entry in two of them is an error that names both."""
        for key, value in tree:
            if key.text not in out.entries:
                copy = value
                if isinstance(value, Map) and key.text in _SECTIONS:
                    copy = Map(value.source, value.line, value.column)
                    for inner, item in value:
                        copy.put(inner, item)
                out.put(key, copy)
                continue
            first, there = out.entries[key.text]
            if isinstance(there, Map) and isinstance(value, Map) and key.text in _SECTIONS:
                for inner, item in value:
                    if inner.text in there.entries:
                        self._twice(f"{key.text}.{inner.text}", inner, there.entries[inner.text][0])
                    else:
                        there.put(inner, item)
                out.templated = out.templated or there.templated
            elif not (isinstance(there, Scalar) and isinstance(value, Scalar) and there.value == value.value):
                self._twice(key.text, key, first)

    def _twice(self, name: str, at: Node, first: Node) -> None:
        self.problems.error(
            "include-conflict",
            f"`{name}` is in two included files: {first.mark.file} and {at.mark.file}",
            at,
            expected=f"one of them; the other is at {first.mark}",
        )


def override(base: Map, over: Map) -> Map:
    """`over` on top of `base`: maps merge, lists and scalars replace, null removes."""
    out = Map(base.source, base.line, base.column)
    for key, value in base:
        out.put(key, value)
    for key, value in over:
        there = out.get(key.text)
        if is_null(value) and there is not None:
            del out.entries[key.text]
        elif isinstance(there, Map) and isinstance(value, Map):
            out.put(key, override(there, value))
        else:
            out.put(key, value)
    return out


def _shown(path: Path) -> str:
    """A path as a person would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
