"""Durations (`200ms 30s 5m 1h 7d`) and sizes (`10KiB 1MB 1GiB`), to seconds and bytes and back. Pure."""

from __future__ import annotations

import re

_LONGEST = 36_500 * 86_400.0  # beyond a hundred years it is a slip, and the calendar ends somewhere

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "B": 1,
    **{unit: 1000**power for power, unit in enumerate(("kB", "MB", "GB", "TB"), 1)},
    "KB": 1000,
    **{unit: 1024**power for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)},
}

DURATION_PATTERN = r"^[0-9]{1,9}(\.[0-9]{1,6})?(ms|s|m|h|d)$"
SIZE_PATTERN = r"^[0-9]{1,12}(\.[0-9]{1,6})?(B|kB|KB|MB|GB|TB|KiB|MiB|GiB|TiB)$"
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(B|[kKMGT]B|[KMGT]iB)")


class TooLong(ValueError):
    """A duration that nothing could wait for."""


def seconds(text: str) -> float:
    """ "5m" → 300.0. Raises ValueError."""
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ValueError(f"not a duration: {text!r}")
    number, unit = found.groups()
    value = float(number) / 1000 if unit == "ms" else float(number) * _SECONDS[unit]
    if value > _LONGEST:
        raise TooLong(f"at most {duration_text(_LONGEST)}")
    return value


def size(text: str) -> int:
    """ "1GiB" → 1073741824. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ValueError(f"not a size: {text!r}")
    number, unit = found.groups()
    return int(float(number) * _BYTES[unit])


def duration_text(value: float) -> str:
    """300.0 → "5m": the largest unit that divides it; parsing it again gives the same seconds."""
    for unit in ("d", "h", "m", "s"):
        if value and value % _SECONDS[unit] == 0:
            return f"{int(value / _SECONDS[unit])}{unit}"
    milliseconds = value * 1000
    if abs(milliseconds - round(milliseconds)) < 1e-9:
        return f"{round(milliseconds)}ms"
    return f"{milliseconds:.6f}".rstrip("0").rstrip(".") + "ms"


def size_text(value: int) -> str:
    """1073741824 → "1GiB"; what no unit divides is plain bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"):
        if value and value % _BYTES[unit] == 0:
            return f"{value // _BYTES[unit]}{unit}"
    return f"{value}B"
