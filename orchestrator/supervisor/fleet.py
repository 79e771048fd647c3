"""All workers of one topology: asks rollout what to do, does it, and takes an edit back that does not start.

Walk "an edit": `update` sets the target; `_adjust` is run after every change until rollout has nothing more to say.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrator.errors import SupervisorError
from orchestrator.supervisor import locks, process, room
from orchestrator.supervisor.logs import LogSink
from orchestrator.supervisor.nursery import Nursery
from orchestrator.supervisor.process import State
from orchestrator.supervisor.rehearsal import Rehearsal
from orchestrator.supervisor.rollout import Running, Step, Wanted, steps
from orchestrator.supervisor.slot import Counts, Post, Slot
from orchestrator.supervisor.target import Target

#: Seconds between looks at the clock while all is calm, and while something is on its way.
_CALM, _BUSY = 1.0, 0.05

#: Attempts to take over one left-behind journal before it is left for the next supervisor.
_RECOVERIES = 3

Progress = Callable[[Mapping[str, Any]], None]


class Fleet:
    """The public half is the supervisor's; the rest is heard from slots (Audience) and from the nursery (Parent)."""

    def __init__(self, run_dir: Path, output: LogSink, *, entry: str) -> None:
        self.slots: dict[tuple[str, int], Slot] = {}
        self.target: Target | None = None
        self.past: dict[str, Counts] = {}  # of slots that are gone, by agent
        self.restarts: dict[str, int] = {}
        self._run_dir = run_dir
        self._output = output
        self._nursery = Nursery(self, entry)
        self._left: dict[tuple[str, int], int] = {}  # journals without an owner, and how often they were tried
        self._progress: Progress | None = None
        self._wanted: dict[str, Wanted] = {}
        self._wake = asyncio.Event()
        self._moved = asyncio.Condition()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._rehearsals: set[Rehearsal] = set()
        self._stopping = False
        self._failed = asyncio.Event()
        self._failure: BaseException | None = None

    # --- what the supervisor asks ------------------------------------------------------------------------------

    async def start(self, target: Target) -> None:
        """Starts everything; returns when the workers are on their way. Raises OrchestratorError when the warm
        parent cannot use the topology."""
        room.check(_starts([], target.wanted()))
        self._left = dict.fromkeys(locks.left_behind(self._run_dir), 0)
        await self._nursery.start()
        await self._nursery.prepare(target.key, target.topology)
        self._aim(target)
        self._keep(self._watch())

    async def update(
        self, change: Callable[[Target], Target], *, deadline: float, progress: Progress | None = None
    ) -> None:
        """Replaces what `change` makes of the target; returns when that is ready and the old has ended. One at a time:
        `change` is asked when those before it have ended. Raises SupervisorError, and leaves the old running, when the
        new does not start within `deadline` seconds, or there is no room for it."""
        async with self._lock:
            assert self.target is not None, "update() comes after start()"
            previous = self.target
            target = change(previous)
            old = previous.wanted()
            new = target.wanted()
            room.check(_starts(self._running(), new))
            await self._nursery.prepare(target.key, target.topology)
            gate = frozenset(name for name, want in new.items() if old.get(name) != want)
            touched = gate | (old.keys() - new.keys())
            self._progress = progress
            try:
                await self._rehearse(target, [name for name in gate if not new[name].overlap], deadline)
                self._aim(target, gate)
                await self._converge(touched, deadline)
            except SupervisorError:
                self._aim(replace(previous, paused={**self.target.paused, **previous.paused}))  # some paused meanwhile
                raise
            finally:
                self._progress = None
                if not self._stopping:
                    self._wanted = self.target.wanted()
                self._nursery.keep({slot.post.key for slot in self.slots.values()} | {self.target.key})

    async def stop(self) -> None:
        """Drains every worker within its own drain_timeout, then ends the warm parent."""
        self._stopping = True
        self._wanted = {}
        for slot in list(self.slots.values()):
            slot.feed(process.Leave("the supervisor stops"))
        self._forget_ended()
        async with self._moved:
            await self._moved.wait_for(lambda: not self.slots)
        await self.close()

    def kill(self) -> None:
        """Ends every worker at once; stop() returns soon after."""
        for slot in self.slots.values():
            slot.kill()

    async def close(self) -> None:
        """Ends the warm parent and lets go of everything."""
        for task in self._tasks:
            task.cancel()
        await self._nursery.stop()
        for slot in self.slots.values():
            slot.close()

    async def broken(self) -> None:
        """Raises when something inside failed that must not: the supervisor gives up then."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    def pause(self, agent: str, reason: str) -> None:
        """No worker of `agent` fetches until resume()."""
        assert self.target is not None
        if agent in self.target.paused:
            return
        self.target = replace(self.target, paused={**self.target.paused, agent: reason})
        self._apply_pauses()
        self.said("warning", agent, f"paused: {reason}")

    def resume(self, agent: str) -> None:
        assert self.target is not None
        paused = {name: why for name, why in self.target.paused.items() if name != agent}
        self.target = replace(self.target, paused=paused)
        self._apply_pauses()
        self.said("info", agent, "resumed")

    def of(self, agent: str) -> list[Slot]:
        """The slots of `agent`, in order."""
        return sorted((s for (name, _), s in self.slots.items() if name == agent), key=lambda s: s.post.number)

    @property
    def warm_pid(self) -> int | None:
        return self._nursery.pid

    # --- towards the target --------------------------------------------------------------------------------------

    def _aim(self, target: Target, gate: Collection[str] = ()) -> None:
        if self._stopping:
            return
        self.target = target
        self._wanted = target.wanted(gate)
        agents = target.agents()
        for slot in self.slots.values():
            if (agent := agents.get(slot.post.agent)) is not None:
                slot.limits = process.Limits.of(agent)
        self._apply_pauses()
        self._adjust()

    def _apply_pauses(self) -> None:
        paused = self.target.paused if self.target is not None else {}
        for slot in self.slots.values():
            if slot.paused != (slot.post.agent in paused):
                slot.set_paused(slot.post.agent in paused)

    def _adjust(self) -> None:
        for step in steps(self._running(), self._wanted, self._recoverable()):
            self._carry_out(step)
        self._forget_ended()
        self._wake.set()

    def _carry_out(self, step: Step) -> None:
        place = (step.agent, step.slot)
        if step.kind == "drain":
            self.slots[place].feed(process.Leave(step.cause))
            return
        assert self.target is not None
        if step.kind == "recover":
            self._left[place] += 1
        post = Post(
            topology=self.target.topology,
            key=self.target.key,
            agent=step.agent,
            number=step.slot,
            digest=self._wanted[step.agent].digest,
            run_dir=self._run_dir,
        )
        paused = step.agent in self.target.paused
        recovering = step.kind == "recover"
        slot = Slot(post, self._nursery, audience=self, recovering=recovering, paused=paused)
        self.slots[place] = slot
        slot.feed(process.Tick())

    def _running(self) -> list[Running]:
        return [
            Running(
                agent,
                number,
                slot.post.digest,
                ready=slot.life.state is State.READY,
                leaving=slot.life.state in (State.DRAINING, State.ENDED) or slot.life.recovering,
                orphan=slot.orphan,
            )
            for (agent, number), slot in self.slots.items()
        ]

    def _recoverable(self) -> list[tuple[str, int]]:
        return [place for place, tries in self._left.items() if tries < _RECOVERIES]

    def _forget_ended(self) -> None:
        for place, slot in list(self.slots.items()):
            if slot.life.state is not State.ENDED or slot.alive:
                continue
            del self.slots[place]
            self.past.setdefault(slot.post.agent, Counts()).add(slot.past)
            self.restarts[slot.post.agent] = self.restarts.get(slot.post.agent, 0) + slot.life.restarts
            if locks.leaves_something(self._run_dir, *place):
                self._left.setdefault(place, 0)
            else:
                self._left.pop(place, None)
            slot.close()

    async def _rehearse(self, target: Target, agents: Collection[str], deadline: float) -> None:
        """Agents whose old workers go first: their new code must load, and their brokers answer, before they do."""
        for name in agents:
            rehearsal = Rehearsal(target.agents()[name], self._nursery, self.log)
            self._rehearsals.add(rehearsal)
            try:
                await rehearsal.run(target.key, target.topology, self._run_dir, deadline)
            finally:
                self._rehearsals.discard(rehearsal)

    async def _converge(self, touched: Collection[str], deadline: float) -> None:
        """Returns when exactly what is wanted of `touched` runs."""
        end = time.monotonic() + deadline
        async with self._moved:
            while not self._settled(touched):
                if self._stopping:
                    raise SupervisorError("the supervisor is stopping", hint="wait until it has ended")
                if (why := self._hopeless(touched)) is not None:
                    raise why
                if self._starting(touched) and time.monotonic() > end:
                    waiting = ", ".join(sorted(self._starting(touched)))
                    raise SupervisorError(
                        f"{waiting}: not ready after {deadline:.0f} s; what ran before goes on",
                        hint="orchestrator logs shows what it waits for",
                    )
                await self._moved.wait()

    def _settled(self, touched: Collection[str]) -> bool:
        running = [
            each
            for each in self._running()
            if each.agent in touched and not self.slots[each.agent, each.slot].life.recovering
        ]
        ready = all(each.ready and each.digest == self._digest(each.agent) for each in running)
        have = Counter(each.agent for each in running)
        enough = all(have[name] == want.replicas for name, want in self._wanted.items() if name in touched)
        return ready and enough

    def _digest(self, agent: str) -> str | None:
        want = self._wanted.get(agent)
        return want.digest if want is not None else None

    def _starting(self, touched: Collection[str]) -> set[str]:
        """The new slots that are not ready, by name."""
        names = {slot.post.name for slot in self._new(touched) if slot.life.state is not State.READY}
        present = {agent for agent, _ in self.slots}
        short = {name for name in touched if name in self._wanted and name not in present}
        return names | short

    def _new(self, touched: Collection[str]) -> list[Slot]:
        return [
            slot
            for slot in self.slots.values()
            if slot.post.agent in touched
            and slot.post.digest == self._digest(slot.post.agent)
            and not slot.life.recovering
            and slot.life.state is not State.DRAINING
        ]

    def _hopeless(self, touched: Collection[str]) -> SupervisorError | None:
        for slot in self._new(touched):
            if (error := slot.load_error) is not None:
                text = f"{slot.post.agent} does not start: {error['message']}; what ran before goes on"
                trace = str(error.get("traceback") or "").rstrip()
                return SupervisorError(f"{text}\n{trace}".rstrip(), hint=error.get("hint") or "mend it and apply again")
            if slot.life.ends >= 2 and slot.life.state is not State.READY:
                text = f"{slot.post.agent} does not stay up: {slot.life.reason}; what ran before goes on"
                return SupervisorError(text, hint=f"orchestrator logs {slot.post.agent}")
        return None

    # --- what happens --------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Looks at the clock for every slot; looks again at once after a change."""
        last = time.monotonic()
        while True:
            calm = all(slot.life.state is State.READY for slot in self.slots.values())
            self._wake.clear()
            try:
                async with asyncio.timeout(_CALM if calm and self._progress is None else _BUSY):
                    await self._wake.wait()
            except TimeoutError:
                pass
            now = time.monotonic()
            event: process.Event = process.Late() if now - last > _CALM + 4.0 else process.Tick()
            last = now
            for slot in list(self.slots.values()):
                slot.feed(event)
            self._adjust_if_aimed()
            async with self._moved:
                self._moved.notify_all()

    def _adjust_if_aimed(self) -> None:
        if self._wanted:
            self._adjust()
            self._wake.clear()
        else:
            self._forget_ended()

    def exited(self, number: int, code: int | None, signal_number: int | None) -> None:
        for slot in self.slots.values():
            slot.exited(number, code, signal_number)
        for rehearsal in self._rehearsals:
            rehearsal.exited(number, code, signal_number)

    def lost(self) -> None:
        self.said("warning", "", "the warm parent died; its workers are replaced by those of a new one")
        for slot in self.slots.values():
            slot.abandon()
        for rehearsal in self._rehearsals:
            rehearsal.abandon()
        self._keep(self._nursery.restart())
        self._wake.set()

    def changed(self, slot: Slot) -> None:
        state, reason = slot.life.state, slot.life.reason
        bad = state in process.WAITING or slot.life.killed
        if state is not State.BACKING_OFF or reason:
            text = f"{slot.post.name} is {state}" + (f": {reason}" if reason else "")
            self.said("warning" if bad else "info", slot.post.agent, text)
        if self._progress is not None:
            self._progress({"agent": slot.post.agent, "slot": slot.post.number, "state": state, "reason": reason})
        self._wake.set()

    def said(self, level: str, agent: str, text: str) -> None:
        self._output.say(level, agent, text)

    def log(self, agent: str, slot: int, line: bytes) -> None:
        self._output.line(agent, slot, line)

    def spawned(self, number: int, pid: int) -> None:
        for slot in self.slots.values():
            slot.spawned(number, pid)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs `work` beside us; should it fail, the whole fleet is broken."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._kept)

    def _kept(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._failed.set()


def _starts(running: Sequence[Running], wanted: Mapping[str, Wanted]) -> int:
    """How many workers are started at once."""
    return sum(step.kind == "start" for step in steps(running, wanted))
