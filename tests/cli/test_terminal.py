"""Questions, asked on a real (pseudo) terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable

import pytest

from orchestrator.cli import console
from tests.cli.rig import COMMAND, Folder, wait
from tests.patience import PATIENCE

Answer = Callable[[Folder, list[str], str, str | None], tuple[int, str]]


@pytest.fixture
def answer() -> Answer:
    """Runs a command on a terminal, waits for its question, types an answer (None: Ctrl-C); returns exit code and what
    it said."""

    def run(folder: Folder, args: list[str], question: str, text: str | None) -> tuple[int, str]:
        ours, theirs = pty.openpty()
        log = folder.path / "terminal"
        with log.open("wb") as said:
            process = subprocess.Popen([*COMMAND, *args], cwd=folder.path, stdin=theirs, stdout=said, stderr=said)
        try:
            wait(lambda: question in log.read_text() or process.poll() is not None, "no question was asked")
            if text is None:
                process.send_signal(signal.SIGINT)
            else:
                os.write(ours, f"{text}\n".encode())
            return process.wait(PATIENCE), log.read_text()
        finally:
            process.kill()
            os.close(ours)
            os.close(theirs)

    return run


def test_apply_asks_and_a_no_changes_nothing(folder: Folder, answer: Answer) -> None:
    code, said = answer(folder, ["apply", "--no-workers"], "Apply this? [y/N]", "n")
    assert code == 1
    assert "nothing was changed" in said
    assert folder.run("plan", "--exit-code").code == 3
    code, _ = answer(folder, ["apply", "--no-workers"], "Apply this? [y/N]", "y")
    assert code == 0
    assert folder.run("plan", "--exit-code").code == 0


def test_ctrl_c_at_a_question_ends_the_command(folder: Folder, answer: Answer) -> None:
    assert answer(folder, ["apply", "--no-workers"], "Apply this? [y/N]", None)[0] == 130
    assert folder.run("plan", "--exit-code").code == 3


def test_destroy_with_events_wants_the_topology_typed(folder: Folder, answer: Answer) -> None:
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "parcel.packed", "{}")
    code, said = answer(folder, ["destroy"], "Type the topology's name (shop)", "yes")
    assert code == 1
    assert "nothing was changed" in said
    assert folder.run("plan", "--exit-code").code == 0
    code, _ = answer(folder, ["destroy"], "Type the topology's name (shop)", "shop")
    assert code == 0
    assert {o["action"] for o in folder.ok("plan", "-o", "json").json["operations"]} == {"create"}


TABLE = """
from orchestrator.cli import console
print(console.table(["ID", "ERROR"], [["0123456789" * 3, "one two three four five six seven eight nine ten"]]))
"""


def on_terminal(columns: int, program: str, **more: str) -> list[str]:
    """The lines that `program` prints on a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")} | more
    try:
        subprocess.run([sys.executable, "-c", program], stdout=theirs, env=env, check=True, timeout=PATIENCE)
        return os.read(ours, 10_000).decode().split("\r\n")[:-1]
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_tables_columns_stand_below_one_another_in_every_script() -> None:
    rows = [["研究", "日本語 😀", "1"], ["a", "[bold]b[/bold] :smile:", "2"]]
    lines = console.table(["AGENT", "ERROR", "COUNT"], rows).splitlines()
    assert lines == [
        "AGENT  ERROR                   COUNT",
        "研究   日本語 😀               1",
        "a      [bold]b[/bold] :smile:  2",
    ]


def test_what_a_table_holds_cannot_leave_its_cell() -> None:
    assert console.table(["A", "B"], [["x\ny", "\x1b[31mred\tz"]]).splitlines() == [
        "A         B",
        "x\\u000ay  \\u001b[31mred\\u0009z",
    ]


def test_colours_that_we_did_not_paint_are_shown_not_obeyed() -> None:
    program = """
from orchestrator.cli import console
console.data("\\x1b[31mevent")
console.data(console.paint_out("ours", "32") + " \\x07", painted=True)
"""
    assert on_terminal(80, program, TERM="xterm") == ["\\u001b[31mevent", "\x1b[32mours\x1b[0m \\u0007"]


def test_what_a_log_line_holds_does_nothing_to_the_terminal(folder: Folder) -> None:
    (folder.path / ".orchestrator" / "logs").mkdir(parents=True, mode=0o700)
    line = {
        "ts": "2026-01-31T12:00:00Z",
        "level": "info",
        "agent": "pack",
        "slot": 0,
        "event": "\x1b[31mred",
        "n": "\x9b",
    }
    folder.write(".orchestrator/logs/pack.log", json.dumps(line) + "\n")
    assert "12:00:00 \\u001b[31mred n=\\u009b" in folder.ok("logs").out


def test_a_narrow_terminal_folds_a_tables_last_column_and_cuts_nothing() -> None:
    wide = ["ID" + " " * 30 + "ERROR", "0123456789" * 3 + "  one two three four five six seven eight nine ten"]
    assert on_terminal(100, TABLE) == wide
    lines = on_terminal(60, TABLE)
    assert lines[1].startswith("0123456789" * 3 + "  one two")
    assert all(line.startswith(" " * 32) for line in lines[2:])
    assert " ".join(line[32:] for line in lines[1:]) == "one two three four five six seven eight nine ten"
    assert all(len(line) <= 60 for line in lines)
    assert on_terminal(40, TABLE) == wide  # there is no room beside the others: the terminal wraps the line


def test_what_is_piped_has_one_line_for_each_row() -> None:
    program = [sys.executable, "-c", TABLE]
    done = subprocess.run(program, env={**os.environ, "COLUMNS": "40"}, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 2
