"""What a correct file means: every key of the contract, its defaults, and how several files become one."""

from __future__ import annotations

import shlex
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.topology import TopologyError, dump, load, restore
from orchestrator.topology.model import (
    Auth,
    Handler,
    Mode,
    OnExhausted,
    Overflow,
    Publication,
    Restart,
    Retention,
    RetryPolicy,
    Subscription,
    Tls,
)
from tests.topology.say import CHANNELS, HEAD, REAL, ROOT, errors, loaded, only, topology, write

CONTRACT = Path(__file__).parent / "contract.yaml"


def test_the_contract() -> None:
    found = load([CONTRACT])
    here = found.topology
    assert found.warnings == []
    assert (here.name, here.description, here.root) == ("content-pipeline", "research and write", CONTRACT.parent)
    broker = here.brokers["main"]
    assert (broker.url, broker.kind, broker.prefix) == ("nats://localhost:4222", "nats", "content.")
    assert broker.auth == Auth("plain", username="agents", password="password")
    assert broker.tls == Tls(*(str(CONTRACT.parent / f) for f in ("ca.pem", "client.pem", "client.key")))
    assert broker.cluster_id == "prod-1"

    tasks = here.channels["tasks"]
    assert (tasks.address, tasks.mode, tasks.events) == ("TASK_EVENTS", Mode.QUEUE, ("task.*",))
    assert tasks.retention == Retention(86400.0, 1_000_000, 1 << 30)
    assert (tasks.overflow, tasks.partitions, tasks.key, tasks.key_required) == (
        Overflow.REJECT,
        6,
        "correlation_id",
        True,
    )
    assert (tasks.dedup_window, tasks.protect, tasks.codec) == (120.0, True, "agent-event")
    assert tasks.schemas == {"task.assigned": {"type": "object", "required": ["query"]}}
    events = here.channels["events"]
    assert (events.address, events.overflow) == ("content-content-pipeline-events", Overflow.DROP_OLDEST)
    assert not events.key_required
    assert here.channels["crawls"].overflow is Overflow.REJECT
    assert here.channels["orders"].external
    letters = here.channels["dead-letters"]
    assert (letters.events, letters.dead_letters, letters.mode) == ((), True, Mode.LOG)
    assert not events.dead_letters

    assert list(here.agents) == ["research", "crawler-eu", "crawler-us", "writing", "reviewers"]
    research = here.agents["research"]
    assert research.handler == Handler("python", "agents:research")
    assert research.subscriptions == (
        Subscription("research", "tasks", "main", "content-research", ("task.assigned",)),
        Subscription("research", "orders", "main", "content-research", ("order.created",), start="latest"),
    )
    assert research.publish == (Publication("agent.started", "events"), Publication("agent.completed", "events"))
    assert (research.replicas, research.concurrency, research.timeout, research.drain_timeout) == (2, 4, 3600.0, 30.0)
    assert research.retry == RetryPolicy(delays=(10.0, 60.0, 600.0), give_up_on=("ValueError", "pkg.Error"))
    assert (research.on_exhausted, research.dead_letter) == (OnExhausted.DEAD_LETTER, "dead-letters")
    assert (research.propagate, research.config) == (("conversation_id",), {"depth": 3})
    assert research.env == {"TOPIC": "ai", "PORT": "8080"}
    assert research.restart == Restart(0.2, 30.0, 10.0)

    crawler = here.agents["crawler-us"]
    assert crawler.subscriptions[0].events == ("crawl.us",)
    assert crawler.subscriptions[0].group == "content-content-pipeline-crawler-us"
    assert (crawler.concurrency, crawler.timeout, crawler.retry) == (8, 300.0, RetryPolicy())
    (reading,) = here.agents["writing"].subscriptions
    assert reading.start == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert reading.filter == {"payload.verdict": ("reject", "unsure")}
    assert reading.include_targeted
    assert here.agents["writing"].publish[1] == Publication("order.created", "orders")
    assert here.agents["writing"].on_exhausted is OnExhausted.PAUSE
    assert here.agents["writing"].retry == RetryPolicy(max_attempts=1)
    outside = here.agents["reviewers"]
    assert outside.external
    assert outside.handler is None


