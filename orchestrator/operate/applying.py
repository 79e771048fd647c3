"""The walk "apply" as a person starts it: plan, confirm, reconcile, then start the workers or hand the edit over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, Literal

from orchestrator.brokers.embedded import serving
from orchestrator.errors import RefusedError, SupervisorError
from orchestrator.operate.handover import Handover, without_workers
from orchestrator.operate.session import session
from orchestrator.reconcile import service
from orchestrator.reconcile.plan import Operation, Plan, holding
from orchestrator.reconcile.planner import Consent
from orchestrator.supervisor import detached
from orchestrator.supervisor.control import ControlClient, running
from orchestrator.supervisor.logs import foreground
from orchestrator.supervisor.supervisor import Supervisor
from orchestrator.topology.model import Agent, Topology

Progress = Callable[[Mapping[str, Any]], None]

#: Seconds that a detached supervisor gets until its workers are ready.
DETACH_TIMEOUT = 90.0


class Workers(StrEnum):
    """What happens to the workers after the brokers are reconciled."""

    FOREGROUND = "foreground"
    DETACH = "detach"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Listener:
    """What the caller wants to hear; `confirm` raises to stop before anything is changed."""

    confirm: Callable[[Plan], None]
    report: Callable[[Operation], None]
    progress: Progress
    say: Callable[[str], None]


async def plan(topology: Topology, consent: Consent, *, destroy: bool = False) -> Plan:
    """What apply (or destroy) would do. Changes nothing. Raises BrokerUnavailable, RefusedError."""
    agents = await running_agents(topology)
    async with session(topology, name="plan") as connections:
        return await service.make_plan(topology, connections, consent=consent, running=agents, destroy=destroy)


async def apply(
    topology: Topology,
    consent: Consent,
    workers: Workers,
    listener: Listener,
    *,
    saved: Plan | None = None,
    logs: Literal["text", "json"] = "text",
) -> int:
    """Reconciles, then starts or updates the workers; returns the exit code.

    In the foreground it writes their logs to stdout and returns when they have drained. Raises LockedError,
    RefusedError, PlanError, BrokerUnavailable, SupervisorError.
    """
    async with serving(topology):
        if workers is Workers.NONE:
            before = await running_topology(topology)
            prepare = partial(without_workers, topology, before) if before is not None else None
            await reconcile(topology, consent, listener, saved=saved, prepare=prepare)
            return 0
        if running(topology.state_dir):
            client = ControlClient(topology.state_dir)
            await edit(topology, consent, listener, partial(client.update, topology, listener.progress), saved=saved)
            listener.say("the running supervisor has taken it over")
            return 0
        await reconcile(topology, consent, listener, saved=saved)
        if workers is Workers.FOREGROUND:
            supervisor = Supervisor(topology, output=foreground(topology.state_dir, logs))
            return await supervisor.run()
        await detach(topology, listener)
        return 0


async def edit(
    topology: Topology,
    consent: Consent,
    listener: Listener,
    update: Callable[[], Awaitable[None]],
    *,
    saved: Plan | None = None,
) -> None:
    """Reconciles around `update`, which hands the topology to the supervisor that runs. Raises what both raise."""
    before = await ControlClient(topology.state_dir).topology()
    handover = Handover(topology, before, consent, listener.say)
    await reconcile(topology, consent, listener, saved=saved, prepare=handover.prepare)
    await update()
    await handover.finish(listener.report)


async def reconcile(
    topology: Topology,
    consent: Consent,
    listener: Listener,
    *,
    saved: Plan | None = None,
    destroy: bool = False,
    prepare: Callable[[Plan], Awaitable[Plan]] | None = None,
) -> Plan:
    """Plans, confirms and carries out; returns the plan."""
    agents = await running_agents(topology)
    async with session(topology, name="apply") as connections:
        return await service.apply(
            topology,
            connections,
            consent=consent,
            running=agents,
            saved=saved,
            confirm=listener.confirm,
            report=listener.report,
            prepare=prepare,
            destroy=destroy,
        )


async def destroy(topology: Topology, consent: Consent, decide: Callable[[Plan], Consent], listener: Listener) -> Plan:
    """Stops the workers and deletes what this topology owns; returns the plan that was carried out.

    `decide` sees the plan before anything is changed; it raises to stop, or returns what was consented to. What came
    since is looked for before the workers are stopped, and again when they have drained: RefusedError says how far it
    went.
    """
    consent = decide(await plan(topology, consent, destroy=True))
    stops = running(topology.state_dir)
    if stops:
        _check_overtaken(await plan(topology, consent, destroy=True), stopped=False)
        listener.say("draining the workers")
        await ControlClient(topology.state_dir).stop()
    last_look = replace(listener, confirm=partial(_check_overtaken, stopped=stops))
    return await reconcile(topology, consent, last_look, destroy=True)


def _check_overtaken(plan: Plan, *, stopped: bool) -> None:
    """Raises RefusedError when there is more to lose now than was consented to; `stopped`: the workers, by then."""
    if not plan.refused:
        return
    what = "; ".join(f"{o.resource} {f'holds {holding(o)}' if o.events else o.cause} now" for o in plan.refused)
    done = "the workers were stopped, nothing was deleted" if stopped else "nothing was changed"
    again = "; or let the workers go on: orchestrator apply -d" if stopped else ""
    raise RefusedError(plan.redact(f"{what}: it was overtaken; {done}"), hint=f"{destroy_again(plan)}{again}")


def destroy_again(plan: Plan) -> str:
    """What to add so that `plan`, of a destroy, is not refused for the losses that it names. No whole command: without
    the `-f` and `--set` that were typed it would be about another broker, perhaps."""
    names = (*plan.allow_loss, *(o.needs for o in plan.refused if o.needs))
    return plan.redact(" ".join(["type the same with --yes", *(f"--allow-loss={name}" for name in names)]))


async def running_agents(topology: Topology) -> dict[str, Agent] | None:
    """What the supervisor of this topology runs; None when there is none."""
    before = await running_topology(topology)
    return dict(before.agents) if before is not None else None


async def running_topology(topology: Topology) -> Topology | None:
    """The revision that the supervisor runs; None when there is none."""
    return await ControlClient(topology.state_dir).topology() if running(topology.state_dir) else None


async def detach(topology: Topology, listener: Listener) -> None:
    """Starts a supervisor in the background; returns when its workers are ready.

    Raises SupervisorError when they do not become ready. The supervisor then goes on with what does run, until
    `stop`.
    """
    pid = await detached.start(topology)
    deadline = time.monotonic() + DETACH_TIMEOUT
    while waiting := await _waiting(topology):
        if time.monotonic() > deadline:
            raise SupervisorError(
                f"not ready after {DETACH_TIMEOUT:.0f} s: {'; '.join(waiting)}",
                hint="orchestrator logs shows what they wait for; orchestrator stop ends it all",
            )
        await asyncio.sleep(0.05)
    listener.say(f"the workers are ready; the supervisor is process {pid}")


async def _waiting(topology: Topology) -> list[str]:
    """The agents that are not ready, each with its state. Raises SupervisorError when one will not be."""
    status = await ControlClient(topology.state_dir).status()
    for agent in status["agents"]:
        if agent["state"] in ("failed", "crash-loop"):
            name = agent["name"]
            raise SupervisorError(
                f"agent {name} does not start: {agent['reason']}",
                hint=f"mend it and apply again; orchestrator logs {name} has more, orchestrator stop ends it all",
            )
    return [
        f"{agent['name']} is {agent['state']}" + (f" ({agent['reason']})" if agent["reason"] else "")
        for agent in status["agents"]
        if agent["state"] not in ("running", "paused", "stopped")
    ]
