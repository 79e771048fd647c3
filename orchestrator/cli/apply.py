"""Commands that change brokers and start workers: plan, apply, dev, destroy."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import console
from orchestrator.cli.options import (
    AllowLoss,
    Files,
    Output,
    OutputOption,
    Sets,
    Sources,
    VarsFiles,
    Yes,
    load_all,
)
from orchestrator.errors import OrchestratorError

if TYPE_CHECKING:
    from orchestrator.operate.applying import Listener
    from orchestrator.reconcile.plan import Operation, Plan
    from orchestrator.reconcile.planner import Consent
    from orchestrator.topology.diagnostics import Diagnostic
    from orchestrator.topology.loader import Loaded
    from orchestrator.topology.model import Topology

# `operate` and `reconcile` import the brokers' client libraries: they are imported where a command runs.


class PlanOutput(StrEnum):
    TEXT = "text"
    JSON = "json"
    MARKDOWN = "markdown"


#: Warnings of the file that plan and apply show; validate shows all.
_SHOWN = 10

Prune = Annotated[bool, typer.Option("--prune", help="Delete what is labelled ours and not in the file.")]


def register(app: typer.Typer) -> None:
    for command in (plan, apply, dev, destroy):
        app.command()(command)


def plan(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    prune: Prune = False,
    allow_loss: AllowLoss = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Keep it for apply --plan FILE.")] = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit with 3 when changes are pending.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    output: Annotated[PlanOutput, typer.Option("-o", "--output", help="text, json or markdown.")] = PlanOutput.TEXT,
) -> None:
    """Show what apply would do, and why. Changes nothing."""
    from orchestrator.operate import applying
    from orchestrator.reconcile import render

    loaded = _loaded(sources, files, sets, vars_files, strict=strict)
    made = asyncio.run(applying.plan(loaded.topology, _consent(prune, allow_loss)))
    _check_names(made)
    if output is PlanOutput.TEXT:
        _show_warnings(loaded.warnings)
    else:
        said = tuple(f"{d.mark}: {d.message}" if d.mark else d.message for d in loaded.warnings)
        made = replace(made, warnings=(*said, *made.warnings))
    if out is not None:
        made.save(out)
    if output is PlanOutput.JSON:
        console.data_json(made.to_json())
    elif output is PlanOutput.MARKDOWN:
        console.data(render.markdown(made))
    else:
        console.data(render.text(made, color=console.wants_color()), painted=True)
    if strict and made.warnings:
        raise OrchestratorError("there are warnings, and --strict makes them errors")
    if made.refused:
        raise typer.Exit(1)
    if exit_code and not made.empty:
        raise typer.Exit(3)


def apply(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Leave the workers in the background.")] = False,
    no_workers: Annotated[bool, typer.Option("--no-workers", help="Reconcile only; start no workers.")] = False,
    prune: Prune = False,
    allow_loss: AllowLoss = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="What plan --out wrote.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings are errors.")] = False,
    yes: Yes = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Make the brokers match the file, then start the workers, or hand the change to those that run."""
    from orchestrator.operate import applying
    from orchestrator.reconcile.plan import Plan

    if plan_file is not None and (prune or allow_loss):
        raise typer.BadParameter("--plan FILE carries its own --prune and --allow-loss: give them to plan --out")
    if detach and no_workers:
        raise typer.BadParameter("-d leaves the workers in the background, --no-workers starts none: give one of them")
    topology = _load(sources, files, sets, vars_files, strict=strict)
    saved = Plan.read(plan_file) if plan_file is not None else None
    workers = applying.Workers.FOREGROUND
    if detach or no_workers:
        workers = applying.Workers.NONE if no_workers else applying.Workers.DETACH
    listener = _listener(yes=yes or saved is not None, output=output)
    raise typer.Exit(
        asyncio.run(
            applying.apply(topology, _consent(prune, allow_loss), workers, listener, saved=saved, logs=output.value)
        )
    )


def dev(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    prune: Prune = False,
) -> None:
    """Apply without questions, and again after each edit of the file, its includes or the handlers' code.

    An edit that is wrong is shown, and what ran before goes on. Nothing that holds events is deleted.
    """
    from orchestrator.operate import developing

    names = [*(sources or []), *(files or [])]
    if "-" in names:
        raise typer.BadParameter("dev watches files: it cannot read stdin")

    def load() -> Topology:
        return _load(sources, files, sets, vars_files)

    listener = _listener(yes=True, output=Output.TEXT)
    raise typer.Exit(asyncio.run(developing.develop(load, _consent(prune, None), listener, complain=console.complain)))


