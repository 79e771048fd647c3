"""First step of loading: bytes -> text -> YAML nodes with marks. YAML 1.2 core rules, and nothing that can hurt.

The scanner is libyaml's (its start marks equal those of the Python one; a test compares them). Nodes are put together
here, without recursion, within the limits below.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from orchestrator.topology.diagnostics import Problems
from orchestrator.topology.nodes import Broken, List, Map, Node, Scalar, Source

MAX_BYTES = 8 * 1024 * 1024  # of one file, looked at before it is read
MAX_DEPTH = 64  # levels of nesting, aliases expanded; later steps recurse
MAX_NODES = 400_000  # of one file, aliases expanded
MAX_DIGITS = 100  # of one number

_Scanner: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_FORBIDDEN = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCT_HEX = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_MAYBE = frozenset("0123456789+-.")

_TAG = "tag:yaml.org,2002:"
_SCALAR_TAGS: dict[str, tuple[type, ...]] = {
    f"{_TAG}int": (int,),
    f"{_TAG}float": (float, int),
    f"{_TAG}bool": (bool,),
    f"{_TAG}null": (type(None),),
}


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """A plain scalar by the YAML 1.2 core schema: `on`, `no` and `1:30` are text, `012` is twelve, `0o14` too.

    Raises ValueError for numbers that are too long or not finite.
    """
    if text in _WORDS:
        return _WORDS[text]
    if text[0] not in _MAYBE:
        return text
    if len(text) > MAX_DIGITS and text.strip("+-.0123456789eExoabcdfABCDF") == "" and any(c.isdigit() for c in text):
        raise ValueError(f"a number of {len(text)} characters")
    if _INT.match(text):
        return int(text)
    if _OCT_HEX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        number = float(text)
        if math.isfinite(number):
            return number
        raise ValueError(f"{text} is too large for a number")
    if _NOT_FINITE.match(text):
        raise ValueError(f"{text} is not a finite number")
    return text


def read(path: Path, name: str, problems: Problems, at: Node | None = None) -> Source | None:
    """A file as text. None, with an error reported, when it cannot be read or is no UTF-8."""
    place = Source(name, path, path.parent, "")
    try:
        if path.is_dir():
            problems.error("file", f"{name} is a folder", at, expected="a YAML file")
            return None
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)  # bounded: a pipe or a device has no size to ask for
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        problems.error("file", f"cannot read {name}: {reason}", at, expected="the path of a file that you may read")
        return None
    if len(data) > MAX_BYTES:
        limit = f"at most {MAX_BYTES // 1024 // 1024} MiB"
        problems.error("too-large", f"{name} is too large", at or Broken(place, 1, 1), expected=limit)
        return None
    return text(data, place, problems)


def text(data: bytes | str, place: Source, problems: Problems) -> Source | None:
    """Checks encoding and characters; the result is `place` with its text."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    if len(data) > MAX_BYTES:
        problems.error("too-large", f"{place.name} is too large", Broken(place, 1, 1))
        return None
    try:
        decoded = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        place.text = data.decode("utf-8", "replace")
        spot = _spot(place, before)
        problems.error("encoding", f"{place.name} is not UTF-8", spot, expected="a file saved as UTF-8")
        return None
    place.text = decoded
    if bad := _FORBIDDEN.search(decoded):
        what = f"the character U+{ord(bad.group()):04X} is not allowed in YAML"
        problems.error("character", what, _spot(place, decoded[: bad.start()]), expected="printable text")
        return None
    return place


def _spot(source: Source, before: str) -> Node:
    lines = before.splitlines() or [""]
    if before.endswith(("\n", "\r")):
        lines.append("")
    return Broken(source, len(lines), len(lines[-1]) + 1)


class _Syntax(Exception):
    """Parsing cannot go on; what and where was reported."""


def parse(source: Source, problems: Problems) -> Node | None:
    """The one document of `source` as nodes. None, with errors reported, when the text is no YAML."""
    scanner = _Scanner(source.text)
    try:
        return _Composer(source, problems, scanner).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = Broken(source, mark.line + 1, mark.column + 1) if mark else Broken(source, 1, 1)
        context = f" {error.context}" if error.context else ""
        problems.error("yaml", f"not valid YAML{context}: {error.problem}", at, suggestion=_yaml_hint(at))
    except yaml.YAMLError as error:
        problems.error("yaml", f"not valid YAML: {error}", Broken(source, 1, 1))
    except _Syntax:
        pass  # reported where it was seen
    finally:
        scanner.dispose()
    return None


def _yaml_hint(at: Node) -> str | None:
    line = at.source_line
    if line[: at.column].strip() == "" and "\t" in line[: at.column]:
        return "indent with spaces, not tabs"
    if "{{" in line or "{%" in line:
        return 'put quotes around a template: key: "{{ … }}"'
    if ": " in line:
        return "put quotes around text that holds `: ` or begins with one of * & ! | > % @ `"
    return None


class _Open:
    """A mapping or list whose end has not come yet."""

    __slots__ = ("anchor", "height", "key", "node", "size", "spoiled")

    def __init__(self, node: Map | List, anchor: str | None) -> None:
        self.node = node
        self.anchor = anchor
        self.key: Node | None = None
        self.size = 1
        self.height = 1
        self.spoiled = False  # a key was reported: the whole value is not to be trusted


