"""Manifests made to harm: any value in them replaced, with every hash above it kept right. Commands print or refuse; none crashes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densemoe.runtime import cli
from densemoe.runtime.canonical import canonical
from densemoe.runtime.manifest import Index, IndexEntry

KEY = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
#: Values that a reader may trip over: of every JSON type, at the edges of what is allowed, and text that would move a terminal's cursor.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400, 1e308, 0.5]),
    st.sampled_from(["", "../../etc/passwd", "/etc/passwd", "\x1b[2J\x1b]0;x\x07", "a" * 5000, "\x9b2J\u202e", "9**9"]),
    st.sampled_from([[], {}, [[]], [{}], {"": None}, [1, 2, 3], {"kind": []}, [{"kind": "emulated", "counters": 1, "worst": {}}]]),
)
COMMANDS = (
    ["list"],
    ["list", "--json"],
    ["show", KEY],
    ["show", KEY, "--json"],
    ["verify"],
    ["doctor"],
    ["check", "--device-profile", "h200"],
    ["coverage", "qwen3-30b-a3b", "--m", "4"],
    ["explain", "fc1", "--m", "4", "--experts", "8", "--hidden", "256", "--intermediate", "128"],
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document, as the names and positions that lead there."""
    yield path
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from places(inner, (*path, name))
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from places(inner, (*path, position))


@pytest.fixture(scope="module")
def root(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(artifacts, tmp_path_factory.mktemp("hostile") / "root"))


@pytest.fixture(scope="module")
def document(artifacts: Path) -> dict[str, Any]:
    """A manifest of one variant, with a verification record."""
    found: dict[str, Any] = json.loads((artifacts / "sm_90a" / "manifest.json").read_text())
    found["variants"] = {KEY: found["variants"][KEY]}
    counters = {"case": "x", "bytes": {"global load": 1}, "products": {"mma.sync": 1}, "waits": {"mbarrier": 1}, "instructions": 1, "needed_bytes": 1}
    found["variants"][KEY]["verification"] = [{"kind": "emulated", "cases": 1, "worst": 0.5, "list": "0" * 16, "counters": counters}]
    recipe = found["variants"][KEY]["recipe"]
    found["recipes"] = {recipe: found["recipes"][recipe]}
    return found


def install(root: Path, document: dict[str, Any]) -> None:
    data = canonical(document)
    (root / "sm_90a" / "manifest.json").write_bytes(data)
    variants = document.get("variants")
    entry = IndexEntry.of("sm_90a", data, len(variants) if isinstance(variants, dict) else 0)
    (root / "index.json").write_bytes(Index({"sm_90a": entry}).to_bytes())


def replaced(document: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(document)
    inner: Any = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.data())
def test_no_value_in_a_manifest_makes_a_command_crash(
    root: Path, artifacts: Path, document: dict[str, Any], chosen: st.DataObject, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [path for path in places(document) if path]
    # half of the time an entry's own members, of which a manifest has fewer than of its recipes'
    own = [path for path in where if path[0] != "recipes"]
    path = chosen.draw(st.one_of(st.sampled_from(where), st.sampled_from(own)))
    install(root, replaced(document, path, chosen.draw(VALUES)))
    for command in (*([*each, "--artifacts", str(root)] for each in COMMANDS), ["diff", str(artifacts), str(root)]):
        assert cli.main(command) in (0, 1, 2, 3), (path, command)
        said = capsys.readouterr()
        assert "\x1b" not in said.out + said.err, (path, command)
