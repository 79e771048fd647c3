"""Real worker processes on a real broker: crashes are counted and blamed on nobody else, wherever they happen.

Judged by the handlers' own record (a file), by the dead letters and by the outputs that are stored.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from orchestrator import Client
from orchestrator.errors import BrokerUnavailable
from orchestrator.event import AgentEvent
from tests.patience import PATIENCE

from .crew import Crew
from .rig import Lab, Outgoing, Rig, elapse, eventually


@pytest.fixture(autouse=True)
def _needs_processes(rig: Rig) -> None:
    if not rig.driver.processes:
        pytest.skip("one process: tests/test_testing.py crashes agents on this broker")


def event(lab: Lab, number: int, do: str = "", **more: Any) -> Outgoing:
    payload = {"number": number, "do": do}
    body = AgentEvent(event_id=f"{lab.topology.name}-e{number}", event_type="task.assigned", payload=payload, **more)
    return lab.message(body=body.to_bytes(), event_id=body.event_id)


async def dead(lab: Lab) -> Counter[int]:
    """How often each number was dead-lettered."""
    return Counter(json.loads(letter.body)["payload"]["number"] for letter in await lab.letters())


async def outputs(lab: Lab, event_type: str = "agent.done") -> Counter[int]:
    found = await lab.stored("events")
    bodies = [json.loads(one.body) for one in found]
    return Counter(body["payload"]["number"] for body in bodies if body["event_type"] == event_type)


async def at_rest(lab: Lab) -> bool:
    try:
        lag = await lab.lag()
    except BrokerUnavailable:  # it has been killed, and is coming back
        return False
    return bool(lag.waiting == lag.in_flight == lag.delayed == 0)


async def begun(lab: Lab, crew: Crew) -> bool:
    return bool(crew.runs()) or bool(await lab.letters())


async def done(lab: Lab, crew: Crew, *, within: float | None = None) -> None:
    """All that was sent is settled. Before the first of it was looked at a busy NATS may say that nothing waits."""
    await eventually(lambda: begun(lab, crew), within=within, what=lambda: f"a beginning; ends {crew.ends}")
    await eventually(
        lambda: at_rest(lab), within=within, what=lambda: f"everything settled; ends {crew.ends}, {crew.said[-5:]}"
    )


async def test_a_handler_that_kills_its_process_dies_alone(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, "exit" if n == 7 else "slow") for n in range(20)])
        async with Crew(lab) as crew:
            await done(lab, crew)
            assert await dead(lab) == Counter({7: 1})
            assert crew.runs()[7] == 3
            assert crew.finished() == set(range(20)) - {7}
            (letter,) = await lab.letters()
            assert (letter.headers["dlq-attempts"], letter.headers["dlq-reason"]) == ("3", "crashed")


async def test_two_such_handlers_do_not_blame_each_other(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, "exit" if n in (3, 4) else "slow") for n in range(12)])
        async with Crew(lab) as crew:
            await done(lab, crew)
            assert await dead(lab) == Counter({3: 1, 4: 1})
            assert crew.finished() == set(range(12)) - {3, 4}


async def test_what_waits_behind_a_killer_is_not_blamed(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.send(event(lab, 0, "exit"), *[event(lab, n) for n in range(1, 10)])
        async with Crew(lab, concurrency=1) as crew:
            await done(lab, crew)
            assert await dead(lab) == Counter({0: 1})
            assert crew.runs() == Counter({0: 3, **dict.fromkeys(range(1, 10), 1)})


async def test_an_event_that_always_fails_is_dead_after_its_attempts(rig: Rig) -> None:
    async with rig.lab() as lab:
        bad = event(lab, 1, "fail")
        await lab.send(event(lab, 0), bad, event(lab, 2))
        async with Crew(lab) as crew:
            await done(lab, crew)
            assert crew.runs() == Counter({0: 1, 1: 3, 2: 1})
            (letter,) = await lab.letters()
            assert letter.body == bad.body
            assert (letter.headers["dlq-attempts"], letter.headers["dlq-error-type"]) == ("3", "ValueError")


POINTS = [
    "before the handler",
    "after the handler",
    "before settling",
    "while settling 0",
    "while settling 1",
    "while settling 3",
]


@pytest.mark.parametrize("point", POINTS)
async def test_a_worker_killed_at_any_point_loses_nothing(rig: Rig, point: str) -> None:
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n) for n in range(12)])
        async with Crew(lab, die=point) as crew:
            await done(lab, crew)
            assert 1 in crew.ends, "it was not killed"
            assert crew.finished() == set(range(12))
            assert set(await outputs(lab)) == set(await outputs(lab, "agent.second")) == set(range(12))
            assert await dead(lab) == Counter()


@pytest.mark.parametrize("do", ["die in handler", "die between publishes", "die after publishes"])
async def test_a_worker_killed_inside_the_handler_loses_nothing(rig: Rig, do: str) -> None:
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, do if n == 5 else "") for n in range(12)])
        async with Crew(lab) as crew:
            await done(lab, crew)
            assert crew.ends == [1], "it was not killed once"
            assert crew.finished() == set(range(12))
            # The rerun published the same, under the same ids: nothing is doubled within the window.
            if rig.capabilities.publish_dedup:
                assert await outputs(lab) == Counter(range(12))
            assert await dead(lab) == Counter()


@pytest.mark.parametrize("point", ["before settling", "while settling 0", "while settling 1", "while settling 3"])
async def test_a_worker_killed_around_a_dead_letter_writes_it_once(rig: Rig, point: str) -> None:
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, "fail") for n in range(4)])
        async with Crew(lab, die=point) as crew:
            await done(lab, crew)
            await eventually(lambda: 1 in crew.ends, what="its death")
            assert await dead(lab) == Counter(range(4))


@pytest.mark.parametrize("point", ["while retrying 0", "while retrying 1", "while retrying 3"])
async def test_a_worker_killed_around_a_retry_still_ends_it(rig: Rig, point: str) -> None:
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, "fail") for n in range(4)])
        async with Crew(lab, die=point) as crew:
            await done(lab, crew)
            await eventually(lambda: 1 in crew.ends, what="its death")
            assert await dead(lab) == Counter(range(4))
            assert set(crew.runs().values()) <= {3, 4}  # a run whose end was never stored may be repeated


async def test_workers_killed_at_random_lose_and_blame_nothing(rig: Rig) -> None:
    count = 300
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, "slow" if n % 3 == 0 else "") for n in range(count)])
        async with Crew(lab, replicas=2) as crew:
            for share in range(1, 6):
                await eventually(
                    lambda share=share: len(crew.finished()) >= share * count // 8,
                    what=lambda: f"progress; {len(crew.finished())} are done",
                )
                crew.kill()
            await done(lab, crew, within=2 * PATIENCE)
            assert crew.finished() == set(range(count))
            assert set(await outputs(lab)) == set(range(count))
            assert await dead(lab) == Counter()


async def test_the_broker_killed_in_the_flow_loses_nothing(rig: Rig) -> None:
    count = 200
    async with rig.lab() as lab:
        await lab.send(*[event(lab, n, "slow" if n % 3 == 0 else "") for n in range(count)])
        async with Crew(lab, replicas=2) as crew:
            await eventually(lambda: len(crew.finished()) > count // 4, what="progress")
            await rig.restart_server()
            await eventually(lambda: crew.finished() == set(range(count)), within=2 * PATIENCE, what="all handled")
            await done(lab, crew, within=2 * PATIENCE)
            assert set(await outputs(lab)) == set(range(count))
            assert await dead(lab) == Counter()


async def test_what_cannot_be_decoded_is_dead_at_once_and_once(rig: Rig) -> None:
    body = b"\x00\xff no event"
    async with rig.lab() as lab:
        await rig.driver.outside_publish(lab.topology, lab.channel("tasks"), "task.assigned", body, {})
        await lab.send(event(lab, 1))
        async with Crew(lab) as crew:
            await done(lab, crew)
            (letter,) = await lab.letters()
            assert letter.body == body
            assert (letter.headers["dlq-reason"], letter.headers["dlq-attempts"]) == ("undecodable", "1")
            assert crew.runs() == Counter({1: 1})


async def test_a_dead_letter_that_would_be_too_large_is_cut(rig: Rig) -> None:
    if rig.driver.too_large is None:
        pytest.skip("this broker takes bodies of any size that a test can send")
    body = b"\x00" * (rig.driver.too_large - 200)
    async with rig.lab() as lab:
        await rig.driver.outside_publish(lab.topology, lab.channel("tasks"), "task.assigned", body, {})
        async with Crew(lab) as crew:
            await done(lab, crew)
            (letter,) = await lab.letters()
            assert letter.headers["dlq-truncated"] == str(len(body))
            assert body.startswith(letter.body)
            assert len(letter.headers["dlq-sha256"]) == 64


async def test_a_misrouted_event_is_dead_at_once(rig: Rig) -> None:
    async with rig.lab() as lab:
        await lab.send(event(lab, 1, target_agent="somebody-else"))
        async with Crew(lab) as crew:
            await done(lab, crew)
            (letter,) = await lab.letters()
            assert letter.headers["dlq-reason"] == "misrouted"
            assert crew.runs() == Counter()


async def test_a_reader_of_a_log_gets_what_is_meant_for_it_alone(rig: Rig) -> None:
    async with rig.lab(auditor={"filter": {"payload.do": ("", "wanted")}}) as lab:
        cases = [
            (0, "", None),  # for everybody
            (1, "", "auditor"),
            (2, "", "watcher"),  # for another
            (3, "unwanted", None),  # filtered
            (4, "wanted", None),
        ]
        for number, do, target in cases:
            payload = {"number": number, "do": do}
            sent = AgentEvent(event_type="agent.note", target_agent=target, source_agent="x", payload=payload)
            await lab.send(lab.message("agent.note", channel="events", body=sent.to_bytes(), event_id=sent.event_id))
        async with Crew(lab, "auditor") as crew:
            await eventually(lambda: crew.finished() == {0, 1, 4}, what=lambda: f"0, 1 and 4; {crew.finished()}")
            await elapse(0.5)
            assert crew.runs() == Counter([0, 1, 4])


async def test_a_request_is_answered_by_a_worker(rig: Rig) -> None:
    async with rig.lab() as lab, Crew(lab) as crew, Client(lab.topology) as client:
        reply = await client.request("task.assigned", {"number": 4, "do": "answer"}, timeout=PATIENCE)
        assert reply.payload == {"number": 4}
        answers = await asyncio.gather(
            *(client.request("task.assigned", {"number": n, "do": "answer"}, timeout=PATIENCE) for n in range(20))
        )
        assert [answer.payload["number"] for answer in answers] == list(range(20))
        assert await dead(lab) == Counter()
        assert crew.ends == []
