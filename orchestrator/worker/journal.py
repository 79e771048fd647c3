"""What this worker is doing with which event, in a file that outlives the process.

One record for each slot of concurrency in an mmap: writing is a memory copy (no system call), and the kernel keeps the
page when the process is killed. The next worker in the same place reads it and calls Consumer.recover, so a crash is
counted for the events that had started and for no others.

Layout, little endian: magic "OJRN", version, record size, number of records; then each record: state byte, token
length, checksum of the subscription, token. The state byte is written last.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from orchestrator.brokers.base import Ended
from orchestrator.topology.model import Subscription

TOKEN = 400  # bytes at most: the border's promise
_HEADER = struct.Struct("<4sHHI")
_HEAD = struct.Struct("<HI")  # behind the state byte
_RECORD = 1 + _HEAD.size + TOKEN + 1  # even
_MAGIC, _VERSION = b"OJRN", 1


class State(IntEnum):
    FREE = 0
    STARTED = 1
    STARTED_ALONE = 2
    BLAMED = 3
    RETURNED = 4
    HELD = 5  # waits for its turn


_ENDED: dict[int, Ended] = {
    State.STARTED: Ended.STARTED,
    State.STARTED_ALONE: Ended.STARTED_ALONE,
    State.BLAMED: Ended.BLAMED,
    State.RETURNED: Ended.RETURNED,
    State.HELD: Ended.RETURNED,
}


@dataclass(frozen=True, slots=True)
class Record:
    """One event that a dead worker had not settled. `subscription` is subscription_code() of what it came from; `token`
    is empty when a successor has recovered it already (see forget)."""

    ended: Ended
    subscription: int
    token: bytes


class Journal:
    """The records of one worker. Any thread may set a state; everything else is the event loop's."""

    __slots__ = ("_map",)

    def __init__(self, size: int, fd: int = -1) -> None:
        length = _HEADER.size + size * _RECORD
        if fd >= 0:
            os.ftruncate(fd, length)
        self._map = mmap.mmap(fd, length)
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, _RECORD, size)

    @classmethod
    def create(cls, path: str | Path, size: int) -> Journal:
        """An empty journal of `size` records at `path`; it replaces the predecessor's in one step. Raises OSError."""
        fresh = f"{path}.new"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
        try:
            fd = os.open(fresh, flags, 0o600)
        except FileNotFoundError:  # nobody has made the folder
            os.makedirs(os.path.dirname(fresh), exist_ok=True)
            fd = os.open(fresh, flags, 0o600)
        try:
            journal = cls(size, fd)
        finally:
            os.close(fd)
        os.replace(fresh, path)
        return journal

    def begin(self, slot: int, state: int, subscription: int, token: bytes) -> None:
        """The event with `token` starts in `slot`; `state` is a State's value. Raises ValueError for more than
        400 bytes of token."""
        size = len(token)
        if size > TOKEN:
            raise ValueError(f"a delivery's token has {size} bytes; {TOKEN} is the most")
        at = _HEADER.size + slot * _RECORD
        self._map[at + 1 : at + 7 + size] = _HEAD.pack(size, subscription) + token
        self._map[at] = state

    def set(self, slot: int, state: int) -> None:
        self._map[_HEADER.size + slot * _RECORD] = state

    def close(self) -> None:
        self._map.close()


def read(path: str | Path) -> list[Record]:
    """What a dead worker left at `path`; empty when there is no journal, or none that this version can read. The
    number of records is the file's own, so a changed `concurrency` does not matter."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return []
    if len(data) < _HEADER.size:
        return []
    magic, version, size, count = _HEADER.unpack_from(data)
    if (magic, version, size) != (_MAGIC, _VERSION, _RECORD) or len(data) < _HEADER.size + count * size:
        return []
    found = []
    for at in range(_HEADER.size, _HEADER.size + count * size, size):
        length, subscription = _HEAD.unpack_from(data, at + 1)
        ended = _ENDED.get(data[at])
        if ended is not None and length <= TOKEN:
            found.append(Record(ended, subscription, data[at + 7 : at + 7 + length]))
    return found


def remove(path: str) -> None:
    """Nothing is left to tell a successor."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def forget(path: str | Path, subscription: int) -> None:
    """Empties the tokens of one subscription in a dead worker's journal: what they say has been told. The records stay,
    because how many had started says how each of the others is judged."""
    with open(path, "r+b") as file:
        data = file.read()
        _, _, size, count = _HEADER.unpack_from(data)
        for at in range(_HEADER.size, _HEADER.size + count * size, size):
            if _HEAD.unpack_from(data, at + 1)[1] == subscription:
                file.seek(at + 1)
                file.write(_HEAD.pack(0, subscription))


def subscription_code(subscription: Subscription) -> int:
    """Tells the subscriptions of one agent apart, also after an edit has changed their order."""
    return zlib.crc32(f"{subscription.broker}/{subscription.channel}/{subscription.group}".encode())
