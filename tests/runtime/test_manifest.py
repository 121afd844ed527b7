"""Manifests come from outside: every fault in one is found and named, and equal sets have equal bytes."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densemoe.runtime.errors import ManifestError
from densemoe.runtime.manifest import LARGEST_MANIFEST, Manifest, write_atomically

SCHEMA = Path(__file__).resolve().parents[2] / "artifacts" / "schema" / "manifest.schema.json"


@pytest.fixture(scope="module")
def data(artifacts: Path) -> bytes:
    return (artifacts / "sm_90a" / "manifest.json").read_bytes()


def edited(data: bytes, *path: Any, value: Any = None, drop: bool = False) -> bytes:
    document = json.loads(data)
    at = document
    for step in path[:-1]:
        at = at[step]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(document).encode()


def test_reading_and_writing_gives_the_same_bytes(data: bytes) -> None:
    assert Manifest.from_bytes(data, "m").to_bytes() == data


def test_the_schema_accepts_what_is_built(data: bytes) -> None:
    jsonschema.validate(json.loads(data), json.loads(SCHEMA.read_text()))


FAULTS = [
    (("schema",), 2, "schema 2"),
    (("schema",), "1", "int belongs"),
    (("arch",), "sm_80", "not known"),
    (("variants",), {}, "list belongs"),
    (("variants", 0, "key"), "../../evil", "does not parse"),
    (("variants", 0, "file"), "../x.cubin", "belongs to this key"),
    (("variants", 0, "file"), "/etc/passwd", "belongs to this key"),
    (("variants", 0, "symbol"), "other", "belongs to this key"),
    (("variants", 0, "sha256"), "A" * 64, "hexadecimal"),
    (("variants", 0, "size"), -1, "not allowed"),
    (("variants", 0, "size"), 1 << 40, "not allowed"),
    (("variants", 0, "size"), True, "int belongs"),
    (("variants", 0, "recipe"), "none", "an id of recipes"),
    (("variants", 0, "parameters"), [[0, 8]], "are not those of recipe"),
    (("variants", 0, "parameters"), "x", "list belongs"),
    (("variants", 0, "arch_kind"), "family", "exact"),
    (("minimum_driver",), "13000", "int belongs"),
    (("toolchain", "distributions", 0, "sha256"), "", "hexadecimal"),
    (("builder", "dirty"), 0, "bool belongs"),
]


@pytest.mark.parametrize(("path", "value", "said"), FAULTS)
def test_each_fault_is_named(data: bytes, path: tuple[Any, ...], value: Any, said: str) -> None:
    with pytest.raises(ManifestError, match=said):
        Manifest.from_bytes(edited(data, *path, value=value), "m")


def test_a_recipe_cannot_run_code(data: bytes) -> None:
    recipe = next(iter(json.loads(data)["recipes"]))
    with pytest.raises(ManifestError, match="expression"):
        Manifest.from_bytes(edited(data, "recipes", recipe, "grid", value=["__import__('os')", 1, 1]), "m")


def test_names_and_keys_that_stand_twice_are_refused(data: bytes) -> None:
    document = json.loads(data)
    document["variants"].append(copy.deepcopy(document["variants"][0]))
    with pytest.raises(ManifestError, match="stands twice"):
        Manifest.from_bytes(json.dumps(document).encode(), "m")
    with pytest.raises(ManifestError, match="'arch' stands twice"):
        Manifest.from_bytes(b'{"arch": "sm_90a", ' + data.lstrip(b"{\n"), "m")


def test_an_oversized_manifest_is_not_parsed() -> None:
    with pytest.raises(ManifestError, match="at most"):
        Manifest.from_bytes(b" " * (LARGEST_MANIFEST + 1), "m")


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        for key in value:
            found += _paths(value[key], (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            found += _paths(item, (*path, index))
    return found


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(st.data())
def test_any_edit_is_read_or_refused_with_a_manifest_error(data: bytes, chosen: st.DataObject) -> None:
    """Whatever stands in a manifest, reading it raises nothing but ManifestError."""
    paths = _paths(json.loads(data))
    path = chosen.draw(st.sampled_from(paths))
    drop = chosen.draw(st.booleans())
    changed = edited(data, *path, value=chosen.draw(JSON), drop=drop)
    with contextlib.suppress(ManifestError):
        Manifest.from_bytes(changed, "m")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.from_bytes(data, "m")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
