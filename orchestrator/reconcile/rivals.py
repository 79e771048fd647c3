"""Which steps would take away what another holds (walk "apply", fourth step; rule 7 of the planner). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from orchestrator.brokers.base import Desired, Observed, ResourceId
from orchestrator.reconcile.plan import Action, Operation, holding, inside, refuse
from orchestrator.topology.model import Mode, Topology
from orchestrator.topology.routing import intersection


def queues(topology: Topology, desired: Iterable[Desired]) -> set[ResourceId]:
    """The channels among `desired` in which each event type has one reader."""
    names = {name for name, channel in topology.channels.items() if channel.mode is Mode.QUEUE}
    return {d.id for d in desired if d.id.kind == "channel" and d.where[1] in names}


def refuse_readers(
    topology: Topology, desired: Sequence[Desired], asked: Sequence[Operation], left: Sequence[Operation]
) -> list[Operation]:
    """`asked`, refusing what would begin to read from a queue beside a subscription of no file (one of `left`) that
    holds events: its agent was renamed, most likely, and they would never be handled, or be handled twice."""
    lasting = queues(topology, desired) - {o.resource for o in asked if o.action is Action.REPLACE}
    kept = [o for o in left if o.action is Action.KEEP and o.events]
    waiting = {queue: olds for queue in lasting if (olds := [o for o in kept if inside(o.resource, queue)])}
    return [
        next((_beside(o, old) for q, olds in waiting.items() for old in olds if _begins(o, q) and _same(o, old)), o)
        for o in asked
    ]


def refuse_taken(topology: Topology, observed: Sequence[Observed], asked: Sequence[Operation]) -> list[Operation]:
    """`asked`, refusing what the broker cannot hold beside something that is there and not in the file."""
    taken = {resource: there for there in observed for resource in there.blocks}
    return [_taken(o, taken[o.resource], topology) if o.action.pending and o.resource in taken else o for o in asked]


def _taken(operation: Operation, there: Observed, topology: Topology) -> Operation:
    if there.owner == topology.name:
        whose = "is labelled ours, though this file does not name it"
        hint = (
            f"set `address: {there.id.name}` to go on with it; or leave this channel out of one apply "
            f"--prune{f' --allow-loss={there.id.name}' if there.events else ''}"
        )
    else:
        whose = f"belongs to topology {there.owner}" if there.owner else "has no owner label"
        hint = (
            f"give brokers.{operation.resource.broker} a `prefix:` of its own; or, to share those events, declare a "
            f"channel with `address: {there.id.name}` and `external: true`"
        )
    return refuse(operation, f"event types of it go to {there.id} already, which {whose}", hint=hint)


def _begins(operation: Operation, queue: ResourceId) -> bool:
    return operation.action in (Action.CREATE, Action.UPDATE) and inside(operation.resource, queue)


def _same(one: Operation, other: Operation) -> bool:
    """Whether two subscriptions of a queue read a common event type, as far as its broker keeps the patterns that a
    subscription reads: a tuple among its settings."""
    wanted = one.desired.settings if one.desired else {}
    there = other.observed.settings if other.observed else {}
    pairs = [(value, there.get(name)) for name, value in wanted.items()]
    kept = [(new, old) for new, old in pairs if isinstance(new, tuple) and isinstance(old, tuple)]
    return not kept or any(intersection(a, b) for new, old in kept for a in new for b in old)


def _beside(operation: Operation, old: Operation) -> Operation:
    agent = operation.desired.where[1] if operation.desired else ""
    return refuse(
        operation,
        f"{holding(old)} wait in {old.resource}, which this file does not name: {agent} would not read on from there",
        hint=f"if {agent} is its agent renamed, give it `group: {old.resource.name.rpartition('/')[2]}`; "
        f"to lose what waits: --prune --allow-loss={old.resource.name}",
    )
