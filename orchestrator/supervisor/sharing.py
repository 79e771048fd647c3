"""What the warm parent does before it forks, so that its workers share as much of its memory as they can.

A worker has a page to itself as soon as it writes to it, and a page holds many objects. So what every worker would
write is written before, and what a worker makes is kept off the pages that hold what all of them have.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable

from orchestrator.worker import logs

# CPython's allocator (obmalloc.c): objects of up to 512 bytes lie in pools of 16 KiB, one kind of pool for each
# multiple of 16 bytes; the first object lies behind the pool's header.
_POOL, _HEADER, _GRAIN, _LARGEST = 1 << 14, 48, 16, 512
_MOST = 1 << 17  # bytes of one kind: with another allocator there is nothing to find


def once() -> None:
    """After the imports: what the first event loop of a process leaves behind for the next ones, and its logging."""
    logs.prepare()
    asyncio.run(asyncio.sleep(0))


def settle() -> list[object]:
    """Before the first fork, and whenever much has come or gone. Returns what keeps the holes in memory filled: give
    it up to have them back."""
    gc.collect()
    # Importing has filled the interpreter's cache of attributes. A worker that replaces an entry there gives up the
    # old name (type_cache in CPython's typeobject.c), and so writes to a page that it shared: 0.2 MiB in each.
    sys._clear_type_cache()
    filling = _fill()
    gc.freeze()
    return filling


def _fill() -> list[object]:
    """Importing leaves holes all over the memory, and what a worker makes would go there: 0.2 MiB of pages for a few
    bytes each. With the holes filled it gets pages of its own. They are filled when the first place of a pool is
    handed out, and then the next."""
    filling: list[object] = []
    for size in range(_GRAIN, _LARGEST + 1, _GRAIN):
        make = _maker(size)
        last = 1
        for _ in range(_MOST // size):
            new = make()
            if last % _POOL == _HEADER and 0 < id(new) - last <= 3 * size:
                filling.pop()
                break
            filling.append(new)
            last = id(new)
    return filling


def _maker(size: int) -> Callable[[], object]:
    """Makes an object that takes `size` bytes and that the collector need not know."""
    if size == _GRAIN:
        return object
    if size == 2 * _GRAIN:
        return lambda: complex(size, size)
    return lambda: bytes(size - sys.getsizeof(b""))