def test_defaults_of_everything() -> None:
    here = topology(CHANNELS + "agents: {a: {handler: m:f, subscribe: [agent.x]}}")
    assert list(here.brokers) == ["default"]
    assert here.brokers["default"].embedded
    a = here.agents["a"]
    assert (a.replicas, a.concurrency, a.timeout, a.drain_timeout, a.retry) == (1, 8, 300.0, 30.0, RetryPolicy())
    channel = here.channels["tasks"]
    assert (channel.address, channel.replication, channel.partitions, channel.dedup_window) == (
        "shop-tasks",
        1,
        1,
        120.0,
    )
    assert a.subscriptions[0].group == "shop-a"


@pytest.mark.parametrize(
    ("url", "kind", "address", "group"),
    [
        ("nats://h:1,nats://i:2", "nats", "p-q-shop-c", "p-q-shop-a"),
        ("tls://h", "nats", "p-q-shop-c", "p-q-shop-a"),
        ("kafka://h:9092,i:9092", "kafka", "p.q.shop-c", "p.q.shop-a"),
        ("redis://h/0", "redis", "{p.q.shop}-c", "p.q.shop-a"),
        ("rediss://u:p@h:6380", "redis", "{p.q.shop}-c", "p.q.shop-a"),
        ("redis+sentinel://h:1,i:2/mymaster/0", "redis", "{p.q.shop}-c", "p.q.shop-a"),
        ("redis+cluster://[::1]:7000", "redis", "{p.q.shop}-c", "p.q.shop-a"),
        ("embedded", "nats", "p-q-shop-c", "p-q-shop-a"),
    ],
)
def test_addresses_by_broker(url: str, kind: str, address: str, group: str) -> None:
    here = topology(f"""
    brokers: {{b: {{url: "{url}", prefix: p.q.}}}}
    channels: {{c: {{events: [x.*]}}}}
    agents: {{a: {{handler: m:f, subscribe: [x.y], on_exhausted: drop}}}}
    """)
    assert here.brokers["b"].kind == kind
    assert here.channels["c"].address == address
    assert here.agents["a"].subscriptions[0].group == group


def test_a_wide_pattern_reads_from_every_channel_that_it_meets() -> None:
    here = topology(CHANNELS + "agents: {audit: {handler: m:f, subscribe: [agent.>, '*.done']}}")
    assert [(s.channel, s.events) for s in here.agents["audit"].subscriptions] == [
        ("events", ("agent.*",)),
        ("tasks", ("task.done",)),
    ]


def test_two_brokers_and_a_dead_letter_channel_on_the_other() -> None:
    here = topology("""
    brokers: {one: {url: nats://h}, two: {url: redis://h}}
    channels: {c: {broker: one, events: [x]}, d: {broker: two}}
    agents: {a: {handler: m:f, subscribe: [x], dead_letter: d}}
    """)
    assert here.channels["d"].dead_letters
    assert here.channels["d"].broker == "two"


def test_reading_dead_letters() -> None:
    here = topology(
        CHANNELS
        + "agents: {alarm: {handler: m:f, subscribe: [{channel: dead-letters}], on_exhausted: drop, dead_letter: null}}"
    )
    assert here.agents["alarm"].subscriptions[0].events == (">",)


# --- several files --------------------------------------------------------------------------------------------


def test_overrides_merge_maps_replace_lists_and_remove_by_null(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=HEAD + "channels: {c: {events: [a, b], retention: {max_age: 1d, max_events: 5}}, gone: {events: [g]}}",
        prod="channels: {c: {events: [z], retention: {max_age: 2d}}, gone: null, new: {events: [n]}}",
    )
    here = load([tmp_path / "base.yaml", tmp_path / "prod.yaml"]).topology
    assert list(here.channels) == ["c", "new"]
    assert here.channels["c"].events == ("z",)
    assert here.channels["c"].retention == Retention(172800.0, 5, None)
    assert here.files == (tmp_path / "base.yaml", tmp_path / "prod.yaml")
    mark = here.mark("channels", "c", "retention", "max_age")
    assert mark is not None
    assert mark.file.endswith("prod.yaml")


def test_standard_input_on_top_of_a_file(tmp_path: Path) -> None:
    write(tmp_path, base=HEAD + "channels: {c: {events: [a]}}")
    here = load([tmp_path / "base.yaml", "-"], stdin="channels: {c: {mode: queue}}").topology
    assert here.channels["c"].mode is Mode.QUEUE
    assert here.root == tmp_path