def destroy(
    sources: Sources = None,
    files: Files = None,
    sets: Sets = None,
    vars_files: VarsFiles = None,
    allow_loss: AllowLoss = None,
    yes: Yes = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """Stop the workers and delete everything on the brokers that this topology owns."""
    from orchestrator.operate import applying

    topology = _load(sources, files, sets, vars_files)

    def decide(planned: Plan) -> Consent:
        if not planned.operations:
            console.say(f"nothing on the broker{'s' * (len(planned.brokers) > 1)} is labelled {topology.name}")
            return _consent(True, allow_loss)
        for name, hint in planned.unknown:  # what holds events and was meant is refused below
            console.warn(f"{_nothing(name)}: {hint}")
        _show(planned, output)
        losses = [o for o in planned.refused if o.needs]
        named = tuple(allow_loss or ())
        if losses and len(losses) == len(planned.refused):
            question = f"This loses what they hold. Type the topology's name ({topology.name}) to go on:"
            if not console.typed(question, topology.name):
                again = applying.destroy_again(planned)
                raise OrchestratorError(
                    f"{len(losses)} of these hold{'s' * (len(losses) == 1)} events; nothing was changed",
                    hint=f"{again}, or the topology's name on a terminal",
                )
            return _consent(True, [*named, *(o.needs for o in losses)])
        if not planned.refused and planned.pending:
            console.confirm("Delete all this?", yes=yes)
        if planned.refused:
            first = next(o for o in planned.refused if not o.needs)
            raise OrchestratorError(f"{first.resource}: {first.cause}; nothing was changed", hint=first.hint)
        return _consent(True, [*named])

    listener = _listener(yes=True, output=output, show=False)
    done = asyncio.run(applying.destroy(topology, _consent(True, allow_loss), decide, listener))
    if output is Output.JSON:
        console.data_json(done.to_json())
    else:
        console.data(f"{topology.name}: {len(done.pending)} deleted")


def _load(
    sources: list[str] | None,
    files: list[str] | None,
    sets: list[str] | None,
    vars_files: list[Path] | None,
    *,
    strict: bool = False,
) -> Topology:
    """The topology; its warnings are shown, the first few of many."""
    loaded = _loaded(sources, files, sets, vars_files, strict=strict)
    _show_warnings(loaded.warnings)
    return loaded.topology


def _loaded(
    sources: list[str] | None,
    files: list[str] | None,
    sets: list[str] | None,
    vars_files: list[Path] | None,
    *,
    strict: bool,
) -> Loaded:
    from orchestrator.topology.diagnostics import TopologyError

    loaded = load_all([*(sources or []), *(files or [])], sets, vars_files, lint=True)
    if loaded.warnings and strict:
        raise TopologyError(loaded.warnings, loaded.topology.files)
    return loaded


def _show_warnings(warnings: list[Diagnostic]) -> None:
    from orchestrator.topology.diagnostics import render

    if warnings:
        console.say(render(warnings[:_SHOWN], color=console.wants_color(err=True)), painted=True)
    if len(warnings) > _SHOWN:
        console.say(f"and {len(warnings) - _SHOWN} more warnings: orchestrator validate shows them all")


def _consent(prune: bool, allow_loss: list[str] | None) -> Consent:
    from orchestrator.reconcile.planner import Consent

    return Consent(prune, frozenset(allow_loss or ()))


def _check_names(plan: Plan) -> None:
    """A loss that was allowed for a name of nothing was meant for something else."""
    for name, hint in plan.unknown:
        console.misused(_nothing(name), hint=hint)


def _nothing(name: str) -> str:
    return f"--allow-loss={name} names nothing in this file or on its brokers"


def _show(plan: Plan, output: Output) -> None:
    """Text goes to stderr when stdout is kept for JSON."""
    from orchestrator.reconcile import render

    if output is Output.JSON:
        console.say(render.text(plan, color=console.wants_color(err=True)), painted=True)
    elif plan.empty:
        console.data(f"{plan.topology} (revision {plan.revision}): {render.summary(plan)}")
        for text in plan.warnings:
            console.warn(text)
    else:
        console.data(render.text(plan, color=console.wants_color()), painted=True)


def _listener(*, yes: bool, output: Output, show: bool = True) -> Listener:
    from orchestrator.operate.applying import Listener
    from orchestrator.reconcile import render

    def confirm(plan: Plan) -> None:
        _check_names(plan)
        if show:
            _show(plan, output)
        if not plan.empty and not plan.refused:
            console.confirm("Apply this?", yes=yes)
        if output is Output.JSON and show and not plan.refused:
            console.data_json(plan.to_json())

    def report(operation: Operation) -> None:
        console.say(render.line(operation))

    return Listener(confirm=confirm, report=report, progress=console.progress, say=console.say)
