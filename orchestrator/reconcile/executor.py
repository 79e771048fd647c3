"""Carries out a plan (walk "apply", fifth step). No decision is taken here: what stands in the plan is done, in order.

Each step may be done twice without harm, so that a second apply converges after this one was killed anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from orchestrator.brokers.base import Connection
from orchestrator.errors import OrchestratorError, PlanError, RefusedError
from orchestrator.reconcile.plan import Action, Operation, Plan


class Connects(Protocol):
    """Gives the connection of a broker by its name; orchestrator.brokers.connections.Connections is one."""

    async def get(self, broker_name: str) -> Connection: ...


async def execute(
    plan: Plan,
    connections: Connects,
    *,
    report: Callable[[Operation], None] = lambda operation: None,
) -> int:
    """Carries out every pending operation and returns how many; `report` is called after each.

    Raises RefusedError before anything is changed when the plan holds a refusal; PlanError at the first operation
    that fails, saying what had been done and what was not.
    """
    if plan.refused:
        first = plan.refused[0]
        more = f" (and {len(plan.refused) - 1} more)" if len(plan.refused) > 1 else ""
        raise RefusedError(plan.redact(f"{first.resource}: {first.cause}{more}"), hint=plan.redact(first.hint))
    done = 0
    for operation in plan.pending:
        try:
            await _carry_out(operation, await connections.get(operation.resource.broker))
        except OrchestratorError as error:
            left = len(plan.pending) - done
            raise PlanError(
                plan.redact(
                    f"could not {operation.action} {operation.resource}: {error.message}\n"
                    f"done before that: {done} of {len(plan.pending)} operations; not done: {left}"
                ),
                hint=plan.redact(f"{error.hint + '; then ' if error.hint else ''}apply again: it goes on from here"),
            ) from error
        done += 1
        report(operation)
    return done


async def _carry_out(operation: Operation, connection: Connection) -> None:
    desired, observed = operation.desired, operation.observed
    if operation.action in (Action.REPLACE, Action.DELETE) and observed is not None:
        await connection.delete(observed)
    if operation.action in (Action.REPLACE, Action.CREATE) and desired is not None:
        await connection.create(desired)
    if operation.action is Action.UPDATE and desired is not None and observed is not None:
        await connection.update(desired, observed)
