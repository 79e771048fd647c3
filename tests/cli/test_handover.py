"""apply to a running supervisor: what its workers still read is deleted after they have ended, and stays deleted."""

from __future__ import annotations

from pathlib import Path

from tests.cli.rig import Folder, wait
from tests.servers.redis import RedisServer

TOPOLOGY = """\
apiVersion: orchestrator/v1
kind: Topology
metadata: {name: change}
channels:
  tasks: {events: [task.*], mode: queue}
  news: {events: [news.*], mode: log}
  dead: {mode: log}
defaults: {agents: {dead_letter: dead}}
agents:
"""
HANDLERS = """\
def handle(event, ctx):
    with open("ran.txt", "a") as file:
        file.write(f"{ctx.agent} {event.payload['n']}\\n")
"""


def agents(folder: Folder, **reads: str) -> None:
    lines = [
        f'  {name}: {{handler: "{at}:handle", subscribe: [{what}]}}'
        for name, spec in reads.items()
        for what, _, at in [spec.partition("@")]
    ]
    folder.write("topology.yaml", TOPOLOGY + "\n".join(lines) + "\n")


def ran(path: Path) -> list[str]:
    file = path / "ran.txt"
    return file.read_text().splitlines() if file.exists() else []


def test_agents_that_go_take_their_subscriptions_with_them_and_a_queue_changes_hands(folder: Folder) -> None:
    folder.write("agents.py", HANDLERS)
    agents(folder, old="task.run@agents", reader="news.*@agents")
    folder.ok("apply", "--yes", "-d")
    agents(folder, old="task.run@agents")
    folder.ok("apply", "--yes")
    assert folder.ok("plan", "-o", "json").json["operations"] == [], "the reader's subscription is gone for good"

    agents(folder, new="task.run@nowhere")
    assert "nowhere" in folder.refused("apply", "--yes")
    folder.ok("publish", "task.run", '{"n": 1}')
    wait(lambda: ran(folder.path) == ["old 1"], lambda: str(ran(folder.path)))

    agents(folder, new="task.run@agents")
    folder.ok("apply", "--yes")
    assert folder.ok("plan", "-o", "json").json["operations"] == []
    folder.ok("publish", "task.run", '{"n": 2}')
    wait(lambda: ran(folder.path) == ["old 1", "new 2"], lambda: str(ran(folder.path)))


def test_a_renamed_agent_reads_on_with_its_group_and_is_refused_without(folder: Folder) -> None:
    folder.write("agents.py", HANDLERS)
    agents(folder, old="task.run@agents")
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "task.run", '{"n": 1}')
    agents(folder, new="task.run@agents")
    assert folder.run("plan").code == 1
    assert "`group: change-old`" in folder.refused("apply", "--yes", "--no-workers")
    text = (folder.path / "topology.yaml").read_text()
    folder.write("topology.yaml", text.replace("new: {", "new: {group: change-old, "))
    folder.ok("apply", "--yes", "-d")
    wait(lambda: ran(folder.path) == ["new 1"], lambda: str(ran(folder.path)))


def test_without_workers_nothing_is_taken_from_under_those_that_run(folder: Folder) -> None:
    folder.write("agents.py", HANDLERS)
    agents(folder, old="task.run@agents", reader="news.*@agents")
    folder.ok("apply", "--yes", "-d")
    agents(folder, old="task.run@agents")
    folder.ok("apply", "--yes", "--no-workers")
    folder.ok("publish", "news.a", '{"n": 3}')
    wait(lambda: ran(folder.path) == ["reader 3"], lambda: str(ran(folder.path)))
    agents(folder, new="task.run@agents", reader="news.*@agents")
    assert "--no-workers" in folder.refused("apply", "--yes", "--no-workers")


def test_an_embedded_broker_that_comes_with_an_edit_outlives_the_command(
    folder: Folder, redis_server: RedisServer
) -> None:
    folder.write("agents.py", HANDLERS)
    near = f'brokers: {{main: {{url: "{redis_server.url}", prefix: comes.}}}}\n'
    both = near.replace("}}\n", "}, local: {url: embedded}}\n") + "defaults: {channels: {broker: main}}\n"
    head = "apiVersion: orchestrator/v1\nkind: Topology\nmetadata: {name: comes}\n"
    tail = "agents:\n  a: {handler: agents:handle, subscribe: [task.go], on_exhausted: drop}\n"
    tasks = "channels:\n  tasks: {events: [task.*], mode: queue}\n"
    folder.write("topology.yaml", head + near + tasks + tail)
    folder.ok("apply", "--yes", "-d")
    jobs = "  jobs: {events: [job.*], mode: queue, broker: local}\n"
    more = "  b: {handler: agents:handle, subscribe: [job.go], on_exhausted: drop}\n"
    folder.write("topology.yaml", head + both + tasks + jobs + tail + more)
    folder.ok("apply", "--yes")
    folder.ok("publish", "job.go", '{"n": 1}')
    wait(lambda: ran(folder.path) == ["b 1"], lambda: folder.run("status").out)
    assert folder.state() == "running"
