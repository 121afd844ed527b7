"""The examples run on a CPU, and the tutorial prints what its page shows."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(each.stem for each in (ROOT / "examples").glob("*.py") if each.stem not in ("compare", "tutorial"))


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    capsys.readouterr()
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_runs(family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(family, monkeypatch, capsys)
    assert re.search(r"^replaced: model\.layers\.", out, re.M)
    (error,) = re.findall(r"^logits: rms error (\d+\.\d)%", out, re.M)
    assert 0 < float(error) < 10
    assert len(re.findall(r"\d+", out.split("generated:")[1])) == 8
    assert f"examples/{family}.py" in (ROOT / "docs" / "torch.md").read_text()


def test_the_tutorial_prints_what_its_page_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "torch_tutorial.md").read_text()
    shown = "".join(re.findall(r"```output\n(.*?)```", page, re.S))
    printed = "".join(line for line in run("tutorial", monkeypatch, capsys).splitlines(keepends=True) if not line.startswith("## "))
    assert shown == printed
    code = (ROOT / "examples" / "tutorial.py").read_text()
    for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
        for line in snippet.strip().splitlines():
            assert line.strip() in code, line
