"""Every folder of examples/ runs by its one command; the README's files and snippets are real."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(p.parent for p in (ROOT / "examples").glob("*/topology.yaml"))


def orchestrator(*args: str, cwd: Path, timeout: float = 2 * PATIENCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda p: p.name)
def test_example_is_valid_without_a_warning_and_its_handlers_load(folder: Path) -> None:
    done = orchestrator("validate", "--strict", "--handlers", cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda p: p.name)
def test_example_says_how_to_run_it(folder: Path) -> None:
    assert "orchestrator dev" in (folder / "README.md").read_text()


def test_the_demo_tells_the_whole_story() -> None:
    done = subprocess.run(
        [sys.executable, "examples/content-pipeline/demo.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("task.assigned", "agent.started", "agent.completed", "review.completed", "KeyError"):
        assert step in done.stdout


def test_the_readme_topology_is_valid(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    for language, name in (("yaml", "topology.yaml"), ("python", "agents.py")):
        snippet = re.search(rf"```{language}\n(.*?)```", readme, re.S)
        assert snippet, f"the README shows no {language}"
        (tmp_path / name).write_text(snippet.group(1))
    done = orchestrator("validate", "--handlers", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_readme_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (ROOT / "README.md").read_text()
    snippet = re.search(r"```python\n(from orchestrator.testing.*?)```", readme, re.S)
    assert snippet, "the README shows no test"
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(snippet.group(1), names)
    names["test_a_task_without_a_query_dies_alone"]()
