"""What a misspelt name probably meant: the last line of an error about it. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import lru_cache

_MANY = 40  # names to compare a misspelt one with
_ALIKE = 0.6  # 1 is equal


def near(name: str, names: Iterable[str], cutoff: float = _ALIKE) -> str | None:
    """ "did you mean `x`?" for the closest of `names`, None when nothing is as close as `cutoff` (1 is equal)."""
    found = _closest(name, tuple(names), cutoff)
    return f"did you mean `{found}`?" if found else None


def near_type(said: str, patterns: Iterable[str]) -> str | None:
    """As near, for an event type or pattern among patterns: a wildcard of theirs takes what `said` has in its place."""
    every = tuple(patterns)
    tokens = said.split(".")
    heads = _heads(every)
    alike = dict.fromkeys((tokens[0], _closest(tokens[0], tuple(heads), _ALIKE, 1), "*", ">"))
    meant = (_filled(tokens, pattern) for head in alike for pattern in heads.get(head or "", ()))
    return near(said, [m for m in meant if m]) or near(said, every)


def _filled(tokens: list[str], pattern: str) -> str | None:
    """`pattern` with `tokens` for its wildcards; None when what it spells out is not like what they have there."""
    parts = pattern.split(".")
    if parts[-1] == ">" and len(tokens) >= len(parts):
        parts = [*parts[:-1], *("*" for _ in tokens[len(parts) - 1 :])]
    if len(parts) != len(tokens):
        return None
    if any(
        p != "*" and difflib.SequenceMatcher(None, t, p).ratio() < _ALIKE for t, p in zip(tokens, parts, strict=True)
    ):
        return None
    return ".".join(t if p == "*" else p for t, p in zip(tokens, parts, strict=True))


@lru_cache(maxsize=256)  # a thousand agents that name the same missing channel ask once
def _closest(name: str, names: tuple[str, ...], cutoff: float, letters: int = 3) -> str | None:
    if len(names) > _MANY:  # comparing is slow: among many, only those that begin or end with the same letters
        ends = _ends(names, letters)
        alike = (*ends.get(name[:letters] + "…", ()), *ends.get("…" + name[-letters:], ()))
        names = tuple(dict.fromkeys(alike))[:_MANY]
    lowered = {n.lower(): n for n in names}
    if name.lower() in lowered:
        return lowered[name.lower()]
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), None)


@lru_cache(maxsize=16)
def _ends(names: tuple[str, ...], letters: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name[:letters] + "…", []).append(name)
        found.setdefault("…" + name[-letters:], []).append(name)
    return {end: some[:_MANY] for end, some in found.items()}


@lru_cache(maxsize=16)
def _heads(patterns: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        found.setdefault(pattern.partition(".")[0], []).append(pattern)
    return {head: some[:_MANY] for head, some in found.items()}
