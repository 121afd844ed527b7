"""Layouts of the contract's sections 2 and 3: the 128x4 tiled scale order, the up/gate interleave, weight shapes. numpy only."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import k64_width

__all__ = [
    "SCALE_TILE_BYTES",
    "deinterleave_up_gate",
    "from_k64_order",
    "gate_row",
    "interleave_up_gate",
    "k64_order",
    "k64_positions",
    "k64_width",
    "padded_rows",
    "scale_offset",
    "scale_offsets",
    "tile_scales",
    "untile_scales",
    "up_row",
    "weight_shapes",
]

Bytes = npt.NDArray[np.uint8]

TILE_ROWS: Final = 128
TILE_COLUMNS: Final = 4
SCALE_TILE_BYTES: Final = TILE_ROWS * TILE_COLUMNS
INTERLEAVE: Final = 64  # consecutive up rows, then as many gate rows
GROUP: Final = 16  # consecutive k that share one e4m3 scale


def padded_rows(rows: int) -> int:
    """``rows`` rounded up to whole scale tiles of 128."""
    return -(-rows // TILE_ROWS) * TILE_ROWS


def scale_offset(row: int, column: int, columns: int) -> int:
    """Byte offset of scale (row, column) of a tensor with ``columns`` scale columns: the formula of contract section 2."""
    return (
        (row % 32) * 16
        + ((row % 128) // 32) * 4
        + (column % 4)
        + (column // 4) * 512
        + (row // 128) * 512 * (columns // 4)
    )


def scale_offsets(rows: npt.ArrayLike, columns: npt.ArrayLike, total_columns: int) -> npt.NDArray[np.int64]:
    """``scale_offset`` of arrays of rows and scale columns, broadcast against one another: int64."""
    row, column = np.asarray(rows, dtype=np.int64), np.asarray(columns, dtype=np.int64)
    inside = (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
    return inside + (column // 4 + row // 128 * (total_columns // 4)) * SCALE_TILE_BYTES


def k64_order(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """16-bit activations ``[rows, K]``, K a multiple of 64, as ``[rows, ⌈K / 128⌉ · 128]`` in K 64 order, zeros behind K.

    Of each 64 elements of a row, 32 words of two, word ``4·w + t`` is logical word ``8·t + w`` (w < 8, t < 4). Sixteen bytes then hold one word of
    each of a quad's four lanes, which own 16 elements each (the order of packed weights, docs/weight_layouts.md): what WGMMA reads from shared memory
    as one row of a core matrix.
    """
    rows, k = values.shape
    padded = np.pad(values, ((0, 0), (0, k64_width(k) - k)))
    return np.ascontiguousarray(padded.reshape(rows, -1, 4, 8, 2).transpose(0, 1, 3, 2, 4)).reshape(rows, -1)


def k64_positions(k: int) -> npt.NDArray[np.int64]:
    """Where each of ``k`` columns stands in a row in K 64 order: int64 ``[k]``."""
    column = np.arange(k)
    lane, word = column % 64 // 16, column % 16 // 2
    return column // 64 * 64 + (word * 4 + lane) * 2 + column % 2


def from_k64_order(values: npt.NDArray[Any], k: int) -> npt.NDArray[Any]:
    """The inverse of ``k64_order``, of ``k`` columns."""
    return values[:, k64_positions(k)]


def _check_scales(name: str, scales: Any) -> None:
    if not isinstance(scales, np.ndarray) or scales.dtype != np.uint8 or scales.ndim != 2:
        given = f"{getattr(scales, 'dtype', type(scales).__name__)} {list(getattr(scales, 'shape', ()))}"
        raise ProblemError(f"{name} are {given}: use a numpy array of uint8 with two dimensions")
    if scales.shape[1] % TILE_COLUMNS:
        raise ProblemError(f"{name} have {scales.shape[1]} columns: use a multiple of 4 (K % 64 == 0, contract section 2)")


def tile_scales(scales: Bytes) -> Bytes:
    """Row-major scales ``[R, C]`` in tiled order, as ``[⌈R/128⌉·128, C]`` bytes; padding rows are 0.

    Raises:
        ProblemError: not uint8, not two-dimensional, or C is not a multiple of 4.
    """
    _check_scales("scales", scales)
    rows, columns = scales.shape
    padded = np.zeros((padded_rows(rows), columns), dtype=np.uint8)
    padded[:rows] = scales
    # [row tile, 4 row quarters, 32 rows, column tile, 4 columns] → [row tile, column tile, 32 rows, 4 row quarters, 4 columns]
    blocks = padded.reshape(-1, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocks).reshape(padded.shape)


def untile_scales(tiled: Bytes, rows: int) -> Bytes:
    """Row-major scales ``[rows, C]`` of tiled bytes ``[⌈rows/128⌉·128, C]``.

    Raises:
        ProblemError: not uint8, or the shape is not that of ``rows`` rows.
    """
    _check_scales("tiled scales", tiled)
    if tiled.shape[0] != padded_rows(rows):
        raise ProblemError(f"tiled scales {list(tiled.shape)} for {rows} rows: use [{padded_rows(rows)}, K/16], whole tiles of 128")
    columns = tiled.shape[1]
    blocks = np.ascontiguousarray(tiled).reshape(-1, columns // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocks).reshape(tiled.shape)[:rows]


def up_row(column: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Row of an expert's interleaved FC1 weights that gives ``up`` of its output column: (j // 64)·128 + j % 64 (contract section 3)."""
    j = np.asarray(column, dtype=np.int64)
    return j // INTERLEAVE * (2 * INTERLEAVE) + j % INTERLEAVE