def test_includes_merge_and_the_including_file_wins(tmp_path: Path) -> None:
    write(
        tmp_path,
        t=HEAD
        + "variables: {d: {default: common}}\ninclude: ['{{ vars.d }}/*.yaml', one.yaml, one.yaml]\n"
        + "channels: {c: {mode: queue}}",
        one="apiVersion: orchestrator/v1\nchannels: {c: {events: [a]}}",
        common__two="channels: {d: {events: [b], schemas: {b: {$ref: b.json}}}}",
    )
    (tmp_path / "common" / "b.json").write_text('{"type": "object"}')
    here = load([tmp_path / "t.yaml"]).topology
    assert here.channels["c"].mode is Mode.QUEUE
    assert here.channels["c"].events == ("a",)
    assert here.channels["d"].schemas == {"b": {"type": "object"}}
    assert {p.name for p in here.files} == {"t.yaml", "one.yaml", "two.yaml", "b.json"}


def test_one_entry_in_two_included_files(tmp_path: Path) -> None:
    write(
        tmp_path,
        t=HEAD + "include: ['inc/*.yaml']",
        inc__a="channels: {c: {events: [a]}}\nagents: {}",
        inc__b="channels: {d: {events: [d]}, c: {events: [b]}}\nagents: {}",
    )
    with pytest.raises(TopologyError) as caught:
        load([tmp_path / "t.yaml"])
    (found,) = caught.value.diagnostics
    assert found.code == "include-conflict"
    assert "a.yaml" in found.message
    assert "b.yaml" in found.message
    assert found.mark is not None
    assert (found.mark.line, found.mark.column) == (1, 30)
    assert {p.name for p in caught.value.files} == {"t.yaml", "a.yaml", "b.yaml"}


def test_a_glob_does_not_include_its_own_file(tmp_path: Path) -> None:
    write(tmp_path, t=HEAD + "include: ['*.yaml']", other="channels: {c: {events: [a]}}")
    assert list(load([tmp_path / "t.yaml"]).topology.channels) == ["c"]


# --- inputs ---------------------------------------------------------------------------------------------------

INPUTS = """
variables: {n: {default: 2}, name: {description: who}}
agents: {a: {external: true, config: {n: "{{ vars.n }}", text: "{{ vars.n }}s", name: "{{ vars.name }}"}}}
"""


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("7", 7),
        ("012", 12),
        ("on", "on"),
        ("true", True),
        ("'7'", "7"),
        ("[a, 1]", ["a", 1]),
        ("", None),
        ("null", None),
    ],
)
def test_sets_are_typed_by_yaml_rules(said: str, value: object) -> None:
    config = topology(INPUTS, sets={"name": "x", "n": said}).agents["a"].config
    assert config["n"] == value
    assert type(config["n"]) is type(value)


def test_sets_go_over_files_and_files_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, t=HEAD + INPUTS, one="n: 3\nname: one", two="name: two\nother: 1")
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    found = load([tmp_path / "t.yaml"], vars_files=files)
    assert found.topology.agents["a"].config == {"n": 3, "text": "3s", "name": "two"}
    assert [w.code for w in found.warnings] == ["unknown-variable"]
    found = load([tmp_path / "t.yaml"], vars_files=files, sets={"name": "set"})
    assert found.topology.agents["a"].config["name"] == "set"
    assert set(found.topology.files) == {tmp_path / "t.yaml", *files}


def test_an_unset_variable_is_an_error_at_its_use() -> None:
    found = only(INPUTS)
    assert found.code == "unset-variable"
    assert "(who)" in found.message
    assert found.mark is not None
    assert found.mark.line == 7
    assert "--set name=" in str(found.suggestion)


def test_a_set_that_nobody_declares() -> None:
    found = only(INPUTS, sets={"nam": "x", "name": "y"})
    assert (found.code, found.suggestion) == ("unknown-variable", "did you mean `name`?")


