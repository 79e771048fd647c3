"""What a worker imports: a topology that is handed over needs no YAML, no templates and no JSON Schema library."""

from __future__ import annotations

import subprocess
import sys


def test_restoring_a_topology_imports_no_loader() -> None:
    code = "import sys, orchestrator.topology as t; t.restore; "
    code += "print(sorted({'yaml', 'jinja2', 'jsonschema'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import orchestrator.topology as t; t.lod"], capture_output=True, text=True
    )
    assert "AttributeError" in run.stderr
    assert run.returncode == 1
