"""The topology and its code are edited, badly and well, by `dev` under load: nothing is lost, nothing runs twice."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.faults.rig import Site
from tests.servers.fresh import Server

Sites = Callable[..., Site]
TOTAL = 700


both = pytest.mark.parametrize("server", ["nats", "redis"], indirect=True)


@both
async def test_edits_of_every_kind_under_load(server: Server, site: Sites) -> None:
    made = site(server.url)
    file, code = made.folder / "topology.yaml", made.folder / "handlers.py"
    good, good_code = file.read_text(), code.read_text()
    await made.start("dev")
    await made.until(lambda: "watching" in made.said, "dev watches")
    over = asyncio.Event()
    published = 0

    async def publish() -> None:
        nonlocal published
        while not over.is_set():
            await made.publish(range(published, published + 20))
            published += 20
            await asyncio.sleep(0.02)

    publishing = asyncio.create_task(publish())

    async def refused(what: str, change: Callable[[], object]) -> None:
        before = made.said.count("what ran before goes on")
        taken_before = made.said.count("the edit is running")
        change()
        await made.until(lambda: made.said.count("what ran before goes on") > before, f"{what} is refused")
        handled = made.handled()
        await made.until(lambda: made.handled() > handled + 20, f"events flow after {what}")
        assert made.said.count("the edit is running") == taken_before

    async def taken(what: str, change: Callable[[], object]) -> None:
        before = made.said.count("the edit is running")
        change()
        await made.until(lambda: made.said.count("the edit is running") > before, f"{what} runs")

    await refused("invalid YAML", lambda: file.write_text(good + "agents: [\n"))
    await taken("the mended file", lambda: file.write_text(good))

    await refused("half a file", lambda: file.write_text(good[: len(good) // 2]))
    fresh = made.folder / "fresh"
    fresh.write_text(good.replace("concurrency: 8", "concurrency: 6"))
    await taken("a file renamed over it", lambda: os.replace(fresh, file))

    for name, concurrency in (("one", 5), ("two", 4)):
        (made.folder / name).write_text(good.replace("concurrency: 8", f"concurrency: {concurrency}"))

    def swap(name: str) -> None:
        link = made.folder / "link"
        link.symlink_to(name)
        os.replace(link, file)

    await taken("a symbolic link", lambda: swap("one"))
    await taken("a swapped symbolic link", lambda: swap("two"))

    await refused("code that does not import", lambda: code.write_text("import no_such_module\n"))
    await taken("code that does", lambda: code.write_text(good_code + "\n# mended\n"))

    over.set()
    await publishing
    await made.all_handled(published)
    assert set(made.runs().values()) == {1}
    assert set(made.outputs()) == set(range(published))
    assert made.letters() == []
    assert await made.stop() == 0


SECOND = """\
  second:
    handler: handlers:work
    subscribe: [task.second]
    dead_letter: dead-letters
    env: {{RECORD: "{record}"}}
"""


@both
async def test_agents_and_subscriptions_come_and_go_under_load(server: Server, site: Sites) -> None:
    """An agent beside the busy one is added, reads another type, is renamed and removed; the busy one is untouched."""
    made = site(server.url)
    file, good = made.folder / "topology.yaml", made.topology
    await made.start()
    pids = made.agent()["pids"]
    publishing = asyncio.create_task(made.publish(range(TOTAL), pause=0.01))
    second = SECOND.format(record=made.record)
    edits = [
        good + second,
        good + second.replace("task.second", "task.third"),
        good + second.replace("second:", "renamed:").replace("task.second", "task.third"),
        good,
    ]
    for text in edits:
        file.write_text(text)
        done = await asyncio.to_thread(made.run, "apply", "--yes", "--prune")
        assert done.returncode == 0, done.stderr
        assert made.agent()["pids"] == pids
    assert made.run("plan", "--exit-code").returncode == 0, "something of the old agents is left"
    await publishing
    await made.all_handled(TOTAL)
    assert set(made.runs().values()) == {1}
    assert made.letters() == []
    assert await made.stop() == 0


@both
async def test_an_agent_renamed_under_load_reads_on_with_its_group(server: Server, site: Sites) -> None:
    made = site(server.url)
    file = made.folder / "topology.yaml"
    await made.start()
    publishing = asyncio.create_task(made.publish(range(300), "slow", pause=0.01))
    await made.until(lambda: made.handled() > 30, "some handled")
    (group,) = {s.group for s in made.loaded.agents["worker"].subscriptions}
    file.write_text(made.topology.replace("  worker:\n", f"  renamed:\n    group: {group}\n"))
    done = await asyncio.to_thread(made.run, "apply", "--yes", "--prune")
    assert done.returncode == 0, done.stderr
    await publishing
    await made.all_handled(300)
    assert set(made.runs().values()) == {1}
    assert made.letters() == []
    assert await made.stop() == 0


@pytest.mark.parametrize("server", ["kafka"], indirect=True)
async def test_partitions_are_added_under_load(server: Server, site: Sites) -> None:
    """What is published before and after the edit, and while it is carried out, is handled once; fewer partitions are
    refused, and the workers go on untouched."""
    made = site(server.url)
    file, good = made.folder / "topology.yaml", made.topology
    await made.start()
    publishing = asyncio.create_task(made.publish(range(TOTAL), pause=0.01))
    await made.until(lambda: made.handled() > 30, "some handled")
    file.write_text(good.replace("mode: queue}", "mode: queue, partitions: 3}"))
    done = await asyncio.to_thread(made.run, "apply", "--yes")
    assert done.returncode == 0, done.stderr
    await publishing
    await made.publish(range(TOTAL, TOTAL + 100))
    await made.all_handled(TOTAL + 100)
    assert set(made.runs().values()) == {1}
    assert made.letters() == []
    pids = made.agent()["pids"]
    file.write_text(good.replace("mode: queue}", "mode: queue, partitions: 2}"))
    refused = await asyncio.to_thread(made.run, "apply", "--yes")
    assert refused.returncode == 1
    assert "partitions" in refused.stderr
    await made.publish(range(TOTAL + 100, TOTAL + 120))
    await made.all_handled(TOTAL + 120)
    assert made.agent()["pids"] == pids
    assert await made.stop() == 0


@both
async def test_an_agent_renamed_with_events_waiting_is_told_how_to_keep_them(server: Server, site: Sites) -> None:
    made = site(server.url)
    assert made.run("apply", "--yes", "--no-workers").returncode == 0
    await made.publish(range(9))
    (made.folder / "topology.yaml").write_text(made.topology.replace("  worker:\n", "  renamed:\n"))
    done = made.run("apply", "--yes", "--no-workers", "--prune")
    assert done.returncode == 1
    (group,) = {s.group for s in made.loaded.agents["worker"].subscriptions}
    assert f"`group: {group}`" in done.stderr
