"""What the reader's thread says to the loop: collected during a turn, posted with one wake-up at its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from confluent_kafka import KafkaException

from orchestrator.brokers.base import Done

if TYPE_CHECKING:
    from orchestrator.brokers.kafka.intake import Book, Filter, KafkaDelivery


@dataclass(frozen=True, slots=True)
class Settings:
    """What a reader needs to know; made by the connection."""

    consumer: Mapping[str, Any]
    transactions: Mapping[str, Any]
    topic: str
    group: str
    owner: str
    wanted: Filter
    handover: float  # how long a partition that must go waits for the handlers running on it
    letters: tuple[str, ...]  # topics of its dead letters
    nowhere: str  # a topic that no group reads: its positions say nothing


class Owner(Protocol):
    """The loop's side (consumer.py); called in the loop."""

    def finished(self, dones: Sequence[tuple[Done, BaseException | None]]) -> None: ...
    def deliver(self, deliveries: Sequence[KafkaDelivery]) -> None: ...
    def recall(self, books: Sequence[Book]) -> None: ...
    def revoked(self, deliveries: Sequence[KafkaDelivery]) -> None: ...
    def trouble(self, reason: str | None) -> None: ...
    def alarm(self, message: str) -> None: ...
    def assigned(self) -> None: ...
    def heal(self) -> None: ...


_AWAY = "not connected"


class Desk:
    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Owner) -> None:
        self.owner = owner
        self.stopping = False
        self.trouble: str | None = None
        self._loop = loop
        self._posts: list[Callable[[], object]] = []
        self._dones: list[tuple[Done, BaseException | None]] = []

    def post(self, act: Callable[[], object]) -> None:
        """Runs `act` in the loop, after what was posted before."""
        if self._dones:
            dones, self._dones = self._dones, []
            self._posts.append(lambda: self.owner.finished(dones))
        self._posts.append(act)

    def done(self, done: Done, error: BaseException | None = None) -> None:
        self._dones.append((done, error))

    def flush(self) -> None:
        if self._dones:
            self.post(lambda: None)
        if self._posts:
            posts, self._posts = self._posts, []
            try:
                self._loop.call_soon_threadsafe(lambda: [act() for act in posts])
            except RuntimeError:  # the loop is closed: nobody is left to be told
                self.stopping = True

    def say(self, reason: str | None) -> None:
        """What is wrong, or None; told when it changes. Once disconnected, how does not matter."""
        if reason is not None and reason.startswith(_AWAY) and self.away:
            return
        if reason != self.trouble:
            self.trouble = reason
            self.post(lambda: self.owner.trouble(reason))

    @property
    def away(self) -> bool:
        return self.trouble is not None and self.trouble.startswith(_AWAY)

    def alarm(self, message: str) -> None:
        self.post(lambda: self.owner.alarm(message))

    def patiently(self, ask: Callable[[], Any]) -> Any:
        """What `ask` answers, asked again while the broker is away; raises KafkaException when we are to stop."""
        while True:
            try:
                return ask()
            except KafkaException as error:
                if self.stopping:
                    raise
                self.say(f"not connected ({error.args[0]})")
                self.flush()


def settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    """Ends a future that its owner may have given up already."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
