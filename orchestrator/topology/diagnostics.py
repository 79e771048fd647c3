"""What is wrong with a topology file, and how it is shown. Used by every step of the walk that loads one.

Steps report to a `Problems` and go on, so that one run names every mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from orchestrator.errors import OrchestratorError
from orchestrator.topology.model import Mark

_BOLD, _RED, _YELLOW, _CYAN, _OFF = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[36m", "\x1b[0m"
_WIDEST = 160  # a longer source line is shown as a window around its column


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding. `code` is stable, for programs; `line` is the text of the marked source line."""

    severity: Literal["error", "warning"]
    message: str
    mark: Mark | None
    expected: str | None
    suggestion: str | None
    code: str
    line: str | None = None

    def redacted(self, redact: Callable[[str], str]) -> Diagnostic:
        """The same without secrets."""

        def clean(text: str | None) -> str | None:
            return None if text is None else redact(text)

        return replace(
            self,
            message=redact(self.message),
            expected=clean(self.expected),
            suggestion=clean(self.suggestion),
            line=clean(self.line),
        )


class TopologyError(OrchestratorError):
    """The topology is wrong. `diagnostics` holds every error and warning found, in the order of the files.

    `files` are the files that were read, so that a watcher knows what to watch until it is mended.
    """

    def __init__(self, diagnostics: Sequence[Diagnostic], files: Sequence[Path] = ()) -> None:
        errors = [d for d in diagnostics if d.severity == "error"]
        first = errors[0] if errors else diagnostics[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        place = f"{first.mark}: " if first.mark else ""
        super().__init__(f"{place}{first.message}{more}", hint=first.suggestion or first.expected)
        self.diagnostics = list(diagnostics)
        self.files = tuple(files)


@dataclass(slots=True)
class Problems:
    """Collects findings."""

    found: list[Diagnostic] = field(default_factory=list)

    def error(
        self,
        code: str,
        message: str,
        at: Marked | None = None,
        *,
        expected: str | None = None,
        suggestion: str | None = None,
    ) -> None:
        """Adds an error at a node or a place in a file."""
        self._add("error", code, message, at, expected, suggestion)

    def warning(self, code: str, message: str, at: Marked | None = None, *, suggestion: str | None = None) -> None:
        """Adds a warning; `--strict` treats it as an error."""
        self._add("warning", code, message, at, None, suggestion)

    def _add(
        self,
        severity: Literal["error", "warning"],
        code: str,
        message: str,
        at: Marked | None,
        expected: str | None,
        suggestion: str | None,
    ) -> None:
        mark = at.mark if at is not None else None
        line = at.source_line if at is not None else None
        self.found.append(Diagnostic(severity, message, mark, expected, suggestion, code, line))

    @property
    def errors(self) -> bool:
        """Whether any error was found."""
        return any(d.severity == "error" for d in self.found)


class Marked:
    """Something that stands at a place in a file: the base of YAML nodes."""

    __slots__ = ()

    @property
    def mark(self) -> Mark:
        """File, line and column."""
        raise NotImplementedError

    @property
    def source_line(self) -> str:
        """The text of that line."""
        raise NotImplementedError


def listing(names: Iterable[str], most: int = 12) -> str:
    """ "a, b, c" in order, cut after `most`."""
    every = list(names)
    return ", ".join(every[:most]) + (f", … ({len(every)} in all)" if len(every) > most else "")


def render(diagnostics: Sequence[Diagnostic], color: bool = False) -> str:
    """All findings as text for people: place, message, source line with a caret, what was expected."""

    def paint(code: str, text: str) -> str:
        return f"{code}{text}{_OFF}" if color else text

    blocks = []
    for d in diagnostics:
        tone = _RED if d.severity == "error" else _YELLOW
        place = f"{_safe(str(d.mark))}: " if d.mark else ""
        lines = [f"{paint(_BOLD, place)}{paint(tone, d.severity + ':')} {_safe(d.message)} [{d.code}]"]
        if d.mark and d.line is not None:
            lines += _excerpt(d.mark, d.line, paint(tone, "^"))
        if d.expected:
            lines.append(f"  expected {_safe(d.expected)}")
        if d.suggestion:
            lines.append(f"  {paint(_CYAN, _safe(d.suggestion))}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _excerpt(mark: Mark, line: str, caret: str) -> list[str]:
    column = min(mark.column - 1, len(line))
    start = 0
    if len(line) > _WIDEST:
        start = max(0, column - _WIDEST // 2)
    shown = _safe(line[start : start + _WIDEST])
    # Tabs are kept above the caret, so that it stands below its character at any tab width.
    lead = "\t".join(" " * _width(_safe(part)) for part in line[start:column].split("\t"))
    number = str(mark.line)
    return [f"  {number} | {shown}", f"  {' ' * len(number)} | {lead}{caret}"]


def _width(text: str) -> int:
    """How many columns of a terminal `text` takes: Chinese characters and emoji take two."""
    if text.isascii():
        return len(text)
    # loaded for such a line alone: every worker has this module
    from rich.cells import cell_len

    return cell_len(text)


def _safe(text: str) -> str:
    """Control characters (an escape sequence in a hostile file) as escapes; one line stays one line."""
    return "".join(c if c == "\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
