"""The 128x4 tiled scale order against its formula, and the up/gate interleave (contract sections 2 and 3)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densemoe.runtime import layout
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import Problem


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (127, 8), (128, 4), (129, 12), (300, 16)])
def test_tiled_scales_follow_the_formula_both_ways(rows: int, columns: int) -> None:
    scales = np.random.default_rng(rows).integers(1, 256, (rows, columns), dtype=np.uint8)
    tiled = layout.tile_scales(scales)
    assert tiled.shape == (-(-rows // 128) * 128, columns)
    flat, seen = tiled.reshape(-1), set()
    for row in range(rows):
        for column in range(columns):
            offset = layout.scale_offset(row, column, columns)
            assert flat[offset] == scales[row, column]
            seen.add(offset)
    assert len(seen) == rows * columns
    assert not np.delete(flat, sorted(seen)).any(), "padding scale bytes are 0"
    np.testing.assert_array_equal(layout.untile_scales(tiled, rows), scales)


def test_offsets_fill_whole_tiles_exactly_once() -> None:
    offsets = layout.scale_offsets(np.arange(256)[:, None], np.arange(12)[None, :], 12)
    np.testing.assert_array_equal(np.sort(offsets.reshape(-1)), np.arange(256 * 12))
    for row, column in ((0, 0), (31, 3), (32, 4), (127, 11), (128, 0), (255, 7)):
        assert offsets[row, column] == layout.scale_offset(row, column, 12)


def test_offset_of_the_contract_written_out() -> None:
    assert layout.scale_offset(1, 0, 8) == 16  # the next row of a quarter
    assert layout.scale_offset(32, 0, 8) == 4  # the next quarter
    assert layout.scale_offset(0, 4, 8) == 512  # the next column tile
    assert layout.scale_offset(128, 0, 8) == 1024  # the next row tile


def test_offsets_beyond_four_gigabytes() -> None:
    assert int(layout.scale_offsets(2**24, 0, 1024)) == 2**24 // 128 * 512 * 256


@given(st.integers(0, 400), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_tiling_round_trips(rows: int, tiles: int, seed: int) -> None:
    scales = np.random.default_rng(seed).integers(0, 256, (rows, 4 * tiles), dtype=np.uint8)
    np.testing.assert_array_equal(layout.untile_scales(layout.tile_scales(scales), rows), scales)


def test_interleave_puts_64_up_rows_before_their_64_gate_rows() -> None:
    up, gate = np.arange(192), 1000 + np.arange(192)
    rows = layout.interleave_up_gate(up[:, None], gate[:, None])[:, 0]
    expected = np.concatenate([np.concatenate([up[i : i + 64], gate[i : i + 64]]) for i in (0, 64, 128)])
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(rows[layout.up_row(np.arange(192))], up)
    np.testing.assert_array_equal(rows[layout.gate_row(np.arange(192))], gate)
    back = layout.deinterleave_up_gate(rows[:, None])
    np.testing.assert_array_equal(back[0][:, 0], up)
    np.testing.assert_array_equal(back[1][:, 0], gate)


def test_weight_shapes_are_those_of_the_contract() -> None:
    assert layout.weight_shapes("fc1", 8, 512, 704) == {"b.codes": (8, 1408, 256), "b.scales": (8 * 1408, 32)}
    assert layout.weight_shapes("fc2", 8, 192, 704) == {"b.codes": (192, 8 * 352), "b.scales": (256, 8 * 44)}
    for op in ("fc1", "fc2"):  # the activations' scales have as many columns as the weights'
        problem = Problem(op, 3, 8, 192, 704, "nvfp4", "bf16")
        assert problem.tensors()["a.scales"].shape == (128, layout.weight_shapes(op, 8, 192, 704)["b.scales"][1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layout.tile_scales(np.zeros((3, 6), np.uint8)), "multiple of 4"),
        (lambda: layout.tile_scales(np.zeros((3, 4), np.int8)), "uint8"),
        (lambda: layout.tile_scales(np.zeros(4, np.uint8)), "two dimensions"),
        (lambda: layout.untile_scales(np.zeros((128, 4), np.uint8), 129), r"\[256, K/16\]"),
        (lambda: layout.untile_scales(np.zeros((100, 4), np.uint8), 100), r"\[128, K/16\]"),
        (lambda: layout.interleave_up_gate(np.zeros((96, 2)), np.zeros((96, 2))), "multiple of 128"),
        (lambda: layout.interleave_up_gate(np.zeros((64, 2)), np.zeros((128, 2))), "must agree"),
        (lambda: layout.deinterleave_up_gate(np.zeros((192, 2))), "multiple of 128"),
        (lambda: layout.weight_shapes("fc3", 1, 64, 64), "fc1 or fc2"),
        (lambda: layout.weight_shapes("fc1", 1, 96, 64), "hidden=96"),
        (lambda: layout.weight_shapes("fc1", 0, 64, 64), "experts=0"),
    ],
)
def test_wrong_shapes_are_refused_with_what_is_allowed(call: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        call()  # type: ignore[operator]