class _Composer:
    def __init__(self, source: Source, problems: Problems, scanner: Any) -> None:
        self.source = source
        self.problems = problems
        self.scanner = scanner
        self.open: list[_Open] = []
        self.anchors: dict[str, tuple[Node, int, int]] = {}
        self.count = 0
        self.root: Node | None = None

    # Events are typed Any: the stubs say that their marks may be missing, which these scanners never do.

    def document(self) -> Node | None:
        documents = 0
        while self.scanner.check_event():
            event = self.scanner.get_event()
            if isinstance(event, yaml.ScalarEvent):
                self._attach(self._scalar(event), event.anchor, 1, 1)
            elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
                self._start(event)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                self._end()
            elif isinstance(event, yaml.AliasEvent):
                self._alias(event)
            elif isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    at = self._place(event)
                    self._fatal(
                        "documents", "a second document in one file", at, "one document; name several files instead"
                    )
        return self.root

    def _place(self, event: Any) -> Broken:
        return Broken(self.source, event.start_mark.line + 1, event.start_mark.column + 1)

    def _fatal(self, code: str, message: str, at: Node, expected: str | None = None) -> None:
        self.problems.error(code, message, at, expected=expected)
        raise _Syntax

    def _scalar(self, event: Any) -> Node:
        place = event.start_mark
        line, column, value = place.line + 1, place.column + 1, event.value
        tag = event.tag
        if "\0" in value:
            at = Broken(self.source, line, column)
            self.problems.error("character", "text must not hold NUL", at)
            return at
        if not event.implicit[0] and (tag is None or tag in ("!", f"{_TAG}str")):
            return Scalar(self.source, line, column, value, value)
        try:
            resolved = resolve_scalar(value)
        except ValueError as error:
            at = Broken(self.source, line, column)
            self.problems.error("number", str(error), at, expected="a finite number, or text in quotes")
            return at
        if tag is not None and not isinstance(resolved, _SCALAR_TAGS.get(tag, ())):
            return self._bad_tag(tag, event)
        return Scalar(self.source, line, column, resolved, value)

    def _bad_tag(self, tag: str, event: Any) -> Node:
        shown = tag.replace(_TAG, "!!")
        at = self._place(event)
        self.problems.error("tag", f"the tag {shown} is not supported here", at, expected="a plain value without a tag")
        return at

    def _start(self, event: Any) -> None:
        mapping = isinstance(event, yaml.MappingStartEvent)
        kind = Map if mapping else List
        node = kind(self.source, event.start_mark.line + 1, event.start_mark.column + 1)
        if len(self.open) >= MAX_DEPTH:
            self._fatal("too-deep", "nested too deep", node, f"at most {MAX_DEPTH} levels")
        opened = _Open(node, event.anchor)
        if event.tag not in (None, "!", f"{_TAG}map" if mapping else f"{_TAG}seq"):
            self._bad_tag(event.tag, event)
            opened.spoiled = True
        if event.anchor:
            self.anchors.pop(event.anchor, None)  # an alias to it from inside finds nothing
        self.open.append(opened)

    def _end(self) -> None:
        opened = self.open.pop()
        node: Node = opened.node
        if opened.spoiled:
            node = Broken(self.source, node.line, node.column)
        self._attach(node, opened.anchor, opened.size, opened.height)

    def _alias(self, event: Any) -> None:
        at = self._place(event)
        if event.anchor not in self.anchors:
            inside = any(o.anchor == event.anchor for o in self.open)
            reason = "refers to what it stands in" if inside else "has no anchor before it"
            self.problems.error("alias", f"the alias *{event.anchor} {reason}", at)
            self._attach(at, None, 1, 1)
            return
        node, size, height = self.anchors[event.anchor]
        if len(self.open) + height > MAX_DEPTH:
            self._fatal("too-deep", "nested too deep through aliases", at, f"at most {MAX_DEPTH} levels")
        self._attach(node, None, size, height, at)

    def _attach(self, node: Node, anchor: str | None, size: int, height: int, at: Node | None = None) -> None:
        self.count += size if at is not None else 1
        if self.count > MAX_NODES:
            self._fatal(
                "too-many", "too many values (aliases are counted in full)", at or node, f"at most {MAX_NODES:,}"
            )
        if anchor:
            self.anchors[anchor] = (node, size, height)
        if not self.open:
            self.root = node
            return
        parent = self.open[-1]
        parent.size += size
        parent.height = max(parent.height, height + 1)
        if isinstance(parent.node, List):
            parent.node.append(node)
        elif parent.key is None:
            parent.key = node
        else:
            self._pair(parent, parent.node, parent.key, node)
            parent.key = None

    def _pair(self, parent: _Open, into: Map, key: Node, value: Node) -> None:
        if isinstance(key, Broken):
            parent.spoiled = True
        elif not isinstance(key, Scalar):
            hint = 'put quotes around a template: "{{ … }}"' if "{{" in key.source_line else None
            self.problems.error("key", "a mapping or list cannot be a key", key, expected="text", suggestion=hint)
            parent.spoiled = True
        elif key.text == "<<" and key.value == "<<":
            hint = "use `defaults:`, or name a policy in `retry_policies:`"
            self.problems.error("merge-key", "merge keys (<<) are not part of YAML 1.2", key, suggestion=hint)
        elif key.text in into.entries:
            first = into.entries[key.text][0]
            self.problems.error(
                "duplicate-key",
                f"`{key.text}` stands here twice",
                key,
                expected=f"one of them; the first is at {first.mark}",
            )
        else:
            into.put(key, value)
