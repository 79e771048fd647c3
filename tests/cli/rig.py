"""Runs the command line as a person does: a real process in a folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE

COMMAND = [sys.executable, "-m", "orchestrator.cli"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Folder:
    """A topology's folder and the commands run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> None:
        (self.path / name).write_text(text, encoding="utf-8")

    def run(self, *args: str, stdin: str = "", timeout: float = 2 * PATIENCE, **env: str) -> Done:
        done = subprocess.run(
            [*COMMAND, *args],
            cwd=self.path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **env},
            check=False,
        )
        assert "Traceback (most recent call last)" not in done.stderr or "handler" in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *args: str, stdin: str = "") -> Done:
        """Runs a command that must succeed."""
        done = self.run(*args, stdin=stdin)
        assert done.code == 0, f"{args}: {done}"
        return done

    def refused(self, *args: str, code: int = 1, stdin: str = "", **env: str) -> str:
        """Runs a command that must be refused, with nothing on stdout for `-o json`; returns what it said."""
        done = self.run(*args, stdin=stdin, **env)
        assert done.code == code, f"{args}: {done}"
        return done.err

    def start(self, *args: str) -> Foreground:
        return Foreground(self, args)

    def state(self) -> str:
        done = self.run("status", "-o", "json")
        return str(done.json["state"]) if done.code == 0 else "none"


class Foreground:
    """A command that goes on: apply or dev in the foreground, tail."""

    def __init__(self, folder: Folder, args: tuple[str, ...]) -> None:
        self._log = folder.path / f"{args[0]}.foreground"
        # A run that was started in the background ignores Ctrl-C, and its children would too.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([*COMMAND, *args], cwd=folder.path, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str, count: int = 1) -> None:
        def heard() -> bool:
            assert self._process.poll() is None or self.said.count(text) >= count, self.said
            return self.said.count(text) >= count

        wait(heard, lambda: f"never said {text!r}:\n{self.said}")

    def interrupt(self) -> int:
        """Ctrl-C; returns the exit code."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(PATIENCE)

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def wait(true: Callable[[], object], what: Callable[[], str] | str, patience: float = PATIENCE) -> None:
    """Returns once `true()` is; fails the test after `patience` seconds."""
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.05)
