"""The JSON Schemas are schemas, and what is shipped follows them; what the readers refuse of hostile documents is one kind of error."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from densemoe.runtime.errors import ManifestError, RecipeError
from densemoe.runtime.lock import Lock
from densemoe.runtime.manifest import Index, Manifest
from densemoe.runtime.variant import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2] / "artifacts"
DOCUMENTS = {
    "lock": [ROOT / "manifest.lock"],
    "device": sorted((ROOT / "devices").glob("*.json")),
    "selection": sorted((ROOT / "selection").glob("*.json")),
    "size_budget": [ROOT / "size_budget.json"],
}


@pytest.mark.parametrize("path", sorted((ROOT / "schema").glob("*.json")), ids=lambda path: path.stem)
def test_every_schema_is_one(path: Path) -> None:
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_what_is_shipped_follows_its_schema(name: str) -> None:
    schema = json.loads((ROOT / "schema" / f"{name}.schema.json").read_text())
    assert DOCUMENTS[name]
    for path in DOCUMENTS[name]:
        jsonschema.validate(json.loads(path.read_bytes()), schema)


@pytest.mark.parametrize(("name", "file"), [("index", "index.json"), ("manifest", "sm_90a/manifest.json")])
def test_what_is_built_follows_its_schema(artifacts: Path, name: str, file: str) -> None:
    schema = json.loads((ROOT / "schema" / f"{name}.schema.json").read_text())
    document = json.loads((artifacts / file).read_text())
    jsonschema.validate(document, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "schema": 2}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "more": 1}, schema)


@pytest.mark.parametrize("name", ["index", "manifest"])
def test_schemas_name_every_architecture(name: str) -> None:
    """docs/release.md, "Adding an architecture": a row in variant.py, and its name here."""
    text = (ROOT / "schema" / f"{name}.schema.json").read_text()
    assert [arch for arch in ARCHITECTURES if f'"{arch}"' not in text] == []


KINDS = ("flip", "drop", "insert", "double")
EDITS = st.lists(st.tuples(st.integers(0, 2**32), st.sampled_from(KINDS), st.binary(min_size=1, max_size=8)), max_size=4)


def damaged(data: bytes, edits: list[tuple[int, str, bytes]]) -> bytes:
    for place, kind, text in edits:
        at = place % (len(data) + 1)
        if kind == "flip":
            data = data[:at] + text + data[at + len(text) :]
        elif kind == "drop":
            data = data[:at] + data[at + len(text) :]
        elif kind == "insert":
            data = data[:at] + text + data[at:]
        else:
            data = data[:at] + data[max(0, at - 200) :]
    return data


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EDITS)
def test_damaged_bytes_are_read_or_refused(artifacts: Path, edits: list[tuple[int, str, bytes]]) -> None:
    """Manifest, as a cold start and as a full check read it, and index: whatever happened to their bytes, one kind of error and no other."""
    data = damaged((artifacts / "sm_90a" / "manifest.json").read_bytes(), edits)
    for full in (True, False):
        with contextlib.suppress(ManifestError, RecipeError):
            found = Manifest.from_bytes(data, "m", full=full)
            for entry in found.variants.values():
                assert "/" not in entry.file
                entry.recipe.check()
    with contextlib.suppress(ManifestError):
        for each in Index.from_bytes(damaged((artifacts / "index.json").read_bytes(), edits), "i").sets.values():
            assert ".." not in each.manifest


@settings(max_examples=60, deadline=None)
@given(EDITS)
def test_a_damaged_lock_is_read_or_refused(edits: list[tuple[int, str, bytes]]) -> None:
    with contextlib.suppress(ManifestError):
        Lock.from_bytes(damaged((ROOT / "manifest.lock").read_bytes(), edits), "lock")
