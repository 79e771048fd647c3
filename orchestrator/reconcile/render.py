"""The plan in words (walk "apply", for the person who confirms it): text and markdown. Pure.

Stable line by line, so that a plan reads well in a diff and golden tests can compare it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.brokers.base import Setting
from orchestrator.reconcile.plan import Action, Operation, Plan, holding
from orchestrator.topology.model import Mark

_INDENT = " " * 12
_WIDTH = 110  # of a created resource's settings: one line, the rest is for `-o json`
_MORE = "…"
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
    lines += _operations(plan.operations, color)
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


def _operations(operations: Sequence[Operation], color: bool) -> Iterable[str]:
    """Created resources close together, since there is nothing to weigh; everything else stands apart."""
    lines: list[str] = []
    before: Action | None = None
    for operation in operations:
        if not (before is operation.action is Action.CREATE):
            lines.append("")
        before = operation.action
        lines += _created(operation, color) if before is Action.CREATE else _operation(operation, color)
    if any(line.endswith(_MORE) for line in lines):
        lines += ["", f"  {_MORE} -o json prints every setting"]
    return lines


def _created(operation: Operation, color: bool) -> Iterable[str]:
    place = f", {operation.mark}" if operation.mark else ""
    yield f"  {_head(operation, color)}   {operation.cause}{place}"
    if operation.resource.kind == "internal":
        return  # ours alone: nobody chose its settings
    shown: list[str] = []
    width = len(_INDENT)
    for part in (f"{c.setting}: {_value(c.new)}" for c in operation.changes if _says_something(c.new)):
        if shown and width + len(part) + 2 > _WIDTH:
            shown.append(_MORE)
            break
        shown.append(part)
        width += len(part) + 2
    if shown:
        yield f"{_INDENT}{', '.join(shown)}"


def _says_something(value: Setting) -> bool:
    """Brokers write "no limit" and "not set" as -1, 0, empty or false."""
    return value not in (None, -1, 0, "", ())


def _operation(operation: Operation, color: bool) -> Iterable[str]:
    yield f"  {_head(operation, color)}{_at(operation.mark)}"
    yield f"{_INDENT}{operation.cause}"
    for change in operation.changes:
        yield f"{_INDENT}{change.setting}: {_value(change.old)} -> {_value(change.new)}"
    if operation.loses:
        yield f"{_INDENT}loses {operation.loses}"
    if operation.events and operation.loses != holding(operation):
        yield f"{_INDENT}holds {holding(operation)}"
    if operation.hint:
        yield f"{_INDENT}{operation.hint}"


def _head(operation: Operation, color: bool) -> str:
    head = f"{_SIGNS[operation.action]} {operation.action:<7} {operation.resource}"
    return f"\x1b[{_COLORS[operation.action]}m{head}\x1b[0m" if color else head


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
