"""YAML nodes that know their place. Between source (which makes them) and shape (which reads them).

A `Broken` node stands where a value was reported as wrong already: later steps skip it without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.topology.diagnostics import Marked
from orchestrator.topology.model import Mark

_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what the YAML scanner counts as a line


class Source:
    """One file (or standard input, or a --set) and its text."""

    __slots__ = ("_lines", "folder", "name", "path", "text")

    def __init__(self, name: str, path: Path | None, folder: Path, text: str) -> None:
        self.name = name  # as shown in marks
        self.path = path  # absolute; None for what is no file
        self.folder = folder  # absolute; what relative paths in it are relative to
        self.text = text
        self._lines: list[str] | None = None

    def line(self, number: int) -> str:
        """Line `number` (from 1), "" when there is none."""
        if self._lines is None:
            self._lines = _BREAK.split(self.text)
        return self._lines[number - 1] if 0 < number <= len(self._lines) else ""


class Node(Marked):
    """Base of the four kinds."""

    __slots__ = ("column", "line", "source", "templated")

    def __init__(self, source: Source, line: int, column: int, templated: bool = False) -> None:
        self.source = source
        self.line = line
        self.column = column
        self.templated = templated  # it, or something below it, holds a template

    @property
    def mark(self) -> Mark:
        return Mark(self.source.name, self.line, self.column)

    @property
    def source_line(self) -> str:
        return self.source.line(self.line)


class Scalar(Node):
    """`value` follows YAML 1.2 core rules; `text` is what stands in the file."""

    __slots__ = ("text", "value")

    def __init__(
        self, source: Source, line: int, column: int, value: str | int | float | bool | None, text: str
    ) -> None:
        super().__init__(source, line, column, "{{" in text or "{%" in text)
        self.value = value
        self.text = text


class Map(Node):
    """Entries by the text of their key, with the node of the key."""

    __slots__ = ("entries",)

    def __init__(self, source: Source, line: int, column: int) -> None:
        super().__init__(source, line, column)
        self.entries: dict[str, tuple[Scalar, Node]] = {}

    def get(self, key: str) -> Node | None:
        """The value of `key`."""
        found = self.entries.get(key)
        return found[1] if found else None

    def put(self, key: Scalar, value: Node) -> None:
        """Adds or replaces."""
        self.entries[key.text] = (key, value)
        self.templated = self.templated or key.templated or value.templated

    def __iter__(self) -> Iterator[tuple[Scalar, Node]]:
        return iter(self.entries.values())


class List(Node):
    """Items in order."""

    __slots__ = ("items",)

    def __init__(self, source: Source, line: int, column: int) -> None:
        super().__init__(source, line, column)
        self.items: list[Node] = []

    def append(self, item: Node) -> None:
        """Adds at the end."""
        self.items.append(item)
        self.templated = self.templated or item.templated


class Broken(Node):
    """Was reported as wrong; nothing more is to be said about it."""

    __slots__ = ()


def is_null(node: Node | None) -> bool:
    """Whether the node is there and says null."""
    return isinstance(node, Scalar) and node.value is None


def plain(node: Node) -> Any:
    """The node as dict, list and scalar. Broken parts are left out."""
    if isinstance(node, Map):
        return {key.text: plain(value) for key, value in node if not isinstance(value, Broken)}
    if isinstance(node, List):
        return [plain(item) for item in node.items if not isinstance(item, Broken)]
    return node.value if isinstance(node, Scalar) else None


def graft(value: Any, at: Node) -> Node:
    """Plain data (of a template, a variable) as nodes that stand where `at` stands."""
    if isinstance(value, dict):
        out = Map(at.source, at.line, at.column)
        for key, item in value.items():
            out.put(Scalar(at.source, at.line, at.column, str(key), str(key)), graft(item, at))
        out.templated = False  # data is data: what a template yields is not a template again
        return out
    if isinstance(value, (list, tuple)):
        items = List(at.source, at.line, at.column)
        for item in value:
            items.append(graft(item, at))
        items.templated = False
        return items
    scalar = Scalar(at.source, at.line, at.column, value, text_of(value))
    scalar.templated = False
    return scalar


def text_of(value: object) -> str:
    """A scalar as YAML writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)
