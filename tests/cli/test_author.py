"""init, validate, graph, schema: what needs no broker."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import TOPOLOGY
from tests.cli.rig import Folder


def test_init_makes_a_folder_that_validates_with_its_handlers(tmp_path: Path) -> None:
    done = Folder(tmp_path).ok("init", "My Shop!")
    assert "orchestrator dev" in done.out
    assert "cd 'My Shop!'" in done.out
    made = Folder(tmp_path / "My Shop!")
    assert "my-shop: valid" in made.ok("validate", "--strict", "--handlers").out


def test_init_without_a_name_is_a_usage_error_and_json_names_what_it_wrote(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert "FOLDER is empty" in folder.refused("init", "", code=2)
    assert list(tmp_path.iterdir()) == []
    made = folder.ok("init", "My Team", "-o", "json").json
    assert (made["version"], made["topology"], made["folder"]) == (1, "my-team", "My Team")
    assert all((tmp_path / "My Team" / name).exists() for name in made["files"])


def test_a_folder_of_any_name_makes_a_topology_that_validates(tmp_path: Path) -> None:
    assert "cd -- -x" in Folder(tmp_path).ok("init", "--", "-x").out
    Folder(tmp_path).ok("init", "9" * 200)
    assert f"t-{'9' * 61}: valid" in Folder(tmp_path / ("9" * 200)).ok("validate").out
    assert "choose another folder" in Folder(tmp_path).refused("init", "x" * 300)
    (tmp_path / "loop").symlink_to("loop")
    assert "choose another folder" in Folder(tmp_path).refused("init", "loop")


def test_init_writes_over_nothing(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "agents.py").write_text("mine")
    said = Folder(tmp_path).refused("init", "shop")
    assert "exists already" in said
    assert "orchestrator init NAME" in said
    assert [p.name for p in (tmp_path / "shop").iterdir()] == ["agents.py"]
    assert (tmp_path / "shop" / "agents.py").read_text() == "mine"


def test_without_a_topology_the_next_step_is_said(tmp_path: Path) -> None:
    assert "orchestrator init" in Folder(tmp_path).refused("validate")


def test_every_mistake_is_shown_with_its_place(folder: Folder) -> None:
    folder.write("topology.yaml", (folder.path / "topology.yaml").read_text().replace("handler:", "handlr:"))
    said = folder.refused("validate")
    assert "topology.yaml:12:5: error" in said
    assert "did you mean `handler`?" in said
    done = folder.run("validate", "-o", "json")
    assert done.code == 1
    assert {d["line"] for d in done.json["diagnostics"]} >= {12}


def test_a_topology_comes_from_stdin_and_variables_from_the_command_line(folder: Folder) -> None:
    text = (folder.path / "topology.yaml").read_text().replace("name: shop", 'name: "{{ vars.shop }}"')
    text += "variables: {shop: {default: bakery}}\n"
    assert "bakery: valid" in folder.ok("validate", "-", stdin=text).out
    assert "florist: valid" in folder.ok("validate", "-", "--set", "shop=florist", stdin=text).out
    assert "NAME=VALUE" in folder.refused("validate", "-", "--set", "shop", code=2, stdin=text)


def test_show_prints_the_effective_topology_without_secrets(folder: Folder) -> None:
    text = (folder.path / "topology.yaml").read_text()
    auth = """{mechanism: token, token: "{{ secret('env:TOKEN') }}"}"""
    text += f'brokers: {{main: {{url: "nats://127.0.0.1:4222", auth: {auth}}}}}\n'
    folder.write("topology.yaml", text)
    done = folder.run("validate", "--show", TOKEN="opensesame")
    assert done.code == 0, done
    assert "concurrency: 8" in done.out
    assert "opensesame" not in done.out + done.err
    data = folder.run("validate", "--show", "-o", "json", TOKEN="opensesame")
    assert data.json["effective"]["agents"]["pack"]["concurrency"] == 8
    assert "opensesame" not in data.out + data.err


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import nonsense_module\n", "nonsense_module"),
        ("async def wrap(event, ctx): ...\n", "pack"),
        ("import os\nos._exit(3)\n", "exit code 3"),
        ("pack = 1\n", "pack"),
    ],
    ids=["import fails", "no such function", "exits", "no function"],
)
def test_validate_handlers_names_what_does_not_load(folder: Folder, code: str, expected: str) -> None:
    folder.write("agents.py", code)
    folder.ok("validate")
    said = folder.refused("validate", "--handlers")
    assert expected in said
    assert "topology.yaml:12:" in said


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("1 / 0\n", "ZeroDivisionError"),
        ("class Codec:\n    def decode(self): ...\n", "it has no encode()"),
        ("import os\nos._exit(3)\n", "exit code 3"),
        ("class Codec:\n    def decode(self): ...\n    def encode(self): ...\n", ""),
    ],
    ids=["import fails", "no method", "exits", "right"],
)
def test_validate_handlers_imports_codecs_too(folder: Folder, code: str, expected: str) -> None:
    folder.write("topology.yaml", TOPOLOGY.replace("parcels: {", 'parcels: {codec: "shouting:Codec", '))
    folder.write("shouting.py", code)
    folder.ok("validate")
    if not expected:
        folder.ok("validate", "--handlers")
        return
    said = folder.refused("validate", "--handlers")
    assert expected in said
    assert "topology.yaml:6:" in said


def test_a_module_that_does_not_import_is_shown_with_its_own_traceback(folder: Folder) -> None:
    folder.write("agents.py", "def broken():\n    return 1 / 0\nbroken()\n")
    said = folder.run("validate", "--handlers").err
    assert "agents.py" in said
    assert "return 1 / 0" in said
    assert "ZeroDivisionError" in said


def test_graph_draws_agents_and_channels(folder: Folder) -> None:
    drawn = folder.ok("graph").out
    assert "flowchart" in drawn
    assert '-->|"order.placed"| a_pack' in drawn
    assert "digraph" in folder.ok("graph", "-o", "dot").out
    data = folder.ok("graph", "-o", "json").json
    assert data["version"] == 1
    assert {"agent": "pack", "channel": "orders", "kind": "reads", "events": ["order.placed"]} in data["arrows"]
    assert [a["kind"] for a in data["arrows"]] == ["reads", "publishes", "dead-letters"]


def test_schema_is_json_schema() -> None:
    schema = Folder(Path.cwd()).ok("schema").json
    assert schema["$schema"]
    assert Folder(Path.cwd()).ok("schema", "-o", "json").json == {"version": 1, **schema}
