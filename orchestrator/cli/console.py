"""What every command prints with: data on stdout, words for people on stderr, colour only where it is welcome."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import IO, Any, NoReturn

import typer

from orchestrator.errors import OrchestratorError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNPAINTED = re.compile(rf"(\x1b\[[0-9;]*m)|{_CONTROL.pattern}")  # but colours
_CELL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LEAST = 20  # columns of the terminal below which a table's last column is not folded
_hidden: list[str] = []  # secrets, the longest first


def hide(secrets: Sequence[str]) -> None:
    """From now on these are printed as ***, by every function of this module."""
    for secret in filter(None, secrets):
        _hidden.extend({secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1]})
    _hidden.sort(key=len, reverse=True)


def _redacted(text: str) -> str:
    for secret in _hidden:
        text = text.replace(secret, "***")
    return text


def plain(text: str) -> str:
    """Without secrets, and without what an event or a file could do to the terminal."""
    return _CONTROL.sub(_escaped, _redacted(text))


def _clean(text: str, *, painted: bool) -> str:
    """As plain; the colours of a `painted` text stay: whoever painted it has made the rest of it plain."""
    if not painted:
        return plain(text)
    return _UNPAINTED.sub(lambda found: found[1] or _escaped(found), _redacted(text))


def _escaped(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def colored(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that wants colour."""
    return stream.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def wants_color(*, err: bool = False) -> bool:
    """Whether stdout (or stderr) wants colour."""
    return colored(sys.stderr if err else sys.stdout)


def data(text: str, *, painted: bool = False) -> None:
    """The result of a command, on stdout."""
    text = _clean(text, painted=painted)
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def data_json(value: Any) -> None:
    """The result as JSON, on stdout. Every document carries `version`."""
    data(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def data_line(value: Any) -> None:
    """One JSON document in one line, for results that go on (`tail -o json`)."""
    data(json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain))


def say(text: str, *, painted: bool = False) -> None:
    """A word for the person, on stderr."""
    sys.stderr.write(_clean(text, painted=painted) + "\n")
    sys.stderr.flush()


def progress(event: Mapping[str, Any]) -> None:
    """One worker's change of state, as the supervisor tells it."""
    why = f": {event['reason']}" if event.get("reason") else ""
    say(f"{event['agent']}.{event['slot']} is {event['state']}{why}")


def warn(text: str) -> None:
    """A warning, on stderr."""
    say(f"{paint('warning', '33;1')}: {plain(text)}", painted=True)


def complain(error: OrchestratorError) -> None:
    """An error and what to do about it, on stderr; all of them when a topology has several."""
    # importing it imports the loader, which `--help` does without
    from orchestrator.topology.diagnostics import TopologyError, render

    if isinstance(error, TopologyError):
        errors = sum(d.severity == "error" for d in error.diagnostics)
        say(render(error.diagnostics, color=colored(sys.stderr)), painted=True)
        say(f"{errors} error{'' if errors == 1 else 's'}" if errors else "warnings are errors with --strict")
        return
    say(f"{paint('error', '31;1')}: {plain(error.message)}", painted=True)
    if error.hint:
        say(f"  {paint('→', '36')} {plain(error.hint)}", painted=True)


def misused(message: str, *, hint: str | None) -> NoReturn:
    """A command that was typed wrongly: exit code 2."""
    complain(OrchestratorError(message, hint=hint))
    raise typer.Exit(2)


def paint(text: str, code: str) -> str:
    """`text` in an ANSI colour when stderr wants it."""
    return f"\x1b[{code}m{text}\x1b[0m" if colored(sys.stderr) else text


def paint_out(text: str, code: str) -> str:
    """As paint, for stdout."""
    return f"\x1b[{code}m{text}\x1b[0m" if colored(sys.stdout) else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, left-aligned, as wide as needed: one line for each row. On a terminal that is too narrow the last column
    goes on below itself where there is room for it; the others, which hold what is copied, are never cut."""
    # a few hundredths of a second, which a command without a table does without
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    lines = [[_CELL.sub(_escaped, plain(cell)) for cell in row] for row in (header, *rows)]
    wide = [max(cell_len(row[i]) for row in lines) + 2 for i in range(len(header))]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sum(wide)
    if room < sum(wide[:-1]) + _LEAST:
        room = sum(wide)
    grid = Table.grid(*(Column(no_wrap=i < len(header) - 1) for i in range(len(header))), padding=(0, 2, 0, 0))
    for row in lines:
        grid.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=room, color_system=None, force_terminal=False).print(grid)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def confirm(question: str, *, yes: bool, flag: str = "--yes") -> None:
    """Asks; returns when the answer is yes. Without a terminal and without the flag: usage error (exit code 2);
    any other answer: exit code 1."""
    if yes:
        return
    if not sys.stdin.isatty():
        misused("there is no terminal to ask on", hint=f"add {flag} to go on without asking")
    if _answer(f"{question} [y/N]").lower() not in ("y", "yes"):
        raise OrchestratorError("not confirmed; nothing was changed")


def typed(question: str, expected: str) -> bool:
    """Asks for a name to be typed; False when there is no terminal or something else was typed."""
    if not sys.stdin.isatty():
        return False
    return _answer(question) == expected


def _answer(question: str) -> str:
    """Ctrl-C ends it: within a running event loop the first would only be noted until the loop turns again."""
    sys.stderr.write(f"{question} ")
    sys.stderr.flush()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return sys.stdin.readline().strip()
    finally:
        signal.signal(signal.SIGINT, before)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)


def compact(value: Any) -> str:
    """JSON in one line."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)
