"""Digests of the handlers' code, so that an edit of one agent's module replaces that agent alone.

What counts for an agent is its module and all that it imports from beside the topology file, found by reading the
sources: nothing is imported here. Code that imports by computed names counts as importing every module there is.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

from orchestrator.topology.model import Topology

#: Folders that hold no handlers.
SKIPPED = frozenset({"__pycache__", "node_modules", "site-packages"})

_COMPUTED = frozenset({"importlib", "__import__", "runpy", "exec"})


def digests(topology: Topology) -> dict[str, str]:
    """By agent name; "" for an agent without code beside the topology file. Unreadable files count as empty."""
    reader = _Reader(topology.root)
    codecs = {c.codec.partition(":")[0] for c in topology.channels.values() if ":" in c.codec}
    found: dict[str, str] = {}
    for name, agent in topology.agents.items():
        if agent.handler is not None and agent.handler.kind == "python":
            found[name] = reader.digest({agent.handler.call.partition(":")[0], *codecs})
    return found


def python_files(root: Path) -> Iterator[Path]:
    """Every Python file under `root` that may be handler code."""
    for folder in folders(root):
        yield from sorted(path for path in folder.glob("*.py") if path.is_file())


def folders(root: Path) -> Iterator[Path]:
    """`root` and the folders below it that may hold handler code: not hidden, no virtual environment, no cache."""
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        yield folder
        try:
            below = sorted(folder.iterdir())
        except OSError:  # removed or forbidden while we look: it holds nothing for us
            continue
        waiting += [
            each
            for each in below
            if each.name not in SKIPPED
            and not each.name.startswith(".")
            and each.is_dir()
            and not each.is_symlink()
            and not (each / "pyvenv.cfg").exists()
        ]


class _Reader:
    """The files of one topology, each read once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._read: dict[Path, tuple[bytes, frozenset[str], bool]] = {}

    def digest(self, modules: set[str]) -> str:
        files = self._closure(modules)
        if not files:
            return ""
        total = hashlib.sha256()
        for path in sorted(files):
            content = self._file(path)[0]
            total.update(f"{path.relative_to(self._root)}\0{len(content)}\0".encode() + content)
        return total.hexdigest()[:12]

    def _closure(self, modules: set[str]) -> set[Path]:
        files: set[Path] = set()
        waiting = list(modules)
        seen = set(waiting)
        while waiting:
            for path in self._paths(waiting.pop()):
                if path in files:
                    continue
                files.add(path)
                _, imported, computed = self._file(path)
                if computed:
                    return set(python_files(self._root)) | files
                waiting += imported - seen
                seen |= imported
        return files

    def _paths(self, module: str) -> Iterator[Path]:
        """The files that importing `module` runs: the packages above it, and itself."""
        place = self._root
        for part in module.split("."):
            place = place / part
            for path in (place / "__init__.py", place.with_suffix(".py")):
                if path.is_file():
                    yield path

    def _file(self, path: Path) -> tuple[bytes, frozenset[str], bool]:
        if path not in self._read:
            self._read[path] = self._parse(path)
        return self._read[path]

    def _parse(self, path: Path) -> tuple[bytes, frozenset[str], bool]:
        """Content, the modules that it may import, and whether it imports by computed names."""
        try:
            content = path.read_bytes()
            tree = ast.parse(content)
        except OSError:
            return b"", frozenset(), False
        except (SyntaxError, ValueError, RecursionError):
            return content, frozenset(), False  # the worker will say what is wrong with it
        package = path.relative_to(self._root).parent.parts
        names: set[str] = set()
        computed = False
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else ()
                base = ".".join([*above, *([node.module] if node.module else [])])
                names |= {base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)}
            elif isinstance(node, ast.Name):
                computed = computed or node.id in _COMPUTED
        computed = computed or bool(names & _COMPUTED)
        return content, frozenset(names - {""}), computed
