"""The planner's rules, as the text that a person reads. Golden files: UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.brokers.base import Allowed, Desired, Observed, ResourceId, Setting, Verdict
from orchestrator.reconcile.plan import Action, BrokerInfo, Plan, stale_reasons
from orchestrator.reconcile.planner import Consent, plan, plan_destroy
from orchestrator.reconcile.render import markdown, text
from orchestrator.topology.model import Agent, Broker, Channel, Handler, Mark, Mode, Topology

GOLDEN = Path(__file__).parent / "golden"


def topology(**agents: Agent) -> Topology:
    return Topology(
        name="press",
        description="",
        root=Path("/nowhere"),
        files=(Path("/nowhere/topology.yaml"),),
        brokers={"main": Broker("main", "embedded", "nats")},
        channels={"tasks": Channel("tasks", "main", "TASKS", Mode.QUEUE, ("task.*",))},
        agents=agents,
        marks={
            ("channels", "tasks"): Mark("topology.yaml", 8, 3),
            ("channels", "tasks", "retention"): Mark("topology.yaml", 11, 5),
            ("channels", "orders"): Mark("topology.yaml", 14, 3),
            ("agents", "writer"): Mark("topology.yaml", 20, 3),
            ("agents", "editor"): Mark("topology.yaml", 28, 3),
        },
        secrets=("hunter2",),
    )


def agent(name: str, **changes: object) -> Agent:
    made = Agent(name, "", Handler("python", f"agents:{name}"), (), ())
    return replace(made, **changes)  # type: ignore[arg-type]


def channel(name: str = "TASKS", *, external: bool = False, protect: bool = False, **settings: Setting) -> Desired:
    return Desired(
        ResourceId("main", "channel", name),
        settings,
        where=("channels", "orders" if external else "tasks"),
        origins={"max_age": ("channels", "tasks", "retention")},
        external=external,
        protect=protect,
    )


def subscription(name: str = "TASKS/press-writer", **settings: Setting) -> Desired:
    return Desired(ResourceId("main", "subscription", name), settings, where=("agents", "writer", "subscribe"))


def there(want: Desired, *, owner: str | None = "press", events: int = 0, **changes: Setting) -> Observed:
    return Observed(
        want.id,
        {**want.settings, **changes},
        owner,
        version="7",
        events=events,
        bytes=events * 512,
        protect=want.protect,
    )


def judge(kind: str, setting: str, old: Setting, new: Setting, observed: Observed) -> Verdict:
    """A broker that shortens with loss, replaces for `storage`, and never changes `durability`."""
    if setting == "storage":
        return Verdict(Allowed.REPLACE, why="the server keeps a stream's storage for good")
    if setting == "durability":
        return Verdict(Allowed.NEVER, why="it is the cluster's")
    if setting == "max_age" and isinstance(old, int) and isinstance(new, int) and new < old:
        return Verdict(loses=f"events older than {new} s")
    return Verdict()


def made(desired: list[Desired], observed: list[Observed], *allow: str, prune: bool = False) -> Plan:
    result = plan(topology(), desired, observed, judge, consent=Consent(prune, frozenset(allow)))
    return replace(result, brokers=(BrokerInfo("main", "nats", "embedded"),))


def golden(name: str, result: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(result, encoding="utf-8")
    assert result == path.read_text(encoding="utf-8")


CASES: Mapping[str, Plan] = {
    "create": made([channel(max_age=60, subjects=("task.*",)), subscription(ack_wait=30)], []),
    "create-many": made(
        [
            channel(subjects=("task.*",), max_age=0, max_msgs=-1, replicas=3, **{f"setting_{n}": n for n in range(9)}),
            Desired(ResourceId("main", "internal", "press-state"), {"storage": "file"}, where=("brokers", "main")),
            subscription(ack_wait=30, max_deliver=-1),
        ],
        [],
    ),
    "renamed": made(
        [channel(), subscription("TASKS/press-author")],
        [there(channel()), there(subscription())],
    ),
    "renamed-waiting": made(
        [channel(), subscription("TASKS/press-author")], [there(channel(), events=3), there(subscription(), events=3)]
    ),
    "renamed-beside": made(
        [channel(), subscription("TASKS/press-author", events=("task.new",))],
        [there(channel(), events=3), there(subscription(events=("task.old", "task.older")), events=3)],
    ),
    "renamed-lost": made(
        [channel(), subscription("TASKS/press-author")],
        [there(channel(), events=3), there(subscription(), events=3)],
        "TASKS/press-writer",
        prune=True,
    ),
    "nothing": made([channel(max_age=60)], [there(channel(max_age=60), events=4)]),
    "change-in-place": made([channel(max_age=90)], [there(channel(max_age=60), events=4)]),
    "shrink-refused": made([channel(max_age=30)], [there(channel(max_age=60), events=1204)]),
    "shrink-allowed": made([channel(max_age=30)], [there(channel(max_age=60), events=1204)], "TASKS"),
    "shrink-empty": made([channel(max_age=30)], [there(channel(max_age=60))]),
    "shrink-protected": made(
        [channel(max_age=30, protect=True)], [there(channel(max_age=60, protect=True), events=1)], "TASKS"
    ),
    "replace-refused": made([channel(storage="memory")], [there(channel(storage="file"), events=3)]),
    "replace-allowed": made(
        [channel(storage="memory"), subscription()],
        [there(channel(storage="file"), events=3), there(subscription())],
        "main:TASKS",
    ),
    "never": made([channel(durability="high")], [there(channel(durability="low"))], "TASKS"),
    "not-ours": made(
        [channel(), subscription()], [there(channel(), owner=None, events=2), there(subscription(), owner="blog")]
    ),
    "taken": made(
        [channel(), channel("MORE")],
        [
            replace(there(channel("THEIRS"), owner="blog"), blocks=(channel().id,)),
            replace(there(channel("OLD"), events=2), blocks=(channel("MORE").id,)),
        ],
    ),
    "external-missing": made([channel("orders.v1", external=True)], []),
    "orphans": made(
        [],
        [
            there(channel("OLD"), events=9),
            there(subscription("TASKS/press-idle")),
            there(subscription("TASKS/press-busy"), events=5),
            there(channel("SAFE", protect=True), events=2),
            there(channel("THEIRS"), owner="blog", events=2),
        ],
    ),
    "prune-refused": made([], [there(channel("OLD"), events=9), there(channel("EMPTY"))], prune=True),
    "prune-allowed": made(
        [],
        [
            there(channel("OLD"), events=9),
            there(subscription("OLD/press-gone"), events=9),
            there(channel("SAFE", protect=True), events=2),
        ],
        "OLD",
        prune=True,
    ),
    "unprotect": made([channel()], [there(channel(protect=True), events=2)]),
    "secret": made([channel(password="hunter2")], []),
}


@pytest.mark.parametrize("name", CASES)
def test_text(name: str) -> None:
    golden(f"{name}.txt", text(CASES[name]))


def test_markdown() -> None:
    golden("markdown.md", markdown(CASES["orphans"]) + markdown(CASES["shrink-refused"]))


def test_no_output_holds_a_secret() -> None:
    assert "hunter2" not in text(CASES["secret"]) + markdown(CASES["secret"]) + str(CASES["secret"].to_json())


@pytest.mark.parametrize("name", CASES)
def test_a_plan_survives_its_file(name: str, tmp_path: Path) -> None:
    CASES[name].save(tmp_path / "plan.json")
    back = Plan.read(tmp_path / "plan.json")
    assert text(back) == text(CASES[name])
    assert stale_reasons(back, CASES[name]) == [] or name == "secret"


def test_an_external_channel_is_never_changed() -> None:
    assert made([channel(external=True, max_age=1)], [there(channel(max_age=60), owner=None)]).empty


def test_workers_appear_only_while_a_supervisor_runs() -> None:
    now = topology(writer=agent("writer", replicas=2), editor=agent("editor"), same=agent("same"))
    assert plan(now, [], [], judge).workers == ()
    running = {"writer": agent("writer"), "gone": agent("gone"), "same": agent("same")}
    golden("workers.txt", text(plan(now, [], [], judge, running=running)))


def test_a_saved_plan_is_stale_once_the_broker_has_changed() -> None:
    saved = CASES["change-in-place"]
    again = made([channel(max_age=90)], [replace(there(channel(max_age=60), events=5), version="8")])
    assert stale_reasons(saved, again) == ["channel TASKS was changed on the broker since"]
    assert stale_reasons(saved, made([channel(max_age=90)], [])) == ["channel TASKS needs create instead of update"]
    more = made([channel(max_age=90)], [replace(there(channel(max_age=60), events=5))])
    assert stale_reasons(saved, more) == []  # events that came in meanwhile change nothing


def test_destroy_takes_only_what_is_ours() -> None:
    ours = there(channel(), events=3)
    readers = there(subscription(), events=2)
    other = there(channel("THEIRS"), owner="blog", events=3)
    refused = plan_destroy(topology(), [ours, readers, other])
    assert [o.resource.name for o in refused.refused] == ["TASKS"]
    golden("destroy.txt", text(refused))
    allowed = plan_destroy(topology(), [ours, readers, other], consent=Consent(allow_loss=frozenset({"TASKS"})))
    assert [(o.action, o.resource.name) for o in allowed.operations] == [
        (Action.DELETE, "TASKS/press-writer"),
        (Action.DELETE, "TASKS"),
    ]


def test_a_name_that_allows_nothing_is_said() -> None:
    assert made([], [], "TYPO").unknown == (("TYPO", "leave it out"),)
    assert made([channel()], [], "TASK", "TASKS").unknown == (("TASK", "did you mean `TASKS`?"),)
    assert made([], [there(channel())], "main:TASKS", "zzz").unknown == (("zzz", "there are TASKS"),)
