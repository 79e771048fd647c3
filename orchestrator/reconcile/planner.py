"""Desired + observed -> Plan (walk "apply", fourth step). Pure: every rule of what may be touched is here.

The rules, in the order in which they are asked of one resource:

1. external: it must exist, and is never changed.   2. missing: create.   3. not labelled ours: refuse.
4. a setting differs: change it in place; refuse what the broker cannot change, or what would lose events, unless the
   loss was named (--allow-loss), which makes the first a replacement.   5. protected: never deleted, never shrunk.
6. ours, but in no file: a subscription (or internal resource) without events goes; anything else is listed, and goes
   with --prune; if it holds events, only when its name was given to --allow-loss.
7. nothing takes from another what it holds, or what it is to get: reconcile.rivals.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.brokers.base import Allowed, Desired, Observed, ResourceId, Setting, Verdict
from orchestrator.reconcile import rivals
from orchestrator.reconcile.plan import Action, Change, Operation, Plan, WorkerStep, holding, inside, refuse
from orchestrator.topology.diagnostics import listing
from orchestrator.topology.model import Agent, Mark, Topology, digest
from orchestrator.topology.near import near

#: Adapter.judge, bound to the broker of the observed resource.
Judge = Callable[[str, str, Setting, Setting, Observed], Verdict]

_DELETE_ORDER = {"subscription": 0, "channel": 1, "internal": 2}


@dataclass(frozen=True, slots=True)
class Consent:
    """What the command line allowed."""

    prune: bool = False
    allow_loss: frozenset[str] = frozenset()

    def names(self, resource: ResourceId) -> bool:
        """Whether the loss of `resource` was named, as NAME or BROKER:NAME."""
        return resource.name in self.allow_loss or f"{resource.broker}:{resource.name}" in self.allow_loss


def plan(
    topology: Topology,
    desired: Sequence[Desired],
    observed: Sequence[Observed],
    judge: Judge,
    *,
    consent: Consent | None = None,
    running: Mapping[str, Agent] | None = None,
) -> Plan:
    """The steps from `observed` to `desired`. `running` is what a supervisor runs now (None: there is none)."""
    consent = consent or Consent()
    present = {o.id: o for o in observed}
    wanted = {d.id for d in desired}
    operations: list[Operation] = []
    replaced: list[ResourceId] = []
    for item in desired:
        operation = _reconcile(topology, item, present.get(item.id), judge, consent)
        if (parent := _replaced_parent(item.id, replaced)) and (operation is None or operation.action.pending):
            operation = Operation(
                Action.CREATE,
                item.id,
                f"it goes when channel {parent.name} is replaced",
                mark=topology.mark(*item.where),
                changes=_settings(item),
                desired=item,
            )
        if operation is not None:
            operations.append(operation)
            if operation.action is Action.REPLACE and item.id.kind == "channel":
                replaced.append(item.id)
    orphans = [o for o in observed if o.id not in wanted and o.owner == topology.name]
    left = _orphans(orphans, consent)
    operations = rivals.refuse_taken(topology, observed, operations)
    operations = _in_order(rivals.refuse_readers(topology, desired, operations, left), left)
    return Plan(
        topology=topology.name,
        revision=topology.revision(),
        operations=tuple(operations),
        workers=tuple(worker_steps(topology, running)) if running is not None else (),
        prune=consent.prune,
        allow_loss=tuple(sorted(consent.allow_loss)),
        unknown=tuple(_unknown(consent, {*present, *wanted})),
        secrets=topology.secrets,
    )


def plan_destroy(topology: Topology, observed: Sequence[Observed], *, consent: Consent | None = None) -> Plan:
    """Deletes all that is labelled with this topology; refuses what is protected, or holds events and is not named."""
    consent = consent or Consent()
    owned = [o for o in observed if o.owner == topology.name]
    going = {o.id for o in owned if o.id.kind == "channel"}
    operations = []
    for item in sorted(owned, key=lambda o: _DELETE_ORDER[o.id.kind]):
        covered = item.id.kind == "subscription" and any(inside(item.id, channel) for channel in going)
        operations.append(_deletion(item, "destroy was asked for", consent, covered=covered))
    return Plan(
        topology=topology.name,
        revision=topology.revision(),
        operations=tuple(operations),
        prune=True,
        allow_loss=tuple(sorted(consent.allow_loss)),
        unknown=tuple(_unknown(consent, {o.id for o in observed})),
        secrets=topology.secrets,
    )


def worker_steps(topology: Topology, running: Mapping[str, Agent]) -> Iterable[WorkerStep]:
    """What a supervisor that runs `running` does for the agents of `topology`."""
    for name, agent in topology.agents.items():
        if agent.external:
            continue
        mark = topology.mark("agents", name)
        before = running.get(name)
        if before is None or before.external:
            yield WorkerStep("start", name, f"agents.{name} is new", mark)
        elif (changed := _changed_settings(before, agent)) != []:
            yield WorkerStep("update", name, f"agents.{name} changed: {', '.join(changed)}", mark)
    for name, agent in running.items():
        if not agent.external and (name not in topology.agents or topology.agents[name].external):
            yield WorkerStep("stop", name, f"agents.{name} is no longer in the file")


def _reconcile(
    topology: Topology, want: Desired, have: Observed | None, judge: Judge, consent: Consent
) -> Operation | None:
    """The one operation that `want` needs, or None."""
    mark = topology.mark(*want.where)
    asked_by = ".".join(want.where)
    if want.external:
        if have is not None:
            return None
        return Operation(
            Action.REFUSE,
            want.id,
            f"{asked_by} is external, so it must exist already, and it does not",
            mark=mark,
            hint=f"let its owner create {want.id.name}, or remove `external: true` so that this topology does",
        )
    if have is None:
        return Operation(
            Action.CREATE, want.id, f"{asked_by} asks for it", mark=mark, changes=_settings(want), desired=want
        )
    if have.owner != topology.name:
        return _not_ours(want, have, mark)
    changes = tuple(
        Change(name, have.settings.get(name), value)
        for name, value in want.settings.items()
        if have.settings.get(name) != value
    )
    if not changes and want.protect == have.protect:
        return None
    return _change(topology, want, have, changes, judge, consent)


def _change(
    topology: Topology,
    want: Desired,
    have: Observed,
    changes: tuple[Change, ...],
    judge: Judge,
    consent: Consent,
) -> Operation:
    verdicts = [(c, judge(want.id.kind, c.setting, c.old, c.new, have)) for c in changes]
    if want.protect != have.protect:  # a label, which every broker can change
        changes = (*changes, Change("protect", have.protect, want.protect))
    origin = want.origins.get(changes[0].setting, want.where)
    cause = f"{'.'.join(origin)} differs from the broker"
    losses = [v.loses for _, v in verdicts if v.loses] if have.events else []
    base = Operation(
        Action.UPDATE,
        want.id,
        cause,
        mark=topology.mark(*origin),
        changes=changes,
        events=have.events,
        bytes=have.bytes,
        exact=have.exact,
        loses="; ".join(losses),
        version=have.version,
        desired=want,
        observed=have,
    )
    never = [(c, v) for c, v in verdicts if v.allowed is Allowed.NEVER]
    swap = [(c, v) for c, v in verdicts if v.allowed is Allowed.REPLACE]
    if never:
        return refuse(
            base,
            f"{_why(never)}",
            hint=f"set {never[0][0].setting} back to {never[0][0].old!r}, or give it a new "
            f"{'group' if want.id.kind == 'subscription' else 'address'} in the file",
        )
    if (want.protect or have.protect) and (swap or losses):
        return refuse(
            base,
            "it is protected, and this would " + (f"lose {losses[0]}" if losses else "replace it"),
            hint="take the change back; a protected resource is unprotected only by `protect: false` and an apply",
        )
    if swap:
        everything = "its position" if want.id.kind == "subscription" else "everything in it"
        if consent.names(want.id):
            return replace(base, action=Action.REPLACE, cause=f"{_why(swap)}", loses=everything, needs=want.id.name)
        return refuse(
            replace(base, loses=everything, needs=want.id.name),
            f"{_why(swap)}",
            hint=f"to delete and create it, losing {everything}: --allow-loss={want.id.name}",
        )
    if losses and not consent.names(want.id):
        return refuse(
            replace(base, needs=want.id.name),
            f"it would lose {'; '.join(losses)}",
            hint=f"to accept that: --allow-loss={want.id.name}",
        )
    return replace(base, needs=want.id.name if losses else "")


def _not_ours(want: Desired, have: Observed, mark: Mark | None) -> Operation:
    whose = f"it belongs to topology {have.owner}" if have.owner else "it has no owner label"
    other = "`group:`" if want.id.kind == "subscription" else "`address:` (or the broker another `prefix:`)"
    hint = f"give it another {other}"
    if want.id.kind == "channel":
        hint += ", or declare it `external: true` to use it as it is"
    return Operation(
        Action.REFUSE,
        want.id,
        f"not ours: it exists, and {whose}",
        mark=mark,
        events=have.events,
        bytes=have.bytes,
        exact=have.exact,
        version=have.version,
        hint=hint,
        observed=have,
    )


def _orphans(orphans: Sequence[Observed], consent: Consent) -> list[Operation]:
    """What is labelled ours and stands in no file, in order of deletion."""
    operations: list[Operation] = []
    channels = [
        _deletion(o, "this file does not name it", consent) if consent.prune and not o.protect else _keep(o)
        for o in orphans
        if o.id.kind == "channel"
    ]
    going = {c.resource for c in channels if c.action is Action.DELETE}
    for item in sorted((o for o in orphans if o.id.kind != "channel"), key=lambda o: _DELETE_ORDER[o.id.kind]):
        covered = any(inside(item.id, channel) for channel in going)
        if item.protect:
            operations.append(_keep(item))
        elif item.events == 0 or covered:
            why = "its channel goes" if covered else "no agent of this file reads it, and it has no unprocessed events"
            if item.id.kind == "internal":
                why = "nothing needs it any more"
            operations.append(_deletion(item, why, consent, covered=covered))
        elif consent.prune:
            operations.append(_deletion(item, "this file does not name it", consent))
        else:
            operations.append(_keep(item))
    return sorted([*operations, *channels], key=lambda o: _DELETE_ORDER[o.resource.kind])


def _in_order(asked: Sequence[Operation], orphans: Sequence[Operation]) -> list[Operation]:
    """A subscription that goes makes room before the first one comes: in a queue one agent reads each type."""
    first = next((n for n, o in enumerate(asked) if o.resource.kind == "subscription"), len(asked))
    leaving = [o for o in orphans if o.resource.kind == "subscription" and o.action is Action.DELETE]
    return [*asked[:first], *leaving, *asked[first:], *(o for o in orphans if o not in leaving)]


def _deletion(item: Observed, cause: str, consent: Consent, *, covered: bool = False) -> Operation:
    """DELETE, or REFUSE when it is protected or holds events that were not named. `covered`: its channel goes too."""
    base = Operation(
        Action.DELETE,
        item.id,
        cause,
        events=item.events,
        bytes=item.bytes,
        exact=item.exact,
        loses=holding(item) if item.events and not covered else "",
        version=item.version,
        observed=item,
    )
    if item.protect:
        return refuse(
            base,
            "it is protected",
            hint="it stays: unprotect it first by naming it in the file with `protect: false` and an apply",
        )
    if item.events and not covered:
        base = replace(base, needs=item.id.name)
        if not consent.names(item.id):
            return refuse(
                base,
                "it holds events, and their loss was not named",
                hint=f"to lose them: --allow-loss={item.id.name}{_renamed(item)}",
            )
    return base


def _renamed(item: Observed) -> str:
    if item.id.kind != "subscription":
        return ""
    return f"; if its agent was renamed, give it `group: {item.id.name.rpartition('/')[2]}` to read on from here"


def _keep(item: Observed) -> Operation:
    if item.protect:
        hint = "it is protected, so it stays"
    else:
        hint = "to delete it: --prune" + (f" --allow-loss={item.id.name}{_renamed(item)}" if item.events else "")
    return Operation(
        Action.KEEP,
        item.id,
        "labelled ours, but this file does not name it",
        events=item.events,
        bytes=item.bytes,
        exact=item.exact,
        needs=item.id.name if item.events and not item.protect else "",
        version=item.version,
        hint=hint,
        observed=item,
    )


def _why(verdicts: Sequence[tuple[Change, Verdict]]) -> str:
    return "; ".join(f"{c.setting} cannot be changed in place{f': {v.why}' if v.why else ''}" for c, v in verdicts)


def _settings(want: Desired) -> tuple[Change, ...]:
    return tuple(Change(name, None, value) for name, value in want.settings.items())


def _replaced_parent(resource: ResourceId, replaced: Sequence[ResourceId]) -> ResourceId | None:
    return next((channel for channel in replaced if inside(resource, channel)), None)


def _unknown(consent: Consent, resources: Collection[ResourceId]) -> Iterable[tuple[str, str]]:
    names = sorted({r.name for r in resources if r.kind != "internal"})
    known = {*(r.name for r in resources), *(f"{r.broker}:{r.name}" for r in resources)}
    for name in sorted(consent.allow_loss - known):
        yield name, near(name, names) or (f"there are {listing(names)}" if names else "leave it out")


def _changed_settings(before: Agent, after: Agent) -> list[str]:
    """Names of the fields that differ, by digest of their canonical dump."""
    return [
        name
        for name in type(after).__dataclass_fields__
        if digest(getattr(before, name)) != digest(getattr(after, name))
    ]