def test_environment_and_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "example")
    monkeypatch.setenv("KEY", "s3cret")
    (tmp_path / "password").write_text("from-file\n")
    text = """
    variables: {key: {default: "{{ secret('env:KEY') }}"}}
    brokers:
      b:
        url: "nats://{{ env('HOST') }}:{{ env('NO_PORT', 4222) }}"
        auth: {mechanism: plain, username: u, password: literal-pw}
    agents:
      a:
        external: true
        config: {k: "{{ vars.key }}", up: "{{ vars.key | upper }}", file: "{{ secret('file:password') }}", n: [1]}
    """
    write(tmp_path, t=HEAD + textwrap.dedent(text))
    found = load([tmp_path / "t.yaml"])
    here = found.topology
    assert here.brokers["b"].url == "nats://example:4222"
    assert here.agents["a"].config == {"k": "s3cret", "up": "S3CRET", "file": "from-file", "n": [1]}
    assert set(here.secrets) == {"s3cret", "S3CRET", "from-file", "literal-pw"}
    assert tmp_path / "password" in here.files
    shown = found.show()
    assert not any(secret in shown for secret in here.secrets)
    assert shown.count("***") == 4


def test_for_each_is_a_product() -> None:
    here = topology("""
    agents:
      "{{ a }}-{{ b }}":
        for_each: {a: [x, y], b: "{{ [1, 2] }}"}
        external: true
        config: {b: "{{ b }}", raw: "{% raw %}{{ b }}{% endraw %}"}
    """)
    assert list(here.agents) == ["x-1", "x-2", "y-1", "y-2"]
    assert here.agents["y-2"].config == {"b": 2, "raw": "{{ b }}"}
    mark = here.mark("agents", "y-2", "config")
    assert mark is not None
    assert mark.line == 10


def test_for_each_without_a_name_of_its_own() -> None:
    found = only("agents: {a: {for_each: {r: [1, 2]}, external: true}}")
    assert found.code == "duplicate-key"
    assert found.suggestion == "a-{{ r }}"


# --- what goes out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*REAL, CONTRACT], ids=lambda p: p.parent.name)
def test_what_is_shown_means_the_same_when_loaded_again(path: Path) -> None:
    found = load([path])
    again = load(["-"], stdin=found.show().replace("'***'", "password"))
    assert again.topology.channels == found.topology.channels
    assert again.topology.agents == found.topology.agents
    assert again.show() == found.show()


def test_show_keeps_words_that_look_like_numbers() -> None:
    config = "{a: '0o14', b: '1e5', c: 'on', d: '012', e: '1:30', f: '.5', h: 'null', i: '~', "
    config += "j: '{% raw %}{{ x }}{% endraw %}'}"
    found = loaded(f"agents: {{a: {{external: true, config: {config}}}}}")
    again = load(["-"], stdin=found.show())
    assert again.topology.agents["a"].config == found.topology.agents["a"].config


@pytest.mark.parametrize("path", [*REAL, CONTRACT], ids=lambda p: p.parent.name)
def test_dump_and_restore(path: Path) -> None:
    here = load([path]).topology
    again = restore(dump(here))
    assert again.revision() == here.revision()
    assert (again.root, again.files, again.secrets, again.marks) == (here.root, here.files, here.secrets, {})
    assert again.channels == here.channels
    assert again.agents == here.agents
    assert again.brokers == here.brokers


def test_inherited_settings_have_the_mark_of_defaults() -> None:
    here = topology(CHANNELS + "agents: {a: {handler: m:f, subscribe: [agent.x]}}")
    mark = here.mark("agents", "a", "dead_letter")
    assert mark is not None
    assert mark.line == 11
    subscribe = here.mark("agents", "a", "subscribe", "0")
    assert subscribe is not None
    assert subscribe.column == 28


def test_a_second_agent_on_one_type_of_a_log_is_welcome() -> None:
    text = CHANNELS + "agents: {a: {handler: m:f, subscribe: [agent.x]}, b: {handler: m:f, subscribe: [agent.*]}}"
    assert len(topology(text).agents) == 2
    both = "agents: {a: {handler: m:f, subscribe: [task.x]}, b: {handler: m:f, subscribe: [task.*]}}"
    assert {e.code for e in errors(CHANNELS + both)} == {"queue-readers"}


@pytest.mark.parametrize("path", [p for p in REAL if p.parent.parent.name == "topologies"], ids=lambda p: p.parent.name)
def test_patterns_load_as_their_readme_says(path: Path) -> None:
    lines = [line for line in (path.parent / "README.md").read_text().splitlines() if "orchestrator validate" in line]
    assert lines
    for line in lines:
        words = shlex.split(line)
        assert words[2] == str(path.relative_to(ROOT))
        sets = dict(word.split("=", 1) for word in words[4::2])
        here = load([path], sets=sets).topology
        assert here.revision() == load([path], sets=sets).topology.revision()
        assert not sets or here.revision() != load([path]).topology.revision()
