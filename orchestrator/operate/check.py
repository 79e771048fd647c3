"""The check of `validate` beyond the file itself: whether the handlers and codecs import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from orchestrator.operate import try_import
from orchestrator.topology import dump
from orchestrator.topology.diagnostics import Diagnostic
from orchestrator.topology.model import Mark, Topology

#: Seconds that one import may take.
IMPORT_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class ImportProblem:
    """A handler or codec that does not load, and the user module's own traceback where there is one."""

    diagnostic: Diagnostic
    traceback: str = ""


def handlers(topology: Topology) -> list[ImportProblem]:
    """The agents whose handlers do not load. Each is imported in a process of its own, so that code which exits,
    crashes or hangs cannot take this one along."""
    found = []
    for agent in topology.agents.values():
        if agent.handler is not None:
            answer = _try(topology, "agent", agent.name, env=agent.env)
            found += _problem(answer, agent.name, topology.mark("agents", agent.name, "handler"), "handler")
    return found


def codecs(topology: Topology) -> list[ImportProblem]:
    """The channels whose own codecs do not load, each tried as a handler is."""
    found = []
    for channel in topology.channels.values():
        if ":" in channel.codec:
            answer = _try(topology, "codec", channel.codec)
            found += _problem(answer, channel.name, topology.mark("channels", channel.name, "codec"), "codec")
    return found


def diagnostics_json(found: Sequence[Diagnostic]) -> Iterable[dict[str, Any]]:
    """The `-o json` form."""
    return [
        {
            "severity": d.severity,
            "code": d.code,
            "message": d.message,
            "file": d.mark.file if d.mark else None,
            "line": d.mark.line if d.mark else None,
            "column": d.mark.column if d.mark else None,
            "expected": d.expected,
            "suggestion": d.suggestion,
        }
        for d in found
    ]


def _problem(answer: tuple[str, str, str], name: str, mark: Mark | None, code: str) -> list[ImportProblem]:
    problem, hint, traceback = answer
    diagnostic = Diagnostic("error", f"{name}: {problem}", mark, None, hint or None, code)
    return [ImportProblem(diagnostic, traceback)] if problem else []


def _try(
    topology: Topology, kind: str, name: str, env: Mapping[str, str] = MappingProxyType({})
) -> tuple[str, str, str]:
    """Problem, hint and traceback; all empty when it loads."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.operate.try_import", kind, name],
            input=dump(topology),
            capture_output=True,
            timeout=IMPORT_TIMEOUT,
            env={**os.environ, **env},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"importing it took more than {IMPORT_TIMEOUT:.0f} s", "", ""
    answer = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode == 0 and answer == ["ok"]:
        return "", "", ""
    if done.returncode == try_import.REFUSED and answer:
        problem, hint, traceback = json.loads(answer[0])
        return problem, hint, traceback
    return (
        f"importing it ended the process (exit code {done.returncode})",
        "code at the top of a module must not exit",
        done.stderr.decode(errors="replace")[-2000:],
    )
