"""build_matrix.yaml: what it expands to, and where and how a wrong one is reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from densemoe.compile import matrix
from densemoe.runtime.errors import MatrixError

GOOD = """\
schema: 1
entries:
  - kernel: sm90_fc1
    op: fc1
    arch: [sm_90a]
    tile: [8x64, 16x64]
    cluster: [1x1]
    a_dtype: [bf16]
    b_dtype: [nvfp4]
    c_dtype: [bf16, f32]
profiles:
  full: {variants: 4}
  quick:
    variants: 1
    select:
      - {tile: 8x64, c_dtype: bf16}
"""


def load(tmp_path: Path, text: str) -> matrix.Matrix:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return matrix.load(path)


def test_the_shipped_matrix_gives_what_it_states() -> None:
    shipped = matrix.load()
    assert {name: len(planned) for name, planned in shipped.profiles.items()} == {"full": 219, "quick": 11}


def test_expansion_is_in_key_order_and_does_not_depend_on_axis_order(tmp_path: Path) -> None:
    keys = [each.variant.key for each in load(tmp_path, GOOD).profile("full")]
    assert keys == sorted(keys)
    other = GOOD.replace("[8x64, 16x64]", "[16x64, 8x64]").replace("[bf16, f32]", "[f32, bf16]")
    assert [each.variant.key for each in load(tmp_path, other).profile("full")] == keys


def test_exclude_and_include_take_combinations_out(tmp_path: Path) -> None:
    rule = "    c_dtype: [bf16, f32]\n    exclude:\n      - {tile: 8x64, c_dtype: f32}\n"
    text = GOOD.replace("    c_dtype: [bf16, f32]\n", rule).replace("variants: 4", "variants: 3")
    assert "fc1.sm90a.t8x64.c1x1.bf16-f32" not in {each.variant.key for each in load(tmp_path, text).profile("full")}
    rule = "    c_dtype: [bf16, f32]\n    include:\n      - {tile: 8x64}\n"
    text = GOOD.replace("    c_dtype: [bf16, f32]\n", rule).replace("variants: 4", "variants: 2")
    assert {each.variant.tile_m for each in load(tmp_path, text).profile("full")} == {8}


def test_a_spill_allowance_needs_a_reason(tmp_path: Path) -> None:
    key = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
    extra = f"    spills:\n      {key}: {{stack_bytes: 16, reason: measured faster}}\n"
    allowed = {each.variant.key: each.allowance for each in load(tmp_path, GOOD.replace("profiles:", extra + "profiles:")).profile("full")}
    assert allowed[key].stack_bytes == 16
    with pytest.raises(MatrixError, match="needs its reason"):
        load(tmp_path, GOOD.replace("profiles:", extra.replace("measured faster", "''") + "profiles:"))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema: 1", "schema: 2", r"m\.yaml:1:9: schema 2"),
        ("    op: fc1", "    opp: fc1", r":4:5: unknown key 'opp'.*did you mean 'op'"),
        ("op: fc1", "op: fc9", r":4:9: op='fc9': use one of fc1, fc2"),
        ("sm90_fc1", "sm90_fc9", r":3:13: kernel 'sm90_fc9': use one of"),
        ("[sm_90a]", "[sm_90]", r":5:12: arch='sm_90'.*sm_90a"),
        ("[8x64, 16x64]", "[8x64, 96]", r":6:18: tile='96': write two positive integers"),
        ("[8x64, 16x64]", "[8x64, 8x64]", r":6:18: tile='8x64' stands twice"),
        ("[8x64, 16x64]", "[8x64, 24x64]", r":6:18: tile 24x64.*8x64, 16x64, 32x64"),
        ("[8x64, 16x64]", "[]", r":6:11: tile has no value"),
        ("[1x1]", "[1x2]", r":7:15: cluster.*no clusters"),
        ("[nvfp4]", "[mxfp4]", r":9:15: b_dtype='mxfp4': use one of nvfp4"),
        ("[bf16, f32]", "[bf16, int8]", r":10:21: c_dtype='int8'"),
        ("variants: 4", "variants: 5", r":12:20: profile 'full' states 5 variants and gives 4"),
        ("variants: 4", "variants: four", r"no integer"),
        ("tile: 8x64, c_dtype: bf16", "tile: 128x64", r":16:9: this rule selects no variant"),
        ("profiles:\n", "profiles:\n  full: {variants: 4}\n", r"profile 'full' stands twice"),
        ("    c_dtype: [bf16, f32]\n", "", r"'c_dtype' is missing"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    exclude: [{op: fc1}]", r"unknown key 'op'"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    exclude: [{tile: [8x64, 16x64]}]", r"gives no variant"),
        ("entries:", "entries: [", r"not YAML"),
        ("schema: 1\n", "schema: 1\nschema: 1\n", r":2:1: key 'schema' stands twice"),
        ("op: fc1", "op: [fc1, fc2]", r":4:9: op=fc1, fc2: an entry or a rule has one op"),
        ("schema: 1", "schema: \x07", r":1:9: not YAML: character '\\x07' may not stand in it"),
        ("schema: 1", "schema: " + "[" * 5000, r"nested too deeply"),
        ("schema: 1", "schema: 1\n---\nschema: 1", r":2:1: not YAML: but found another document"),
        ("[1x1]", "[0x1]", r":7:15: cluster='0x1': write two positive integers"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    options: {sub: [1, 1]}", r":11:24: sub=1 stands twice"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    options: {sub: [1], sub: [2]}", r":11:25: option 'sub' stands twice"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    options: {sub: []}", r":11:20: sub has no value"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    options: {sub: [-1]}", r":11:21: '-1' is no integer"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    options: {sub: [3]}", r":11:14: options \['sub'\].*this kernel has rounded: 1"),
        ("c_dtype: [bf16, f32]", "c_dtype: [bf16, f32]\n    exclude: [{tile: 32x64}]", r":11:22: tile='32x64': use one of 8x64, 16x64"),
        ("profiles:", "    spills: {fc1.x: {stack_bytes: 4, reason: why}}\nprofiles:", r":11:13: spills names fc1\.x, which this"),
        ("profiles:", "    spills: {fc1.x: {stack_bytes: -4, reason: why}}\nprofiles:", r":11:35: '-4' is no integer"),
        ("{variants: 4}", "4", r":12:9: a mapping belongs here, with the keys variants, select"),
    ],
)
def test_each_fault_is_reported_where_it_stands(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(MatrixError, match=said):
        load(tmp_path, GOOD.replace(old, new, 1))


def test_text_that_is_not_utf_8_is_refused_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_bytes(GOOD.replace("op: fc1", "op: f\xe9").encode("latin-1"))
    with pytest.raises(MatrixError, match=r"m\.yaml:4:10: byte 0xe9: not UTF-8"):
        matrix.load(path)


def test_a_variant_in_two_entries_is_refused(tmp_path: Path) -> None:
    entry = GOOD[GOOD.index("  - kernel") : GOOD.index("profiles:")]
    with pytest.raises(MatrixError, match="already in the matrix"):
        load(tmp_path, GOOD.replace("profiles:", entry + "profiles:"))


def test_a_missing_file_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="cannot be read"):
        matrix.load(tmp_path / "none.yaml")
    with pytest.raises(MatrixError, match="is empty"):
        load(tmp_path, "")


def test_an_unknown_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="did you mean 'quick'"):
        load(tmp_path, GOOD).profile("quik")
