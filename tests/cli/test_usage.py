"""Exit codes and streams that every command shares."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from orchestrator.cli import main as cli
from tests.cli.rig import COMMAND, Folder
from tests.patience import PATIENCE

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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["publish", "order.placed", "{}", "--delay", "soon"], "write 200ms, 30s, 5m, 1h or 7d"),
        (["publish", "order.placed", "{}", "--delay", ""], "not a duration"),
        (["publish", "order.placed", "{}", "--delay", "999999999d"], "not a duration"),
        (["request", "order.placed", "{}", "--timeout", "-1s"], "not a duration"),
        (["tail", "--from", "yesterday"], "earliest, latest, a duration ago"),
        (["replay", "pack", "--from", "2999-01-01"], "lies in the future"),
        (["dlq", "list", "--since", "tomorrow"], "→ write a duration ago such as 15m"),
        (["dlq", "list", "--since", "latest"], "not a time"),
        (["dlq", "redrive", "--set", "event_type.x=1"], "payload.<name>"),
        (["scale", "pack", "10001"], "10000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_an_option_cannot_mean_is_a_usage_error(folder: Folder, wrong: list[str], said: str) -> None:
    assert said in folder.refused(*wrong, code=2)


@pytest.mark.parametrize("wrong", [["validate", ""], ["apply", "-f", ""], ["trace", ""], ["publish", "", "{}"]])
def test_an_empty_argument_is_a_usage_error(folder: Folder, wrong: list[str]) -> None:
    assert "it is empty" in folder.refused(*wrong, code=2)


def run_without(number: int, folder: Folder, *args: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a command whose standard stream of that number is closed."""
    command = ["sh", "-c", f'exec "$@" {number}>&-', "sh", *COMMAND, *args]
    return subprocess.run(command, cwd=folder.path, capture_output=True, check=False, timeout=2 * PATIENCE)


def test_a_closed_standard_stream_is_an_empty_one(folder: Folder) -> None:
    assert (run_without(1, folder, "validate").returncode, run_without(1, folder, "plan").stderr) == (0, b"")
    assert b"<stdin> is empty" in run_without(0, folder, "validate", "-").stderr
    assert run_without(2, folder, "validate", "nowhere.yaml").returncode == 1
    assert run_without(0, folder, "apply", "--yes", "-d").returncode == 0
    assert folder.state() == "running"


def test_what_is_no_text_on_stdin_is_told_with_its_place(tmp_path: Path) -> None:
    done = subprocess.run([*COMMAND, "validate", "-"], cwd=tmp_path, input=b"a: \xff", capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"<stdin>:1:4: error: <stdin> is not UTF-8")


def test_a_terminal_that_knows_few_characters_is_shown_the_rest_as_escapes(tmp_path: Path) -> None:
    assert "\\u2713 python" in Folder(tmp_path).run("doctor", PYTHONIOENCODING="ascii").out


@pytest.mark.parametrize("command", [["plan"], ["apply", "--yes", "-d"], ["status"], ["stop"]])
def test_a_state_folder_that_cannot_be_used_is_the_machines_refusal(folder: Folder, command: list[str]) -> None:
    folder.write(".orchestrator", "a file, not a folder")
    said = folder.refused(*command)
    assert "the system refuses: Not a directory" in said
    assert "must be a folder of yours" in said


def test_a_folder_that_was_deleted_is_said(tmp_path: Path) -> None:
    command = ["sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *COMMAND, "init", "shop"]
    (tmp_path / "gone").mkdir()
    done = subprocess.run(command, cwd=tmp_path / "gone", capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert "the folder that you are in was deleted" in done.stderr


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


def test_ctrl_c_while_it_still_imports_is_quiet(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write("typer.py", "import time\nprint('importing', flush=True)\ntime.sleep(600)\n")  # found first by `-m`
    run = folder.start("--help")
    run.wait_for("importing")
    assert run.interrupt() == 130
    assert run.said == "importing\n"


def test_colour_is_for_terminals_only(folder: Folder) -> None:
    assert "\x1b[" not in folder.ok("plan").out


def test_help_does_without_what_is_slow_to_import(tmp_path: Path) -> None:
    done = Folder(tmp_path).run("--help", PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rpartition("|")[2].strip() for line in done.err.splitlines() if line.startswith("import time:")}
    assert "orchestrator.cli.dlq" in imported
    assert not {"yaml", "jinja2", "pydantic", "nats", "redis", "confluent_kafka", "jsonschema"} & imported
