"""Says which files changed: topology files, the folders that their includes come from, and handler code.

Walk "an edit", first step. The system's notifications only say when to look; what counts is the content, once it has
stayed the same for a moment. So a half-written file, a rename over it, a swapped symbolic link and an editor's backup
are all seen as what they amount to.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import watchfiles

from orchestrator.supervisor import code

#: Seconds without a further change before files are believed.
SETTLE = 0.15

#: Seconds between looks when the system does not notify (some network and container file systems do not).
_LOOK = 2.0

_YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Change:
    """Files that differ from what they were. `kind` topology: read it again; code: only handlers changed."""

    files: tuple[Path, ...]
    kind: Literal["topology", "code"]


Snapshot = Mapping[Path, str]


class Watcher:
    """`async for change in watcher.changes()`, until stop(); watch() says what to look at from now on."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._root = root
        self._files = tuple(files)
        self._stop = asyncio.Event()
        self._stats: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._seen = self._snapshot()

    def watch(self, root: Path, files: Sequence[Path]) -> None:
        """After a reload: the topology may have other includes now. What changed meanwhile is still reported."""
        known = self._seen
        self._root, self._files = root, tuple(files)
        fresh = self._snapshot()
        self._seen = {path: known.get(path, value) for path, value in fresh.items()}

    def stop(self) -> None:
        """Ends changes()."""
        self._stop.set()

    async def changes(self) -> AsyncIterator[Change]:
        """Yields once files have settled; never the same content twice."""
        while not self._stop.is_set():
            folders = self._folders()
            async for _ in self._nudges(folders):
                if (change := await self._settled()) is not None:
                    yield change
                if self._folders() != folders:
                    break

    async def _nudges(self, folders: set[Path]) -> AsyncIterator[None]:
        """Returns when something may have happened in `folders`; at once for what happened before we listened."""
        yield
        nudges = watchfiles.awatch(
            *folders,
            watch_filter=None,
            debounce=100,
            step=50,
            stop_event=self._stop,
            recursive=False,
            rust_timeout=int(_LOOK * 1000),
            yield_on_timeout=True,
            ignore_permission_denied=True,
        )
        async with contextlib.aclosing(nudges):
            try:
                async for _ in nudges:
                    yield
            except FileNotFoundError:  # a folder went away meanwhile: listen to those that are left
                await asyncio.sleep(SETTLE)

    async def _settled(self) -> Change | None:
        now = self._snapshot()
        while now != self._seen:
            await asyncio.sleep(SETTLE)
            later = self._snapshot()
            if later == now:
                break
            now = later
        changed = sorted(path for path in now.keys() | self._seen.keys() if now.get(path) != self._seen.get(path))
        self._seen = now
        if not changed:
            return None
        topology = any(path in self._files or path.suffix != ".py" for path in changed)
        return Change(tuple(changed), "topology" if topology else "code")

    def _folders(self) -> set[Path]:
        """Also where symbolic links lead: a swap is seen in the folder of the link, an edit in that of the target."""
        found = set(code.folders(self._root))
        for path in self._files:
            found |= {path.parent, path.resolve().parent}
        return {folder for folder in found if folder.is_dir()}

    def _relevant(self) -> Iterable[Path]:
        yield from self._files
        for folder in {path.parent for path in self._files}:  # an include may match a new file there
            with contextlib.suppress(OSError):
                yield from (path for path in folder.iterdir() if path.suffix in _YAML)
        yield from code.python_files(self._root)

    def _snapshot(self) -> Snapshot:
        return {path: self._digest(path) for path in self._relevant()}

    def _digest(self, path: Path) -> str:
        try:
            stat = path.stat()
            known = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if (cached := self._stats.get(path)) is not None and cached[0] == known:
                return cached[1]
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError:
            return ""  # not there at this moment
        self._stats[path] = known, digest
        return digest
