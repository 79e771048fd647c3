"""Events flow while workers and broker are killed; then every event is counted (chaos.py)."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.chaos import Chaos, Outcome
from tests.patience import PATIENCE
from tests.servers.fresh import Server


async def chaos(server: Server, folder: Path, *, events: int, worker_kills: int, broker_kills: int) -> Outcome:
    seed = random.SystemRandom().randrange(1_000_000)
    folder.mkdir()
    made = Chaos(server, folder, events=events, worker_kills=worker_kills, broker_kills=broker_kills, seed=seed)
    outcome = await made.run()
    print(f"seed {seed}: {outcome}")
    assert outcome.good, f"seed {seed}: {outcome}"
    assert not outcome.too_many_runs, f"seed {seed}: {outcome}"
    return outcome


#: Seconds. Kafka's takes longer at times: its client has to be given up when it forgets a timeout
#: (brokers/kafka/moving.py).
BACK = {"nats": PATIENCE / 2, "redis": PATIENCE / 2, "kafka": PATIENCE}


@pytest.mark.parametrize(("server", "back"), BACK.items(), indirect=["server"])
async def test_nothing_is_lost_while_workers_and_broker_are_killed(server: Server, back: float, tmp_path: Path) -> None:
    outcome = await chaos(server, tmp_path / "run", events=1_000, worker_kills=4, broker_kills=2)
    assert outcome.worker_kills == 4
    assert max(outcome.back_after_s) < back


@pytest.mark.soak
async def test_nothing_is_lost_in_a_long_run(server: Server, tmp_path: Path) -> None:
    await chaos(server, tmp_path / "run", events=20_000, worker_kills=20, broker_kills=3)