def gate_row(column: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Row that gives ``gate`` of an output column: 64 below its up row."""
    return up_row(column) + INTERLEAVE


def _check_interleave(rows: int) -> None:
    if rows % (2 * INTERLEAVE):
        raise ProblemError(f"{rows} up and gate rows: use a multiple of {2 * INTERLEAVE} (I % 64 == 0, contract section 8)")


def interleave_up_gate(up: npt.NDArray[Any], gate: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows ``[2I, …]`` in groups of 64: up 0–63, gate 0–63, up 64–127, … (contract section 3) from w3 and w1, each ``[I, …]``.

    Raises:
        ProblemError: the shapes differ, or I is not a multiple of 64.
    """
    if up.shape != gate.shape:
        raise ProblemError(f"up has shape {list(up.shape)}, gate {list(gate.shape)}: they must agree")
    _check_interleave(2 * up.shape[0])
    parts = [array.reshape(-1, INTERLEAVE, *array.shape[1:]) for array in (up, gate)]
    return np.stack(parts, axis=1).reshape(2 * up.shape[0], *up.shape[1:])


def deinterleave_up_gate(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(up, gate), each ``[I, …]``, of interleaved rows ``[2I, …]``.

    Raises:
        ProblemError: the number of rows is not a multiple of 128.
    """
    _check_interleave(rows.shape[0])
    blocks = rows.reshape(-1, 2, INTERLEAVE, *rows.shape[1:])
    up, gate = (np.ascontiguousarray(blocks[:, part]).reshape(-1, *rows.shape[1:]) for part in (0, 1))
    return up, gate


def weight_shapes(op: str, experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the uint8 interchange tensors ``b.codes`` and ``b.scales`` (contract sections 3 and 4).

    The other tensors' shapes are ``Problem.tensors()``; a packed ``b`` has ``packing.packed_bytes``.

    Raises:
        ProblemError: an unknown op, or H or I is not a positive multiple of 64.
    """
    for name, value, unit in (("experts", experts, 1), ("hidden", hidden, 64), ("intermediate", intermediate, 64)):
        if value <= 0 or value % unit:
            raise ProblemError(f"{name}={value}: use a positive multiple of {unit} (contract section 8)")
    if op == "fc1":
        rows = 2 * intermediate
        return {"b.codes": (experts, rows, hidden // 2), "b.scales": (experts * rows, hidden // GROUP)}
    if op == "fc2":
        k = experts * intermediate
        return {"b.codes": (hidden, k // 2), "b.scales": (padded_rows(hidden), k // GROUP)}
    raise ProblemError(f"op={op!r}: use fc1 or fc2")
