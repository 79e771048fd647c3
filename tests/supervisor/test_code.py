"""Which agents an edit of the code replaces."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.supervisor.code import digests
from orchestrator.topology.model import Handler
from tests.supervisor.rig import agent, topology

FILES = {
    "research.py": "from lib import web\nimport json\n",
    "writing.py": "def write(): ...\n",
    "lib/__init__.py": "",
    "lib/web.py": "from . import text\n",
    "lib/text.py": "A = 1\n",
    "lib/alone.py": "B = 1\n",
    "plugins/__init__.py": "",
    "plugins/main.py": "import importlib\nimportlib.import_module('lib.alone')\n",
}

AGENTS = {"research": "research:run", "writing": "writing:write", "plug": "plugins.main:run", "other": "json:dumps"}


@pytest.fixture
def team(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    agents = [replace(agent(name), handler=Handler("python", call)) for name, call in AGENTS.items()]
    return topology(tmp_path, *agents)


@pytest.mark.parametrize(
    ("file", "text", "replaced"),
    [
        ("research.py", "x = 1\n", {"research", "plug"}),
        ("writing.py", "x = 1\n", {"writing", "plug"}),
        ("lib/__init__.py", "x = 1\n", {"research", "plug"}),
        ("lib/web.py", "x = 1\n", {"research", "plug"}),
        ("lib/text.py", "A = 2\n", {"research", "plug"}),
        ("lib/alone.py", "B = 2\n", {"plug"}),
        ("plugins/main.py", "x = 1\n", {"plug"}),
        ("writing.py", "def broken(:\n", {"writing", "plug"}),
        ("writing.py", "\0", {"writing", "plug"}),
        ("new.py", "x = 1\n", {"plug"}),
        ("json.py", "x = 1\n", {"research", "plug", "other"}),
    ],
)
def test_only_those_that_import_it(team, file, text, replaced):
    before = digests(team)
    (team.root / file).write_text(text)
    after = digests(team)
    assert {name for name in AGENTS if before[name] != after[name]} == replaced


def test_code_from_elsewhere_has_no_digest(team):
    assert digests(team)["other"] == ""
