"""The walk "apply" from brokers to brokers: look, plan, and carry out. Joins the pure planner to live connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from urllib.parse import urlsplit

from orchestrator.brokers import registry
from orchestrator.brokers.base import Connection, Desired, Observed, Setting, Verdict
from orchestrator.errors import RefusedError
from orchestrator.reconcile import executor, planner
from orchestrator.reconcile.executor import Connects
from orchestrator.reconcile.lock import apply_lock
from orchestrator.reconcile.plan import BrokerInfo, Operation, Plan, stale_reasons
from orchestrator.reconcile.planner import Consent
from orchestrator.topology.model import Agent, Broker, Topology


async def make_plan(
    topology: Topology,
    connections: Connects,
    *,
    consent: Consent | None = None,
    running: Mapping[str, Agent] | None = None,
    destroy: bool = False,
) -> Plan:
    """Reads every broker of `topology` and changes nothing. `running`: the agents of a supervisor, None without one.

    Raises BrokerUnavailable when a broker does not answer, RefusedError when it is not the cluster that the file
    names.
    """
    desired: list[Desired] = []
    observed: list[Observed] = []
    brokers: list[BrokerInfo] = []
    warnings: list[str] = []
    notes: list[str] = []
    for broker in topology.brokers.values():
        adapter = registry.adapter(broker.kind)
        connection = await connections.get(broker.name)
        brokers.append(await _identify(broker, connection))
        wanted = adapter.desired(topology, broker)
        desired += wanted
        observed += await connection.observe(wanted)
        warnings += await _concerns(broker, connection)
        notes += [note for note in adapter.capabilities.notes if note not in notes]
    if destroy:
        result = planner.plan_destroy(topology, observed, consent=consent)
        return replace(result, brokers=tuple(brokers))
    result = planner.plan(topology, desired, observed, _judge(topology), consent=consent, running=running)
    return replace(
        result,
        brokers=tuple(brokers),
        warnings=(*(topology.redact(w) for w in warnings), *result.warnings),
        notes=tuple(notes),
    )


async def execute(
    plan: Plan,
    connections: Connects,
    *,
    report: Callable[[Operation], None] = lambda operation: None,
) -> int:
    """Carries `plan` out; see executor.execute. The caller holds the apply lock."""
    return await executor.execute(plan, connections, report=report)


async def apply(
    topology: Topology,
    connections: Connects,
    *,
    consent: Consent | None = None,
    running: Mapping[str, Agent] | None = None,
    saved: Plan | None = None,
    confirm: Callable[[Plan], None] = lambda plan: None,
    report: Callable[[Operation], None] = lambda operation: None,
    prepare: Callable[[Plan], Awaitable[Plan]] | None = None,
    destroy: bool = False,
    patience: float = 30.0,
) -> Plan:
    """Plans and carries out under the apply lock; returns the plan that was carried out.

    `confirm` is called with the plan, and raises to stop; then `prepare` may leave out what has to wait. `saved` is a
    plan from a file: its consent counts, and it is refused when file or brokers have changed since. Raises LockedError,
    RefusedError, PlanError, BrokerUnavailable.
    """
    if saved is not None:
        consent = Consent(saved.prune, frozenset(saved.allow_loss))
    async with apply_lock(topology.state_dir, patience=patience):
        plan = await make_plan(topology, connections, consent=consent, running=running, destroy=destroy)
        if saved is not None and (reasons := stale_reasons(saved, plan)):
            raise RefusedError(
                "the plan is stale: " + "; ".join(reasons), hint="make it again: orchestrator plan --out FILE"
            )
        confirm(plan)
        if prepare is not None and not plan.refused:
            plan = await prepare(plan)
        await execute(plan, connections, report=report)
        return plan


def broker_url(broker: Broker) -> str:
    """The broker's URL without credentials."""
    if broker.embedded:
        return broker.url
    return ",".join(_without_credentials(part) for part in broker.url.split(","))


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


async def _identify(broker: Broker, connection: Connection) -> BrokerInfo:
    if broker.cluster_id is None:
        return BrokerInfo(broker.name, broker.kind, broker_url(broker))
    actual = await connection.cluster_id()
    if actual != broker.cluster_id:
        raise RefusedError(
            f"broker {broker.name} at {broker_url(broker)} is cluster {actual!r}, "
            f"and the file says cluster_id: {broker.cluster_id!r}; nothing was changed",
            hint=f"correct brokers.{broker.name}.url, or set its cluster_id to {actual!r} if this is the right one",
        )
    return BrokerInfo(broker.name, broker.kind, broker_url(broker), actual)


async def _concerns(broker: Broker, connection: Connection) -> Sequence[str]:
    """What the broker's own settings endanger."""
    return [
        f"broker {broker.name}: {fact.name} is {fact.value}{f' ({fact.hint})' if fact.hint else ''}"
        for fact in await connection.facts()
        if fact.level != "ok"
    ]


def _judge(topology: Topology) -> planner.Judge:
    def judge(kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
        adapter = registry.adapter(topology.brokers[observed.id.broker].kind)
        return adapter.judge(kind, setting, old, new, observed)

    return judge
