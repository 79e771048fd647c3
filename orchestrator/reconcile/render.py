"""The plan in words (walk "apply", for the person who confirms it): text and markdown. Pure.

Stable line by line, so that a plan reads well in a diff and golden tests can compare it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from orchestrator.brokers.base import Setting
from orchestrator.reconcile.plan import Action, Operation, Plan
from orchestrator.reconcile.planner import holding
from orchestrator.topology.model import Mark

_INDENT = " " * 12
_SIGNS = {
    Action.CREATE: "+",
    Action.UPDATE: "~",
    Action.REPLACE: "±",
    Action.DELETE: "-",
    Action.REFUSE: "!",
    Action.KEEP: "=",
}
_COLORS = {
    Action.CREATE: "32",
    Action.UPDATE: "33",
    Action.REPLACE: "35",
    Action.DELETE: "31",
    Action.REFUSE: "31;1",
    Action.KEEP: "2",
}
_SUMMARY = (
    (Action.CREATE, "to create"),
    (Action.UPDATE, "to update"),
    (Action.REPLACE, "to replace"),
    (Action.DELETE, "to delete"),
    (Action.REFUSE, "refused"),
    (Action.KEEP, "left alone"),
)


def text(plan: Plan, *, color: bool = False) -> str:
    """For a terminal or a log; ends with a newline. Secrets are redacted."""
    lines = [f"{plan.topology} (revision {plan.revision})"]
    lines += [f"  broker {line}" for line in _brokers(plan)]
    for operation in plan.operations:
        lines += ["", *_operation(operation, color)]
    if plan.workers:
        lines.append("")
    for step in plan.workers:
        lines.append(f"  {step.action:<8} workers of {step.agent}{_at(step.mark)}")
        lines.append(f"           {step.cause}")
    for title, sentences in (("Warnings", plan.warnings), ("Good to know", plan.notes)):
        if sentences:
            lines += ["", f"{title}:", *(f"  * {sentence}" for sentence in sentences)]
    lines += ["", summary(plan)]
    return plan.redact("\n".join(lines) + "\n")


def markdown(plan: Plan) -> str:
    """For a pull request's comment: a summary, a table, and the settings folded away. Secrets are redacted."""
    lines = [f"### Plan for `{plan.topology}`", "", f"**{summary(plan)}**", ""]
    lines += [f"- broker {line}" for line in _brokers(plan)]
    if plan.operations or plan.workers:
        lines += ["", "| | resource | because | touches |", "| --- | --- | --- | --- |"]
    for o in plan.operations:
        touches = (o.loses and f"**loses {o.loses}**") or (holding(o) if o.events else "")
        because = f"{_cell(o.cause)}{f' (`{o.mark}`)' if o.mark else ''}{f'<br>{_cell(o.hint)}' if o.hint else ''}"
        lines.append(f"| {o.action} | {o.resource.kind} `{o.resource.name}` | {because} | {_cell(touches)} |")
    for step in plan.workers:
        lines.append(f"| {step.action} | workers of `{step.agent}` | {_cell(step.cause)} | |")
    changed = [o for o in plan.operations if o.changes]
    if changed:
        lines += ["", "<details><summary>Settings</summary>", "", "```diff"]
        for o in changed:
            lines.append(f"# {o.resource}")
            for c in o.changes:
                if c.old is not None:
                    lines.append(f"- {c.setting}: {_value(c.old)}")
                lines.append(f"+ {c.setting}: {_value(c.new)}")
        lines += ["```", "", "</details>"]
    for title, sentences in (("Warnings", plan.warnings), ("Good to know", plan.notes)):
        if sentences:
            lines += ["", f"**{title}**", "", *(f"- {sentence}" for sentence in sentences)]
    return plan.redact("\n".join(lines) + "\n")


def summary(plan: Plan) -> str:
    """One line: "2 to create, 1 refused"."""
    counts = [(sum(o.action is action for o in plan.operations), words) for action, words in _SUMMARY]
    parts = [f"{count} {words}" for count, words in counts if count]
    if plan.workers:
        parts.append(f"workers of {len(plan.workers)} agent{'' if len(plan.workers) == 1 else 's'} to change")
    if plan.empty:
        left = f" ({', '.join(parts)})" if parts else ""
        return (
            f"Nothing to do: {'the brokers match' if len(plan.brokers) > 1 else 'the broker matches'} the file{left}."
        )
    if plan.refused:
        return f"{', '.join(parts)}. Nothing will be done until every refusal is resolved."
    return f"{', '.join(parts)}."


def line(operation: Operation) -> str:
    """One operation in one line, for progress."""
    return f"{_SIGNS[operation.action]} {operation.action:<7} {operation.resource}"


def _operation(operation: Operation, color: bool) -> Iterable[str]:
    head = f"{_SIGNS[operation.action]} {operation.action:<7} {operation.resource}"
    if color:
        head = f"\x1b[{_COLORS[operation.action]}m{head}\x1b[0m"
    yield f"  {head}{_at(operation.mark)}"
    yield f"{_INDENT}{operation.cause}"
    if operation.action is Action.CREATE:
        settings = ", ".join(f"{c.setting}: {_value(c.new)}" for c in operation.changes if c.new is not None)
        yield from textwrap.wrap(
            settings, 110, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
        )
    else:
        for change in operation.changes:
            yield f"{_INDENT}{change.setting}: {_value(change.old)} -> {_value(change.new)}"
    if operation.loses:
        yield f"{_INDENT}loses {operation.loses}"
    if operation.events and operation.loses != holding(operation):
        yield f"{_INDENT}holds {holding(operation)}"
    if operation.hint:
        yield f"{_INDENT}{operation.hint}"


def _brokers(plan: Plan) -> Iterable[str]:
    for broker in plan.brokers:
        where = "embedded: development" if broker.embedded else broker.url
        cluster = f" · cluster {broker.cluster_id}" if broker.cluster_id else ""
        yield f"{broker.name} · {broker.kind} · {where}{cluster}"


def _at(mark: Mark | None) -> str:
    return f"   {mark}" if mark else ""


def _value(value: Setting) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if value != "" else '""'


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
