"""Virtual time for a running event loop: when nothing is left to do now, the clock jumps to the next timer.

Only waiting is skipped: code still takes the time that it takes, but the virtual clock does not see it, so nothing
depends on the machine's speed. While a thread of the executor works (a `def` handler), time passes at its real pace.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from orchestrator import clock
from orchestrator.errors import OrchestratorError


class VirtualTime:
    """A context manager inside a running selector loop. `start`: what clock.now() says at first, in Unix seconds."""

    def __init__(self, start: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._time = self._first = self._loop.time()
        self._start = start
        self._threads = 0
        self._selector: Any = getattr(self._loop, "_selector", None)
        if self._selector is None:
            raise OrchestratorError(
                f"virtual time needs asyncio's own event loop, not {type(self._loop).__module__}",
                hint="run these tests without uvloop",
            )
        self._executor_call: Callable[..., Any] = self._loop.run_in_executor
        self._driving = clock.driven_by(self.now)

    def __enter__(self) -> Self:
        # A loop asks time() for its timers and its selector for what is ready; there is no public way to give a
        # running loop others, and a test should not have to bring a loop of its own.
        vars(self._loop).update(time=self.time, _selector=self, run_in_executor=self._run_in_executor)
        self._driving.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._driving.__exit__(kind, error, trace)
        vars(self._loop)["_selector"] = self._selector
        for name in ("time", "run_in_executor"):
            del vars(self._loop)[name]

    def time(self) -> float:
        """The loop's clock: seconds, never back."""
        return self._time

    def now(self) -> float:
        """Unix seconds."""
        return self._start + self._time - self._first

    def select(self, timeout: float | None = None) -> Any:
        """What is ready now. When nothing is: jumps by `timeout` to the next timer, or waits for a thread."""
        if ready := self._selector.select(0):
            return ready
        if timeout is not None and timeout <= 0:
            return ready
        if self._threads or timeout is None:
            begin = time.monotonic()
            ready = self._selector.select(timeout)
            self._time += time.monotonic() - begin
            return ready
        self._time += timeout
        return ready

    def __getattr__(self, name: str) -> Any:
        """Everything else about a selector: registering, the map of what is registered, closing."""
        return getattr(self._selector, name)

    def _run_in_executor(self, executor: Any, call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:
        self._threads += 1
        future: asyncio.Future[Any] = self._executor_call(executor, call, *arguments)
        future.add_done_callback(self._thread_done)
        return future

    def _thread_done(self, future: asyncio.Future[Any]) -> None:
        self._threads -= 1
