"""Manifests come from outside: every fault in one is found and named, and equal sets have equal bytes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densemoe.runtime.canonical import Lines, canonical, parse_line, split_lines, write_atomically
from densemoe.runtime.errors import ManifestError
from densemoe.runtime.manifest import LARGEST_INDEX, LARGEST_MANIFEST, Index, Manifest

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


KEY = "fc1.sm90a.t8x64.c1x1.bf16-bf16"  # part of every profile
FAULTS = [
    (("schema",), 2, "schema 2"),
    (("schema",), "1", "int belongs"),
    (("arch",), "sm_80", "not known"),
    (("variants",), [], "dict belongs"),
    (("variants", "../../evil"), {}, "does not parse"),
    (("variants", KEY, "file"), "../x.cubin", "belongs to this key"),
    (("variants", KEY, "file"), "/etc/passwd", "belongs to this key"),
    (("variants", KEY, "symbol"), "other", "belongs to this key"),
    (("variants", KEY, "sha256"), "A" * 64, "hexadecimal"),
    (("variants", KEY, "size"), -1, "not allowed"),
    (("variants", KEY, "size"), 1 << 40, "not allowed"),
    (("variants", KEY, "size"), True, "int belongs"),
    (("variants", KEY, "recipe"), "none", "an id of recipes"),
    (("variants", KEY, "parameters"), [[0, 8]], "are not those of recipe"),
    (("variants", KEY, "parameters"), "x", "list belongs"),
    (("variants", KEY, "arch_kind"), "family", "exact"),
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
    line = next(line for line in data.split(b"\n") if line.startswith(b'"fc1.'))
    with pytest.raises(ManifestError, match="stands twice"):
        Manifest.from_bytes(data.replace(line, line + b"\n" + line), "m")
    with pytest.raises(ManifestError, match="'arch' stands twice"):
        Manifest.from_bytes(b'{"arch": "sm_90a", ' + data.lstrip(b"{\n"), "m")


def test_a_manifest_that_is_not_canonical_is_refused(data: bytes) -> None:
    """A cold start reads a manifest line by line, so its form is part of what `verify` and a build check."""
    with pytest.raises(ManifestError, match="canonical"):
        Manifest.from_bytes(json.dumps(json.loads(data)).encode(), "m")
    for changed in (data[:-1], data[:-30], b" " + data, data.replace(b"},\n", b"}\n", 1), b"", b"{\n}"):
        with pytest.raises(ManifestError, match=r"canonical|recipes is missing"):
            Manifest.from_bytes(changed, "m", full=False)


def test_a_cold_start_parses_only_the_entries_that_it_uses(data: bytes) -> None:
    other = next(line for line in data.split(b"\n") if line.startswith(b'"fc2.'))
    damaged = data.replace(other, other.replace(b'"file"', b"'file'"))
    manifest = Manifest.from_bytes(damaged, "m", full=False)
    assert manifest.variants[KEY].to_json("r") == Manifest.from_bytes(data, "m").variants[KEY].to_json("r")
    with pytest.raises(ManifestError, match=r"variants\.fc2.*not JSON"):
        manifest.check()


NAMES = st.text(alphabet="ab_.-0 ,{}[]'", max_size=8)  # a manifest's names need no escapes, and have none
TEXTS = st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=8)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(NAMES, VALUES, min_size=1))
def test_the_line_reader_reads_what_a_json_reader_reads(document: dict[str, Any]) -> None:
    objects = [name for name, value in document.items() if isinstance(value, dict) and value]
    lazy = objects if objects and max(objects) == max(document) else []
    members = split_lines(canonical(document), "m", lazy)
    found = {name: {key: parse_line(value[key], key) for key in value} if isinstance(value, Lines) else value for name, value in members.items()}
    assert all(isinstance(members[name], Lines) and len(members[name]) == len(document[name]) for name in lazy)
    assert found == document


def test_an_oversized_manifest_is_not_parsed() -> None:
    with pytest.raises(ManifestError, match="at most"):
        Manifest.from_bytes(b" " * (LARGEST_MANIFEST + 1), "m")
    with pytest.raises(ManifestError, match="at most 1048576 are read"):
        Index.from_bytes(b" " * (LARGEST_INDEX + 1), "i")


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


@pytest.mark.parametrize("members", [1, 60, 700])
def test_each_member_of_an_unparsed_object_is_found_in_order_or_not(members: int) -> None:
    document = {f"k{i * 7919 % 1000}{'.w' * (i % 3)}": {"pad": "p" * (i * 37 % 400), "v": i} for i in range(members)}
    ordered = canonical({"variants": document})
    lines = ordered.split(b"\n")
    body = [line.rstrip(b",") for line in lines[2:-3]]
    shuffled = b"\n".join([*lines[:2], b",\n".join(body[::-1]), *lines[-3:]])
    for data in (ordered, shuffled):
        found = split_lines(data, "x", lazy=("variants",))["variants"]
        assert {name: json.loads(bytes(found[name])) for name in document} == document
        for absent in ("k", "zz", 'k1"', "k0.w.w.w"):
            with pytest.raises(KeyError):
                found[absent]
