"""Patterns against the definition of what they take (model.matches); the index against comparing all pairs."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.topology.model import matches
from orchestrator.topology.routing import Index, concrete, covers, intersection, minimal

TOKEN = st.sampled_from(["a", "b", "c"])
TYPE = st.lists(TOKEN, min_size=1, max_size=4).map(".".join)
PATTERN = st.builds(
    lambda tokens, rest: ".".join([*tokens, *rest]),
    st.lists(TOKEN | st.just("*"), min_size=1, max_size=3),
    st.sampled_from([[], [">"]]),
) | st.just(">")


@settings(max_examples=500)
@given(PATTERN, PATTERN, TYPE)
def test_an_intersection_takes_what_both_take(one: str, other: str, event_type: str) -> None:
    both = intersection(one, other)
    assert (matches(one, event_type) and matches(other, event_type)) == (both is not None and matches(both, event_type))


@given(PATTERN, PATTERN)
def test_an_intersection_is_never_empty(one: str, other: str) -> None:
    both = intersection(one, other)
    if both is not None:
        sample = both.replace("*", "a").replace(">", "a")
        assert matches(one, sample)
        assert matches(other, sample)


@given(PATTERN, PATTERN, TYPE)
def test_covering(wide: str, narrow: str, event_type: str) -> None:
    if covers(wide, narrow) and matches(narrow, event_type):
        assert matches(wide, event_type)


@settings(max_examples=300)
@given(st.lists(PATTERN, max_size=8), PATTERN)
def test_the_index_finds_what_comparing_all_pairs_finds(patterns: list[str], wanted: str) -> None:
    index: Index[int] = Index()
    for number, pattern in enumerate(patterns):
        index.add(pattern, number)
    expected = [(p, n) for n, p in enumerate(patterns) if intersection(p, wanted) is not None]
    assert sorted(index.overlapping(wanted)) == sorted(expected)


@given(st.lists(PATTERN, min_size=1, max_size=6), TYPE)
def test_minimal_takes_the_same(patterns: list[str], event_type: str) -> None:
    some = minimal(patterns)
    assert any(matches(p, event_type) for p in some) == any(matches(p, event_type) for p in patterns)
    assert not any(covers(a, b) for a in some for b in some if a != b)


def test_by_hand() -> None:
    assert intersection("agent.>", "agent.*") == "agent.*"
    assert intersection("agent.>", "agent") is None
    assert intersection("*.done", "task.*") == "task.done"
    assert concrete("task.done")
    assert not concrete("task.*")
    assert minimal(["task.*", "task.done", "task.*"]) == ("task.*",)
