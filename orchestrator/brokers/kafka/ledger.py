"""What of one partition is done: the bookkeeping behind the committed offset. Pure: no I/O, no threads.

Kafka keeps one number for each partition and group, with 4,095 characters of metadata beside it. The number is the
contiguous watermark; the metadata carries what is done above it (as the holes between), and the history of each event
whose run the log itself does not account for. See docs/adr/0005-kafka-offsets-carry-the-state.md.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Generic, Protocol, TypeVar

from orchestrator.brokers.base import FRESH, History

#: What a broker takes as metadata (offset.metadata.max.bytes is 4096).
_ROOM = 4000
#: How far beyond the last committed edge a record may be handed out; after an unclean end all of those are suspected.
SUSPECT = 2048


class Handed(Protocol):
    handed: bool  # the worker has it


D = TypeVar("D", bound=Handed)


class Ledger(Generic[D]):
    """One assigned partition. Offsets are seen in order, handed out and finished in any. D is the type of a delivery.

    The reader's thread owns it, but for finish(): the loop calls it too, so what finish() changes is copied before it
    is walked.
    """

    def __init__(self, topic: str, number: int, committed: int, metadata: str, *, owner: str) -> None:
        kept = _unpack(metadata)
        self.topic, self.number, self.owner = topic, number, owner
        self.low = committed  # everything below is finished
        self.seen = committed  # everything below has been read
        self.edge = committed  # nothing from here on was ever handed out
        self.told = committed  # the edge of the last commit
        self.lost: int = kept.get("lost", 0)  # trimmed before it was read
        #: Handed out (with its delivery), parked or given back (without), and not finished; in order.
        self.open: dict[int, D | None] = {}
        self.histories: dict[int, History] = {
            committed + offset: History.decode(json.dumps(history).encode())
            for history, runs in kept.get("histories", ())
            for offset in _spread(runs)
        }
        self.accounted = kept.get("owner") == owner  # a predecessor in our own slot: its journal tells all
        self.written = False  # our first commit has told successors that an unclean end is to be suspected
        self.dirty = True
        self._before = committed + kept.get("edge", 0)
        self._holes = {committed + offset for offset in _spread(kept.get("holes", ()))}
        self.unclean = not kept.get("clean", not metadata)
        self._suspect_below = self._before + SUSPECT if self.unclean else 0

    def see(self, offset: int) -> bool:
        """Whether the record at `offset` is new to us and not finished by a predecessor."""
        if offset < self.seen:
            return False
        self.seen = offset + 1
        return offset >= self._before or offset in self._holes

    def park(self, offset: int) -> None:
        """It was read, and waits for its time."""
        self.hand(offset, None)

    def hand(self, offset: int, delivery: D | None) -> None:
        self.open[offset] = delivery
        if offset >= self.edge:
            self.edge = offset + 1

    def skip_to(self, offset: int) -> None:
        """Nothing that was not read yet lies before `offset`: the end of the log, or its beginning after a trim."""
        self.seen = max(self.seen, offset)

    def catch_up(self) -> None:
        """Whatever was read has been handed out or passed over."""
        if self.seen > self.edge:
            self.edge, self.dirty = self.seen, True

    @property
    def ahead(self) -> int:
        """How far handing out has gone beyond what a successor would be told."""
        return self.edge - self.told

    def redelivered(self, offset: int) -> bool:
        """Whether a predecessor may have started it without a history of that run."""
        return offset < self._suspect_below and offset not in self.histories

    def trust_journal(self) -> None:
        """The journal of this slot has been read: what it did not name was never started here."""
        if self.accounted:
            self._suspect_below = 0

    def is_open(self, offset: int) -> bool:
        """Whether `offset` is still to be finished, seen or not."""
        if offset < self.edge:
            return offset in self.open
        return offset >= self._before or offset in self._holes

    def remember(self, offset: int, history: History) -> None:
        self.histories[offset] = history
        self.dirty = True

    def is_marked(self, offset: int) -> bool:
        """Whether a commit says that `offset` was started."""
        return bool(self.histories) and self.histories.get(offset, FRESH).open

    def finish(self, offset: int) -> None:
        self.open.pop(offset, None)
        if self.histories:
            self.histories.pop(offset, None)
        self.dirty = True  # last: a snapshot that missed it is followed by another

    def snapshot(self, *, without: Collection[int] = (), clean: bool = False) -> tuple[int, str]:
        """The offset, the edge and the metadata to commit, as if `without` were finished. `clean`: nothing of ours is
        running."""
        known = self.open.copy()
        holes = [offset for offset in known if offset not in without] if without else list(known)
        if self._holes:
            self._holes = {offset for offset in self._holes if offset >= self.edge}
            holes += sorted(self._holes)
        edge = max(self.edge, self._before)
        low = holes[0] if holes else edge
        histories = {o: h for o, h in self.histories.copy().items() if o >= low and o not in without}
        running = sum(one is not None and one.handed for one in known.values())
        for cut in (False, True):
            text = self._pack(low, edge, holes, _shortened(histories) if cut else histories, clean, running)
            if len(text) <= _ROOM:
                return low, text
        # Thousands finished in a wild order: remember the lower part; after a crash the rest would run again.
        while len(text) > _ROOM:
            edge = low + (edge - low) // 2
            histories = {o: h for o, h in histories.items() if o < edge}
            below = [o for o in holes if o < edge]
            text = self._pack(low, edge, below, _shortened(histories), clean, running)
        return low, text

    def _pack(
        self, low: int, edge: int, holes: list[int], histories: dict[int, History], clean: bool, running: int
    ) -> str:
        grouped: dict[bytes, list[int]] = {}
        for offset, history in sorted(histories.items()):
            grouped.setdefault(history.encode(), []).append(offset - low)
        kept = {
            "owner": self.owner,
            "clean": clean,
            "edge": edge - low,
            "holes": list(_runs(offset - low for offset in holes)),
            "running": running,
            "lost": self.lost,
            "histories": [(json.loads(history), list(_runs(offsets))) for history, offsets in grouped.items()],
        }
        text = json.dumps({name: value for name, value in kept.items() if value}, separators=(",", ":"))
        if len(text) > _ROOM // 4:
            text = "z" + base64.b64encode(zlib.compress(text.encode(), 6)).decode()
        return text


def backlog(metadata: str) -> tuple[int, int, int, int]:
    """(edge above the committed offset, unfinished below it, running, lost): what `lag` reads of a commit."""
    kept = _unpack(metadata)
    return kept.get("edge", 0), sum(kept.get("holes", ())[1::2]), kept.get("running", 0), kept.get("lost", 0)


def owner_of(metadata: str) -> str | None:
    """Who made the commit."""
    return _unpack(metadata).get("owner")


def _unpack(metadata: str) -> dict[str, Any]:
    """Metadata that is not ours (another client committed, or `seek`) says nothing."""
    try:
        text = zlib.decompress(base64.b64decode(metadata[1:])).decode() if metadata[:1] == "z" else metadata
        found = json.loads(text)
    except (ValueError, zlib.error):
        return {}
    return found if isinstance(found, dict) else {}


def _runs(offsets: Iterable[int]) -> Iterator[int]:
    """Ascending numbers as gap, length, gap, length …"""
    numbers = list(offsets)
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1)] if numbers else []
    end = 0
    for first, after in pairwise([*starts, len(numbers)]):
        yield numbers[first] - end
        yield after - first
        end = numbers[after - 1] + 1


def _spread(runs: Iterable[int]) -> Iterator[int]:
    """The numbers that _runs wrote."""
    at, numbers = 0, list(runs)
    for gap, length in zip(numbers[::2], numbers[1::2], strict=True):
        yield from range(at + gap, at + gap + length)
        at += gap + length


def _shortened(histories: dict[int, History]) -> dict[int, History]:
    """Without what differs from event to event and no decision needs to the millisecond."""
    return {
        offset: replace(
            h, error="", first_failed_at=h.first_failed_at // 60 * 60, last_failed_at=h.last_failed_at // 60 * 60
        )
        for offset, h in histories.items()
    }
