"""Golden errors: each file in mistakes/ and, beside it, all that is said about it. Each line was read.

After a wanted change: `python -m tests.topology.test_mistakes` writes the texts anew; read the diff.
"""

# ruff: noqa: E501  (a mistake and its message on one line)

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.topology import TopologyError, load, render
from orchestrator.topology.near import near_type
from tests.topology.say import CHANNELS, HEAD, errors, loaded, only

FOLDER = Path(__file__).parent / "mistakes"
FILES = sorted(FOLDER.glob("*.yaml"))


def said(path: Path) -> str:
    with pytest.raises(TopologyError) as caught:
        load(["-"], stdin=path.read_text())
    return render(caught.value.diagnostics).replace("<stdin>", path.name) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_all_mistakes_at_once(path: Path) -> None:
    assert said(path) == path.with_suffix(".txt").read_text()


def test_twelve_mistakes_of_shape_and_meaning_are_all_named() -> None:
    with pytest.raises(TopologyError) as caught:
        load([FOLDER / "twelve.yaml"])
    lines = [d.mark.line for d in caught.value.diagnostics if d.mark]
    assert lines == sorted(lines)
    assert lines == [3, 7, 12, 13, 16, 23, 24, 25, 27, 28, 29, 30, 32, 35]
    assert str(caught.value).endswith("(and 13 more)")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # A name that was dropped for its own error causes no second one.
        (CHANNELS + "retry_policies: {p: 5}\nagents: {a: {handler: m:f, subscribe: [agent.x], retry: p}}", "`p` is the number 5"),
        ("channels: {c: 5, d: {}}\nagents: {a: {handler: m:f, subscribe: [x.y], dead_letter: c}}", "`c` is the number 5"),
        ("channels: {c: {events: [x..y]}}\nagents: {a: {external: true, publish: [x.y]}}", '`events.0` is "x..y"'),
        ("channels: {c: {events: 5}}\nagents: {a: {external: true, publish: [x.y]}}", "`events` is the number 5"),
        ("channels: {c: {broker: nobody, events: [x]}}\nagents: {a: {external: true, subscribe: [x]}}", "no broker `nobody`"),
        ("brokers: {b: {url: 5}}\nchannels: {c: {broker: b, events: [x]}}", "`url` is the number 5"),
        ("brokers: {b: 5}\nchannels: {c: {broker: b, events: [x]}}", "`b` is the number 5"),
        ("brokers: 5\nchannels: {c: {broker: b, events: [x]}, d: {events: [y]}}", "`brokers` is the number 5"),
        (CHANNELS + "agents: {a: {handler: 5, subscribe: [agent.x]}}", "`handler` is the number 5"),
        (CHANNELS + "agents: {a: {handler: '{{ x }}', subscribe: [agent.x]}}", "'x' is undefined"),
        ("channels: {c: {events: [x]}}\nagents: {a: {handler: m:f, subscribe: [x], dead_letter: 5}}", "`dead_letter` is the number 5"),
        ("channels: {c: {events: [x]}}\ndefaults: {agents: {dead_letter: nobody}}\n"
         "agents: {a: {handler: m:f, subscribe: [x]}, b: {handler: m:f, subscribe: [x]}}", "no channel `nobody`"),
        ("channels: {c: {events: [a], schemas: {a: {$ref: '#/nowhere'}}}}", "$ref #/nowhere leads nowhere"),
        ("channels: {c: {events: [a], schemas: {a: {properties: {x: {$ref: '#/$defs/y'}}, $defs: {y: 5}}}}}", "$ref #/$defs/y leads nowhere"),
        ("brokers: {b: {url: redis://h/main}}", "/main is no number of a database"),
        ("brokers: {b: {url: redis+cluster://h/0/1}}", "/0/1 is no number of a database"),
        ("brokers: {b: {url: 'redis+sentinel://h:1,i:2'}}", "belongs the master's name"),
        ("brokers: {b: {url: 'redis+sentinel://h/main/x'}}", "belongs the master's name"),
        ("channels: {c: {mode: log, mode: queue, events: [x]}}", "`mode` stands here twice"),
        ("variables: {v: 5}\nagents: {a: {external: true, config: {v: '{{ vars.v }}'}}}", "the variable `v` is the number 5"),
        ("variables: {v: {default: '{{ 1/0 }}'}}\nagents: {a: {external: true, config: {v: '{{ vars.v }}', w: '{{ vars.v }}'}}}", "ZeroDivisionError"),
    ],
)  # fmt: skip
def test_a_mistake_has_no_follow_up(text: str, wanted: str) -> None:
    assert wanted in only(text).message


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("retry_policies: {p: {max_atempts: 3}}", "did you mean `max_attempts`?"),
        ("retry_policies: {p: {retries: 3}}", "did you mean `max_attempts`?"),
        ("channls: {}", "did you mean `channels`?"),
        ("channels: {c: {mode: Queue}}", "did you mean `queue`?"),
        ("channels: {c: {topic: x}}", "did you mean `address`?"),
        ("channels: {c: {dedup_window: 5}}", "write a unit: `5s`"),
        ("channels: {c: {events: a.b}}", "write a list: [a.b]"),
        ("metadata: {name: 12}", None),
        ("agents: {a: {external: true, description: 12}}", 'write it in quotes: "12"'),
        ("agents: {a: {external: true, config: {v: '{{ vras.x }}'}}}", "did you mean `vars`?"),
        ("variables: {topic: {default: 1}}\nagents: {a: {external: true, config: {v: '{{ topic }}'}}}", "did you mean `vars.topic`?"),
        (CHANNELS + "agents: {a: {external: true, publish: [agent.x, agnt.x]}}", "did you mean `agent.x`?"),
        ("channels: {c: {events: [agent.done]}}\nagents: {a: {external: true, publish: [agent.don]}}", "did you mean `agent.done`?"),
        ("channels: {c: {external: true, events: [o.x]}}\nagents: {a: {external: true, publish: [o.x]}}",
         "name the external channel: {events: [o.x], channel: c}"),
    ],
)  # fmt: skip
def test_what_to_write_instead(text: str, suggestion: str | None) -> None:
    head = HEAD if "metadata" not in text else HEAD.replace("metadata: {name: shop}\n", "")
    assert only(text, head=head).suggestion == suggestion


