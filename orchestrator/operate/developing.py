"""The walk "an edit" as `dev` runs it: watch, load, reconcile, hand over. A wrong edit leaves the last good running."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from orchestrator.brokers.embedded import serving
from orchestrator.errors import LockedError, OrchestratorError
from orchestrator.operate.applying import Listener, edit, reconcile
from orchestrator.reconcile.planner import Consent
from orchestrator.supervisor.control import running
from orchestrator.supervisor.logs import foreground
from orchestrator.supervisor.supervisor import Supervisor
from orchestrator.supervisor.watcher import Change, Watcher
from orchestrator.topology import TopologyError
from orchestrator.topology.model import Topology

Complain = Callable[[OrchestratorError], None]


async def develop(load: Callable[[], Topology], consent: Consent, listener: Listener, *, complain: Complain) -> int:
    """Applies, then follows edits until the supervisor is stopped; returns its exit code.

    Raises what the first load or apply raises; later errors go to `complain`. Raises LockedError when a supervisor
    runs this topology already.
    """
    topology = load()
    if running(topology.state_dir):
        raise LockedError(
            f"a supervisor already runs the topology {topology.name!r}",
            hint="orchestrator stop ends it; orchestrator apply hands it an edit",
        )
    async with serving(topology):
        await reconcile(topology, consent, listener)
        supervisor = Supervisor(topology, output=foreground(topology.state_dir))
        watcher = Watcher(topology.root, topology.files)
        following = asyncio.create_task(_follow(supervisor, watcher, topology, load, consent, listener, complain))
        try:
            return await supervisor.run()
        finally:
            watcher.stop()
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def _follow(
    supervisor: Supervisor,
    watcher: Watcher,
    topology: Topology,
    load: Callable[[], Topology],
    consent: Consent,
    listener: Listener,
    complain: Complain,
) -> None:
    await supervisor.started()
    files = topology.files[0].name if len(topology.files) == 1 else f"{len(topology.files)} topology files"
    listener.say(f"watching {files} and the handlers' code; Ctrl-C stops")
    async for change in watcher.changes():
        try:
            topology = await _edit(supervisor, watcher, topology, change, load, consent, listener)
        except OrchestratorError as error:
            if isinstance(error, TopologyError) and error.files:
                watcher.watch(topology.root, error.files)
            complain(error)
            listener.say("what ran before goes on")


async def _edit(
    supervisor: Supervisor,
    watcher: Watcher,
    topology: Topology,
    change: Change,
    load: Callable[[], Topology],
    consent: Consent,
    listener: Listener,
) -> Topology:
    """Takes over one change; returns what runs now. Raises OrchestratorError and changes nothing that runs."""
    listener.say(f"{', '.join(_name(topology, path) for path in change.files)} changed")
    fresh = topology
    if change.kind == "topology":
        fresh = load()
        if fresh.name != topology.name:
            raise OrchestratorError(
                f"metadata.name changed from {topology.name!r} to {fresh.name!r}: that is another topology",
                hint="stop dev, then start it again to run the new one",
            )
        watcher.watch(fresh.root, fresh.files)
        await edit(fresh, consent, listener, partial(supervisor.update, fresh))  # its steps are in the log, shown here
    else:
        await supervisor.update(fresh)
    listener.say("the edit is running")
    return fresh


def _name(topology: Topology, path: object) -> str:
    return str(path).removeprefix(f"{topology.root}/")
