"""docs/defects.md: every defect of the contract's section 10 has a test, and every test that is named exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from densemoe.runtime import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "defects.md").read_text()
DEFECTS = 21  # of the contract's section 10


def rows() -> list[list[str]]:
    """The table's cells."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][2:]


def test_every_defect_has_a_test_that_exists() -> None:
    found = rows()
    assert len(found) == DEFECTS
    for defect, here, tests in found:
        assert here
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", tests)
        assert named, defect
        for file, name in named:
            functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
            assert name in functions, f"{file} has no {name}"


@pytest.mark.parametrize("missing", ["--m", "--experts", "--hidden", "--intermediate"])
def test_shapes_have_no_defaults_that_could_disagree(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--m": "8", "--experts": "4", "--hidden": "256", "--intermediate": "256"}
    arguments = [text for name, value in given.items() if name != missing for text in (name, value)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "fc1", *arguments])
    assert ended.value.code == 2
    assert f"the following arguments are required: {missing}" in capsys.readouterr().err


def test_a_test_that_leaks_a_variable_fails(tmp_path: Path) -> None:
    """The fixture of tests/conftest.py, on a test that leaks and on one that does not."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_leak.py").write_text(
        "import os\n\n\ndef test_leaks():\n    os.environ['DENSEMOE_ARTIFACTS'] = 'x'\n\n\n"
        "def test_restores(monkeypatch):\n    monkeypatch.setenv('DENSEMOE_ARTIFACTS', 'y')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DENSEMOE_")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert "2 passed, 1 error" in done.stdout, done.stdout
    assert "ERROR test_leak.py::test_leaks" in done.stdout
    assert "leaks environment variables" in done.stdout
