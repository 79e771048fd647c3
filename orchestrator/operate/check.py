"""The check of `validate` beyond the file itself: whether the handlers import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.operate import try_handler
from orchestrator.topology import dump
from orchestrator.topology.diagnostics import Diagnostic
from orchestrator.topology.model import Agent, Topology

#: Seconds that importing one agent's handler may take.
IMPORT_TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class HandlerProblem:
    """A handler that does not load, and the user module's own traceback where there is one."""

    diagnostic: Diagnostic
    traceback: str = ""


def handlers(topology: Topology) -> list[HandlerProblem]:
    """The agents whose handlers do not load. Each is imported in a process of its own, so that code which exits,
    crashes or hangs cannot take this one along."""
    found = []
    for agent in topology.agents.values():
        if agent.handler is None:
            continue
        problem, hint, traceback = _try(topology, agent)
        if problem:
            mark = topology.mark("agents", agent.name, "handler")
            found.append(HandlerProblem(Diagnostic("error", problem, mark, None, hint or None, "handler"), traceback))
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


def _try(topology: Topology, agent: Agent) -> tuple[str, str, str]:
    """Problem, hint and traceback; all empty when the handler loads."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator.operate.try_handler", agent.name],
            input=dump(topology),
            capture_output=True,
            timeout=IMPORT_TIMEOUT,
            env={**os.environ, **agent.env},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{agent.name}: importing the handler took more than {IMPORT_TIMEOUT:.0f} s", "", ""
    answer = done.stdout.decode(errors="replace").strip().splitlines()[-1:]
    if done.returncode == 0 and answer == ["ok"]:
        return "", "", ""
    if done.returncode == try_handler.REFUSED and answer:
        problem, hint, traceback = json.loads(answer[0])
        return f"{agent.name}: {problem}", hint, traceback
    return (
        f"{agent.name}: importing the handler ended the process (exit code {done.returncode})",
        "code at the top of a module must not exit",
        done.stderr.decode(errors="replace")[-2000:],
    )
