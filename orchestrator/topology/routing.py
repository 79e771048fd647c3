"""Which channel takes an event type: patterns, what two of them share, and an index over many.

Part of meaning. Pure. `*` is one token, `>` (last) is the rest, at least one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def intersection(one: str, other: str) -> str | None:
    """The pattern of what both take, None when that is nothing."""
    left, right = one.split("."), other.split(".")
    out: list[str] = []
    for index in range(max(len(left), len(right))):
        a = left[index] if index < len(left) else None
        b = right[index] if index < len(right) else None
        if a is None or b is None:
            return None
        if a == ">":
            return ".".join(out + right[index:])
        if b == ">":
            return ".".join(out + left[index:])
        if a != b and "*" not in (a, b):
            return None
        out.append(b if a == "*" else a)
    return ".".join(out)


def covers(wide: str, narrow: str) -> bool:
    """Whether everything that `narrow` takes, `wide` takes too."""
    return intersection(wide, narrow) == narrow


def concrete(pattern: str) -> bool:
    """Whether it is one event type and no pattern."""
    return not any(token in ("*", ">") for token in pattern.split("."))


class _Branch(Generic[T]):
    __slots__ = ("below", "here", "rest")

    def __init__(self) -> None:
        self.below: dict[str, _Branch[T]] = {}
        self.here: list[tuple[str, T]] = []
        self.rest: list[tuple[str, T]] = []  # patterns that end in > here


class Index(Generic[T]):
    """Patterns with what they belong to, found by what they share with another pattern.

    A look-up follows the tokens: its work does not grow with the number of patterns that share nothing with it.
    `steps` counts it, for the tests.
    """

    def __init__(self) -> None:
        self._root: _Branch[T] = _Branch()
        self.steps = 0

    def add(self, pattern: str, owner: T) -> None:
        """Adds a pattern; the same one may be added for several owners."""
        branch = self._root
        for token in pattern.split("."):
            if token == ">":
                branch.rest.append((pattern, owner))
                return
            branch = branch.below.setdefault(token, _Branch())
        branch.here.append((pattern, owner))

    def overlapping(self, pattern: str) -> list[tuple[str, T]]:
        """Every (pattern, owner) that shares at least one event type with `pattern`."""
        found: list[tuple[str, T]] = []
        level = [self._root]
        tokens = pattern.split(".")
        for token in tokens:
            following: list[_Branch[T]] = []
            for branch in level:
                self.steps += 1
                found += branch.rest
                if token == ">":
                    for child in branch.below.values():
                        found += self._all(child)
                elif token == "*":
                    following += branch.below.values()
                else:
                    following += [branch.below[t] for t in (token, "*") if t in branch.below]
            level = following
        for branch in level:
            found += branch.here
        return found

    def _all(self, branch: _Branch[T]) -> Iterator[tuple[str, T]]:
        waiting = [branch]
        while waiting:
            self.steps += 1
            one = waiting.pop()
            yield from one.here
            yield from one.rest
            waiting += one.below.values()


def minimal(patterns: Iterable[str]) -> tuple[str, ...]:
    """Without repetitions and without what another of them covers; in their order."""
    every = list(dict.fromkeys(patterns))
    if len(every) == 1 or all(concrete(p) for p in every):
        return tuple(every)
    index: Index[None] = Index()
    for pattern in every:
        index.add(pattern, None)
    return tuple(p for p in every if not any(o != p and covers(o, p) for o, _ in index.overlapping(p)))
