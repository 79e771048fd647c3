"""The bookkeeping of one partition, without a broker: finished in whatever order, a successor reads the same."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.brokers.base import History
from orchestrator.brokers.kafka.ledger import Ledger, backlog


@dataclass
class Delivered:
    handed: bool


def ledger(committed: int = 0, metadata: str = "", owner: str = "a") -> Ledger[Delivered]:
    return Ledger("tasks", 0, committed, metadata, owner=owner)


def handed(count: int) -> Ledger[Delivered]:
    """One that has handed out `count` records."""
    one = ledger()
    for offset in range(count):
        assert one.see(offset)
        one.hand(offset, Delivered(True))
    return one


@given(st.integers(1, 300), st.data())
def test_a_successor_sees_exactly_what_was_not_finished(count: int, data: st.DataObject) -> None:
    done = data.draw(st.sets(st.integers(0, count - 1)))
    first = handed(count)
    for offset in done:
        first.finish(offset)
    low, metadata = first.snapshot()
    second = ledger(low, metadata)
    assert [o for o in range(low, count + 5) if second.see(o)] == [
        o for o in range(count + 5) if o not in done or o >= count
    ]


@given(st.integers(1, 200), st.data())
def test_what_a_successor_has_not_seen_yet_survives_its_own_commit(count: int, data: st.DataObject) -> None:
    done = data.draw(st.sets(st.integers(0, count - 1)))
    first = handed(count)
    for offset in done:
        first.finish(offset)
    low, metadata = first.snapshot()
    second = ledger(low, metadata)
    ready = [offset for offset in range(low, data.draw(st.integers(low, count))) if second.see(offset)]
    for offset in ready[: data.draw(st.integers(0, len(ready)))]:
        second.hand(offset, Delivered(True))
    low, metadata = second.snapshot()
    third = ledger(low, metadata)
    assert [o for o in range(low, count) if third.see(o)] == [o for o in range(count) if o not in done]


def test_metadata_fits_with_ten_thousand_waiting_in_a_wild_order() -> None:
    one = handed(10_000)
    for offset in range(10_000):
        if hash((offset, "wild")) % 2:
            one.finish(offset)
    low, metadata = one.snapshot()
    assert len(metadata) < 4096
    assert {o for o in range(low, 10_000) if ledger(low, metadata).is_open(o)} == set(one.open)


def test_what_does_not_fit_is_run_again_and_never_lost() -> None:
    one = handed(60_000)
    state, done = 1, set()
    for offset in range(1, 60_000):
        state = state * 1103515245 + 12345 & 0x7FFFFFFF
        if state >> 16 & 1:
            one.finish(offset)
            done.add(offset)
    low, metadata = one.snapshot()
    assert (low, len(metadata) < 4096) == (0, True)
    after = ledger(low, metadata)
    assert all(after.is_open(o) for o in range(60_000) if o not in done)


def test_histories_are_kept_until_their_event_is_finished() -> None:
    one = handed(4)
    one.remember(2, History(attempts=1, error="ValueError: no"))
    one.remember(3, History(strikes=1, alone=True))
    one.finish(0)
    one.finish(3)
    two = ledger(*one.snapshot())
    assert two.histories == {2: History(attempts=1, error="ValueError: no")}


def test_a_thousand_crashed_at_once_still_fit() -> None:
    one = handed(1024)
    for offset in range(1024):
        one.remember(
            offset, History(strikes=1, alone=True, last_failed_at=1e9 + offset / 1000, error=f"{offset}: killed")
        )
    low, metadata = one.snapshot()
    assert len(metadata) < 4096
    assert {h.strikes for h in ledger(low, metadata).histories.values()} == {1}


def test_only_after_an_unclean_end_a_record_may_have_been_started() -> None:
    one = ledger(owner="host-a")
    one.see(0)
    one.hand(0, Delivered(True))
    low, dirty = one.snapshot()
    assert ledger(low, dirty, owner="host-b").redelivered(0)
    assert ledger(low, dirty, owner="host-b").redelivered(5)  # handed out after the last commit, perhaps
    low, clean = one.snapshot(clean=True)
    assert not ledger(low, clean, owner="host-b").redelivered(0)


def test_the_journal_of_the_same_slot_accounts_for_an_unclean_end() -> None:
    one = ledger(owner="host-a")
    one.see(0)
    one.hand(0, Delivered(True))
    low, dirty = one.snapshot()
    ours, theirs = ledger(low, dirty, owner="host-a"), ledger(low, dirty, owner="host-b")
    ours.trust_journal()
    theirs.trust_journal()
    assert (ours.redelivered(0), theirs.redelivered(0)) == (False, True)


def test_the_backlog_is_read_from_a_commit() -> None:
    one = ledger()
    for offset in range(20):
        one.see(offset)
    one.hand(0, Delivered(True))
    one.hand(1, Delivered(False))
    for offset in range(2, 10):
        one.park(offset)
    one.finish(4)
    one.lost = 7
    _, metadata = one.snapshot()
    assert backlog(metadata) == (10, 9, 1, 7)


def test_metadata_of_others_says_nothing() -> None:
    for foreign in ("hello", "z###", "[1]", '{"holes": '):
        assert backlog(foreign) == (0, 0, 0, 0)
        assert ledger(5, foreign).see(5)


def test_what_was_read_and_not_handed_out_is_read_again() -> None:
    one = handed(3)
    for offset in range(3, 9):
        one.see(offset)
    one.finish(0)
    low, metadata = one.snapshot()
    assert (low, backlog(metadata)[:2]) == (1, (2, 2))
    assert [o for o in range(1, 10) if ledger(low, metadata).see(o)] == [*range(1, 10)]


def test_markers_of_transactions_are_no_backlog() -> None:
    one = handed(1)
    one.finish(0)
    one.skip_to(2)
    assert one.snapshot()[0] == 1, "something before it may be ready"
    one.catch_up()
    assert one.snapshot()[0] == 2


def test_handing_out_is_measured_from_what_a_successor_would_be_told() -> None:
    one = handed(5)
    assert one.ahead == 5
    one.told = one.edge
    assert one.ahead == 0
