"""Exit codes and streams that every command shares."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from orchestrator.cli import main as cli
from tests.cli.rig import Folder

COMMANDS = [
    *("init", "validate", "graph", "schema", "plan", "apply", "dev", "destroy"),
    *("stop", "status", "logs", "restart", "scale", "pause", "resume"),
    *("publish", "request", "tail", "trace", "replay", "dlq", "doctor"),
]


def test_help_names_every_command(tmp_path: Path) -> None:
    done = Folder(tmp_path).ok("--help")
    assert [c for c in COMMANDS if f"\n  {c} " not in done.out] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    assert "Usage: orchestrator" in Folder(tmp_path).ok(command, "--help").out


@pytest.mark.parametrize("wrong", [["nonsense"], ["plan", "--nonsense"], ["scale", "pack", "many"], ["publish"]])
def test_usage_errors_exit_with_2(wrong: list[str], tmp_path: Path) -> None:
    done = Folder(tmp_path).run(*wrong)
    assert done.code == 2
    assert done.out == ""


@pytest.mark.parametrize("command", [["plan"], ["apply", "--yes", "-d"], ["status"], ["doctor"], ["stop"]])
def test_a_state_folder_that_cannot_be_used_is_the_machines_refusal(folder: Folder, command: list[str]) -> None:
    folder.write(".orchestrator", "a file, not a folder")
    said = folder.refused(*command)
    assert "the system refuses: Not a directory" in said
    assert "must be a folder of yours" in said


def test_an_unexpected_exception_is_one_line_and_says_how_to_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "unexpected ZeroDivisionError: a mistake of ours" in said
    assert "--debug" in said


def test_colour_is_for_terminals_only(folder: Folder) -> None:
    assert "\x1b[" not in folder.ok("plan").out


def test_help_does_without_what_is_slow_to_import(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    Folder(tmp_path).ok("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.6  # 0.17 s when written
