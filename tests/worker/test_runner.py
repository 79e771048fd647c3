"""Handlers that never wait share a task; nobody may notice."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import pytest

from orchestrator.worker.runner import Run, Runner
from tests.patience import PATIENCE

WHOSE: ContextVar[str] = ContextVar("WHOSE", default="nobody's")

Tasks = dict[str, "asyncio.Task[None]"]


@pytest.fixture
async def runner() -> Runner:
    return Runner(asyncio.get_running_loop())


def handler(name: str, tasks: Tasks, body: Callable[[], Awaitable[None]] | None = None) -> Run:
    async def run(task: asyncio.Task[None]) -> None:
        assert task is asyncio.current_task()
        tasks[name] = task
        if body is not None:
            await body()

    return run


async def ended(tasks: Tasks, count: int) -> None:
    async with asyncio.timeout(PATIENCE):
        while len(tasks) < count:
            await asyncio.sleep(0)
        await asyncio.gather(*tasks.values(), return_exceptions=True)


async def test_those_that_do_not_wait_share_a_task(runner: Runner) -> None:
    tasks: Tasks = {}
    for name in "abc":
        runner.start(handler(name, tasks))
    await ended(tasks, 3)
    assert len(set(tasks.values())) == 1


async def test_each_that_waits_has_a_task_of_its_own(runner: Runner) -> None:
    tasks: Tasks = {}
    gate = asyncio.Event()

    async def wait() -> None:
        await gate.wait()

    for name in "abcd":
        runner.start(handler(name, tasks, wait if name in "bc" else None))
    async with asyncio.timeout(PATIENCE):
        while len(tasks) < 4:
            await asyncio.sleep(0)
    assert tasks["b"] is not tasks["c"]
    assert tasks["d"] not in (tasks["b"], tasks["c"])
    gate.set()
    await ended(tasks, 4)


async def test_while_handlers_wait_all_of_them_begin_in_one_turn(runner: Runner) -> None:
    tasks: Tasks = {}

    async def wait() -> None:
        await asyncio.sleep(0)

    def burst(name: str) -> None:
        for number in range(50):
            runner.start(handler(f"{name}{number}", tasks, wait))

    burst("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the first one shows in its turn that they wait
    assert len(tasks) == 50
    await ended(tasks, 50)
    burst("b")
    await asyncio.sleep(0)
    assert len(tasks) == 100
    await ended(tasks, 100)


async def test_a_context_is_nobody_elses(runner: Runner) -> None:
    tasks: Tasks = {}
    seen: list[str] = []

    def look_and_set(name: str, *, wait: bool, start: str = "") -> Run:
        async def body() -> None:
            seen.append(WHOSE.get())
            WHOSE.set(name)
            if wait:
                await asyncio.sleep(0)
            if start:
                runner.start(look_and_set(start, wait=False))
            assert WHOSE.get() == name

        return handler(name, tasks, body)

    runner.start(look_and_set("a", wait=False, start="e"))
    runner.start(look_and_set("b", wait=True, start="f"))
    runner.start(look_and_set("c", wait=True))
    runner.start(look_and_set("d", wait=False))
    await ended(tasks, 6)
    assert seen == ["nobody's"] * 6
    assert WHOSE.get() == "nobody's"


async def test_a_loop_that_a_handler_turns_by_itself_can_run_the_others(runner: Runner) -> None:
    """As libraries do that wait inside plain functions: no context is entered twice."""
    tasks: Tasks = {}
    loop: Any = asyncio.get_running_loop()
    turned = 0

    async def turn() -> None:
        nonlocal turned
        await asyncio.sleep(0)
        for handle in loop._ready:
            handle._context.run(list)
            turned += 1

    for name in "abc":
        runner.start(handler(name, tasks, turn))
    await ended(tasks, 3)
    assert turned
    for task in tasks.values():
        task.result()


async def test_cancelling_one_that_waits_reaches_only_that_one(runner: Runner) -> None:
    tasks: Tasks = {}
    told: list[str] = []
    gate = asyncio.Event()

    def waiting(name: str) -> Run:
        async def body() -> None:
            try:
                await gate.wait()
            except asyncio.CancelledError:
                told.append(name)
                raise

        return handler(name, tasks, body)

    for name in "ab":
        runner.start(waiting(name))
    async with asyncio.timeout(PATIENCE):
        while len(tasks) < 2:
            await asyncio.sleep(0)
    tasks["a"].cancel()
    gate.set()
    await ended(tasks, 2)
    assert told == ["a"]


async def test_one_that_only_lets_the_others_run_is_cancelled_too(runner: Runner) -> None:
    tasks: Tasks = {}

    async def go_on() -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    runner.start(handler("a", tasks, go_on))
    await asyncio.sleep(0)
    tasks["a"].cancel()
    await ended(tasks, 1)
    assert tasks["a"].cancelled()


async def test_one_that_cancels_itself_does_not_cancel_the_next(runner: Runner) -> None:
    tasks: Tasks = {}
    told: list[str] = []

    async def cancel_oneself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()

    async def wait() -> None:
        await asyncio.sleep(0)
        told.append("waited")

    runner.start(handler("a", tasks, cancel_oneself))
    runner.start(handler("b", tasks, wait))
    await ended(tasks, 2)
    assert told == ["waited"]


async def test_timeouts_and_groups_work_from_the_first_step(runner: Runner) -> None:
    tasks: Tasks = {}
    told: list[str] = []

    async def too_long() -> None:
        try:
            async with asyncio.timeout(0.001):
                await asyncio.Event().wait()
        except TimeoutError:
            told.append("timeout")

    async def group() -> None:
        async with asyncio.TaskGroup() as both:
            for name in "xy":
                both.create_task(asyncio.sleep(0)).add_done_callback(lambda _, name=name: told.append(name))

    runner.start(handler("a", tasks, too_long))
    runner.start(handler("b", tasks, group))
    await ended(tasks, 2)
    assert sorted(told) == ["timeout", "x", "y"]


async def test_what_one_raises_does_not_keep_the_others_from_running(runner: Runner) -> None:
    tasks: Tasks = {}

    async def wait() -> None:
        await asyncio.sleep(0)

    async def fail() -> None:
        raise ValueError("a mistake of ours: attempts raise nothing")

    async def fail_later() -> None:
        await asyncio.sleep(0)
        await fail()

    for name, body in {"a": fail, "b": None, "c": fail_later, "d": wait}.items():
        runner.start(handler(name, tasks, body))
    await ended(tasks, 4)
    assert isinstance(tasks["a"].exception(), ValueError)
    assert isinstance(tasks["c"].exception(), ValueError)
    assert tasks["d"].exception() is None
