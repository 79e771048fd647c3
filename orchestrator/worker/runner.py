"""Runs the handlers of events that have started; one that never waits costs no task of its own.

A task for each event costs more than all else that is done with a short one. So a task takes one event after the other
until a handler waits; from there on it is that handler's alone, and others take the rest. While handlers do wait each
event gets a task at once. A handler cannot tell: it has a task that nobody shares while it waits, and a context of its
own, as a task would give it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from typing import Any

#: Is given the task that it runs in.
Run = Callable[["asyncio.Task[None]"], Coroutine[Any, Any, None]]


class Runner:
    """Belongs to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Of nobody's handler: one may start because another has just ended, in the middle of that one's step.
        self._context = copy_context()
        self._ready: deque[Run] = deque()
        self._takers: set[asyncio.Task[None]] = set()  # tasks that have no handler of their own yet
        self._waits = False  # the last handler did

    def start(self, run: Run) -> None:
        """Runs `run` at the loop's next turn."""
        self._ready.append(run)
        if self._waits or not self._takers:
            self._add_taker()

    def _add_taker(self) -> None:
        # Named, as asyncio would make up a name for each.
        self._takers.add(asyncio.Task(self._take(), loop=self._loop, name="handler", context=self._context.copy()))

    async def _take(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        ready = self._ready
        try:
            while ready and not task.cancelling():  # whoever has cancelled himself does not cancel the next
                context = self._context.copy()
                coroutine = ready.popleft()(task)
                try:
                    awaited = context.run(coroutine.send, None)
                except StopIteration:
                    self._waits = False
                    continue
                self._waits = True
                self._leave(task)
                await _Rest(context, coroutine, awaited)
                return
        finally:
            self._leave(task)

    def _leave(self, task: asyncio.Task[None]) -> None:
        """`task` takes no more: others do."""
        self._takers.discard(task)
        wanted = len(self._ready) if self._waits else min(1, len(self._ready))
        for _ in range(wanted - len(self._takers)):
            self._add_taker()


class _Rest:
    """What is left of a coroutine after its first step."""

    __slots__ = ("_awaited", "_context", "_coroutine")

    def __init__(self, context: Context, coroutine: Coroutine[Any, Any, None], awaited: Any) -> None:
        self._context, self._coroutine, self._awaited = context, coroutine, awaited

    def __await__(self) -> Generator[Any, Any, None]:
        run, coroutine, awaited = self._context.run, self._coroutine, self._awaited
        step: Callable[[Any], Any]
        while True:
            try:
                what = yield awaited
            except GeneratorExit:
                run(coroutine.close)
                raise
            except BaseException as error:
                step, what = coroutine.throw, error
            else:
                step = coroutine.send
            try:
                awaited = run(step, what)
            except StopIteration:
                return
