"""``sm100-interchange/1``: codes and tiled scales of the contract in one buffer, checked."""

from __future__ import annotations

import numpy as np
import pytest

from densemoe.runtime import packing
from densemoe.runtime.errors import ProblemError, RecipeError
from densemoe.runtime.layout import scale_offset, tile_scales, weight_shapes
from densemoe.runtime.plan import packed_weight_bytes, weight_parts
from densemoe.runtime.problem import Problem

SHAPES = [("fc1", 3, 192, 64), ("fc1", 1, 64, 128), ("fc2", 3, 192, 256), ("fc2", 2, 128, 64)]


def weights(op: str, experts: int, hidden: int, intermediate: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = weight_shapes(op, experts, hidden, intermediate)
    rows = hidden if op == "fc2" else experts * 2 * intermediate
    scales = rng.integers(0, 0x7F, (rows, shapes["b.scales"][1]), dtype=np.uint8)
    return rng.integers(0, 256, shapes["b.codes"], dtype=np.uint8), tile_scales(scales)


@pytest.mark.parametrize(("op", "experts", "hidden", "intermediate"), SHAPES)
def test_the_parts_are_what_was_packed(op: str, experts: int, hidden: int, intermediate: int) -> None:
    codes, scales = weights(op, experts, hidden, intermediate)
    packed = packing.pack_interchange(op, codes, scales, experts)
    assert packed.size == packing.interchange_bytes(op, experts, hidden, intermediate)
    again = packing.interchange_parts(op, packed, experts, hidden, intermediate)
    assert np.array_equal(again[0], codes)
    assert np.array_equal(again[1], scales)


@pytest.mark.parametrize(("op", "experts", "hidden", "intermediate"), SHAPES)
def test_a_plan_expects_the_same_bytes_and_finds_the_parts(op: str, experts: int, hidden: int, intermediate: int) -> None:
    problem = Problem(op, 5, experts, hidden, intermediate, "nvfp4", "bf16")
    assert packed_weight_bytes(packing.INTERCHANGE_LAYOUT, problem) == packing.interchange_bytes(op, experts, hidden, intermediate)
    parts = weight_parts(packing.INTERCHANGE_LAYOUT, problem)
    assert parts == {"b": 0, "b.codes": 0, "b.scales": int(np.prod(weight_shapes(op, experts, hidden, intermediate)["b.codes"]))}
    assert parts["b.scales"] % 128 == 0
    with pytest.raises(RecipeError, match="not known"):
        weight_parts("sm100-interchange/2", problem)


def test_padding_rows_become_zero_and_others_stay() -> None:
    codes, scales = weights("fc2", 1, 64, 64)
    dirty = scales.copy()
    dirty.reshape(-1)[scale_offset(100, 2, 4)] = 0xFF
    packed = packing.pack_interchange("fc2", codes, dirty, 1)
    assert np.array_equal(packing.interchange_parts("fc2", packed, 1, 64, 64)[1], scales)


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xFF])
@pytest.mark.parametrize(("op", "row", "column"), [("fc1", 300, 11), ("fc2", 191, 47)])
def test_a_refused_scale_is_named_by_its_place_and_nothing_is_written(op: str, row: int, column: int, byte: int) -> None:
    codes, scales = weights(op, 3, 192, 64 if op == "fc1" else 256)
    scales.reshape(-1)[scale_offset(row, column, scales.shape[1])] = byte
    out = np.zeros(packing.interchange_bytes(op, 3, 192, 64 if op == "fc1" else 256), dtype=np.uint8)
    with pytest.raises(ProblemError, match=rf"0x{byte:02X} at row {row}, K group {column}"):
        packing.pack_interchange(op, codes, scales, 3, out)
    assert not out.any()


def test_weights_filled_in_place_are_checked_without_a_copy() -> None:
    codes, scales = weights("fc1", 2, 128, 64)
    out = np.empty(packing.interchange_bytes("fc1", 2, 128, 64), dtype=np.uint8)
    own_codes, own_scales = packing.interchange_parts("fc1", out, 2, 128, 64)
    own_codes[...], own_scales[...] = codes, scales
    assert packing.pack_interchange("fc1", own_codes, own_scales, 2, out) is out
    assert np.array_equal(out, packing.pack_interchange("fc1", codes, scales, 2))


def test_what_does_not_fit_is_refused() -> None:
    codes, scales = weights("fc1", 2, 128, 64)
    with pytest.raises(ProblemError, match="hold 2 experts, 3 are given"):
        packing.pack_interchange("fc1", codes, scales, 3)
    with pytest.raises(ProblemError, match="use fc1 or fc2"):
        packing.pack_interchange("fc3", codes, scales, 2)
    with pytest.raises(ProblemError, match="out has shape"):
        packing.pack_interchange("fc1", codes, scales, 2, np.empty(5, dtype=np.uint8))