def test_a_duration_that_nothing_could_wait_for() -> None:
    assert only("retry_policies: {p: {max_delay: 999999999d}}").expected == "at most 36500d"


def test_references_within_a_schema_are_followed() -> None:
    schema = {
        "$ref": "#/$defs/one~1two/anyOf/0",
        "$defs": {"one/two": {"anyOf": [{"$ref": "#here"}, True]}, "here": {"$anchor": "here", "type": "object"}},
    }
    loaded(f"channels: {{c: {{events: [a], schemas: {{a: {json.dumps(schema)}}}}}}}")


def test_the_caret_stands_below_its_character() -> None:
    found = only("channels: {c: {events: [größe], mode: quue}}")
    place, source, caret, *_ = render([found]).splitlines()
    assert source[caret.index("^") :].startswith("quue")
    assert place.startswith("<stdin>:5:39: error: ")


def test_the_caret_stands_below_its_character_behind_wide_ones() -> None:
    found = only("channels: {c: {events: [研究😀], mode: quue}}")
    _, source, caret, *_ = render([found]).splitlines()
    wide = 2 * len("研究😀")
    assert caret.index("^") == source.index("quue") - len("研究😀") + wide


def test_colour_only_when_asked_for() -> None:
    found = errors("x: 1")
    assert "\x1b[" not in render(found)
    assert "\x1b[31m" in render(found, color=True)


@pytest.mark.parametrize(
    ("said", "patterns", "meant"),
    [
        ("tsk.assigned", ["task.*"], "task.assigned"),
        ("tasks.a.b", ["task.>", "news.*"], "task.a.b"),
        ("order.eu.plcd", ["order.*.placed"], "order.eu.placed"),
        ("Task.assigned", ["task.*"], "task.assigned"),
        ("taskassigned", ["task.assigned"], "task.assigned"),
        ("weather.assigned", ["task.*"], None),
        ("weather.a.b", ["task.*"], None),
        ("tsk.assigned", [*(f"other{n}.*" for n in range(2000)), "task.*"], "task.assigned"),
    ],
)
def test_a_misspelt_type_is_compared_with_what_a_pattern_would_take(
    said: str, patterns: list[str], meant: str | None
) -> None:
    assert near_type(said, patterns) == (meant and f"did you mean `{meant}`?")


if __name__ == "__main__":
    for file in FILES:
        file.with_suffix(".txt").write_text(said(file))
