"""Questions, asked on a real (pseudo) terminal."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Callable

import pytest

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
