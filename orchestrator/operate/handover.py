"""The walk "apply" while a supervisor runs: which reconcile steps must wait for its workers, and which wait for them.

A worker makes a subscription that is lost again, so one whose agent goes is deleted only when the workers that read it
have ended. In a queue, where each type has one reader, they end before the successor's subscription is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from orchestrator.brokers import registry
from orchestrator.brokers.base import Desired, ResourceId
from orchestrator.errors import HandlerLoadError, RefusedError
from orchestrator.operate import check
from orchestrator.operate.session import session
from orchestrator.reconcile import service
from orchestrator.reconcile.plan import Action, Operation, Plan, inside
from orchestrator.reconcile.planner import Consent
from orchestrator.reconcile.rivals import queues
from orchestrator.supervisor.control import ControlClient
from orchestrator.topology.model import Topology


class Handover:
    """One edit. `before` is what the supervisor runs; `prepare` is service.apply's, `finish` follows the update."""

    def __init__(self, topology: Topology, before: Topology, consent: Consent, say: Callable[[str], None]) -> None:
        self._topology = topology
        self._control = ControlClient(topology.state_dir)
        self._consent = consent
        self._say = say
        self._read_by = _readers(before)
        self._later: set[ResourceId] = set()

    async def prepare(self, plan: Plan) -> Plan:
        """The plan without what has to wait. Raises HandlerLoadError before anything is stopped for a successor that
        does not load."""
        going = [o for o in plan.pending if o.action is Action.DELETE and o.resource in self._read_by]
        first = _taken_over(self._topology, plan, going)
        if first:
            await self._check_successors(plan)
        for agent in sorted({self._read_by[o.resource] for o in first}):
            self._say(f"draining {agent}: another agent takes its queue over")
            await self._control.scale(agent, 0)
        self._later = {o.resource for o in going if o not in first}
        return replace(plan, operations=tuple(o for o in plan.operations if o.resource not in self._later))

    async def finish(self, report: Callable[[Operation], None]) -> None:
        """Deletes what waited, unless events came to it meanwhile."""
        if not self._later:
            return

        async def only_later(plan: Plan) -> Plan:
            kept = [o for o in plan.operations if o.resource in self._later and o.action is Action.DELETE]
            return replace(plan, operations=tuple(kept))

        async with session(self._topology, name="apply") as connections:
            await service.apply(self._topology, connections, consent=self._consent, report=report, prepare=only_later)

    async def _check_successors(self, plan: Plan) -> None:
        made = {o.desired.where[1] for o in plan.pending if o.action is Action.CREATE and o.desired is not None}
        agents = {name: self._topology.agents[name] for name in made if name in self._topology.agents}
        for problem in await asyncio.to_thread(check.handlers, replace(self._topology, agents=agents)):
            hint = "mend it and apply again; nothing was changed"
            raise HandlerLoadError(problem.diagnostic.message, hint=hint, traceback=problem.traceback)


async def without_workers(topology: Topology, before: Topology, plan: Plan) -> Plan:
    """For --no-workers beside a running supervisor: its workers go on, so what they read stays. Raises RefusedError
    when a successor needs it gone."""
    read_by = _readers(before)
    going = [o for o in plan.pending if o.action is Action.DELETE and o.resource in read_by]
    for operation in _taken_over(topology, plan, going):
        raise RefusedError(
            f"{operation.resource}: workers of {read_by[operation.resource]} still read it, and another agent is to",
            hint="apply without --no-workers, or stop the supervisor first",
        )
    return replace(plan, operations=tuple(o for o in plan.operations if o not in going))


def _readers(topology: Topology) -> dict[ResourceId, str]:
    """The subscriptions of our own agents in `topology`, and whose they are."""
    return {
        d.id: d.where[1]
        for d in _desired(topology)
        if d.id.kind == "subscription" and d.where[0] == "agents" and not topology.agents[d.where[1]].external
    }


def _taken_over(topology: Topology, plan: Plan, going: Sequence[Operation]) -> list[Operation]:
    """Those of a queue in which another agent's subscription is made: a type has one reader there."""
    made = [o.resource for o in plan.pending if o.action is Action.CREATE and o.resource.kind == "subscription"]
    taken = [q for q in queues(topology, _desired(topology)) if any(inside(new, q) for new in made)]
    return [o for o in going if any(inside(o.resource, queue) for queue in taken)]


def _desired(topology: Topology) -> list[Desired]:
    """All that `topology` asks of its brokers."""
    return [d for b in topology.brokers.values() for d in registry.adapter(b.kind).desired(topology, b)]
