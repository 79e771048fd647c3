"""Edits as editors, tools and orchestrators really make them."""

from __future__ import annotations

import asyncio
import os

import pytest

from orchestrator.supervisor.watcher import Watcher
from tests.patience import PATIENCE
from tests.supervisor.rig import eventually


class Seen:
    """What a watcher reports, collected while the test goes on."""

    def __init__(self, watcher: Watcher) -> None:
        self.changes = []
        self.watcher = watcher
        self.task = asyncio.create_task(self._collect())

    async def _collect(self):
        async for change in self.watcher.changes():
            self.changes.append(change)

    async def one(self):
        await eventually(lambda: self.changes)
        return self.changes.pop(0)

    async def none_but(self, path):
        """Nothing was reported before this edit of `path`: an edit after the others shows that they were seen."""
        path.write_text(path.read_text() + "\n# the last edit\n")
        assert (await self.one()).files == (path,)


@pytest.fixture
async def watch(tmp_path):
    watchers = []

    async def start(*files):
        watchers.append(Seen(Watcher(tmp_path, files)))
        await asyncio.sleep(0)
        return watchers[-1]

    yield start
    for seen in watchers:
        seen.watcher.stop()
        await asyncio.wait_for(seen.task, PATIENCE)


@pytest.fixture
def yaml(tmp_path):
    path = tmp_path / "topology.yaml"
    path.write_text("a: 1\n")
    (tmp_path / "agents.py").write_text("x = 1\n")
    return path


async def test_an_edit(watch, yaml):
    seen = await watch(yaml)
    yaml.write_text("a: 2\n")
    change = await seen.one()
    assert (change.files, change.kind) == ((yaml,), "topology")


async def test_code_alone(watch, yaml, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "deep.py").write_text("y = 1\n")
    seen = await watch(yaml)
    (tmp_path / "lib" / "deep.py").write_text("y = 2\n")
    change = await seen.one()
    assert (change.files, change.kind) == ((tmp_path / "lib" / "deep.py",), "code")


async def test_code_and_topology_together_are_one_change(watch, yaml, tmp_path):
    seen = await watch(yaml)
    (tmp_path / "agents.py").write_text("x = 2\n")
    yaml.write_text("a: 2\n")
    change = await seen.one()
    assert (change.files, change.kind) == ((tmp_path / "agents.py", yaml), "topology")


async def test_renamed_over(watch, yaml, tmp_path):
    seen = await watch(yaml)
    fresh = tmp_path / ".topology.yaml.swp"
    fresh.write_text("a: 3\n")
    os.replace(fresh, yaml)
    assert (await seen.one()).files == (yaml,)


async def test_a_swapped_symbolic_link(watch, tmp_path):
    for name in ("one", "two"):
        (tmp_path / ".data" / name).mkdir(parents=True)
        (tmp_path / ".data" / name / "topology.yaml").write_text(f"a: {name}\n")
    (tmp_path / "current").symlink_to(".data/one")
    path = tmp_path / "topology.yaml"
    path.symlink_to("current/topology.yaml")
    seen = await watch(path)
    (tmp_path / "next").symlink_to(".data/two")
    os.replace(tmp_path / "next", tmp_path / "current")
    assert (await seen.one()).files == (path,)


async def test_a_file_written_bit_by_bit_is_reported_when_it_is_whole(watch, yaml):
    seen = await watch(yaml)
    with yaml.open("w") as file:
        for number in range(20):
            file.write(f"k{number}: 1\n")
            file.flush()
            await asyncio.sleep(0.03)
    change = await seen.one()
    assert change.files == (yaml,)
    await seen.none_but(yaml)


async def test_removed_and_written_again(watch, yaml):
    seen = await watch(yaml)
    yaml.unlink()
    assert (await seen.one()).files == (yaml,)
    yaml.write_text("a: 1\n")
    assert (await seen.one()).files == (yaml,)


async def test_what_does_not_matter(watch, yaml, tmp_path):
    seen = await watch(yaml)
    for folder in (".orchestrator", ".venv", "__pycache__", ".git", "node_modules"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("x\n")
    yaml.write_text("a: 1\n")  # the same content
    os.utime(yaml)
    await seen.none_but(yaml)


async def test_new_folders_and_new_includes(watch, yaml, tmp_path):
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "one.yaml").write_text("b: 1\n")
    seen = await watch(yaml, tmp_path / "common" / "one.yaml")
    (tmp_path / "common" / "two.yaml").write_text("c: 1\n")
    change = await seen.one()
    assert (change.files, change.kind) == ((tmp_path / "common" / "two.yaml",), "topology")
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh" / "mod.py").write_text("z = 1\n")
    assert (await seen.one()).files == (tmp_path / "fresh" / "mod.py",)
    (tmp_path / "fresh" / "mod.py").write_text("z = 2\n")
    assert (await seen.one()).files == (tmp_path / "fresh" / "mod.py",)


async def test_other_includes_after_a_reload(watch, yaml, tmp_path):
    (tmp_path / "more").mkdir()
    more = tmp_path / "more" / "m.yaml"
    more.write_text("b: 1\n")
    seen = await watch(yaml)
    yaml.write_text("include: [more/*.yaml]\n")
    assert (await seen.one()).files == (yaml,)
    seen.watcher.watch(tmp_path, (yaml, more))
    more.write_text("b: 2\n")
    assert (await seen.one()).files == (more,)
