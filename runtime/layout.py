"""Layouts of the contract's sections 2 and 3: the 128x4 tiled scale order and the up/gate interleave. numpy only."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.errors import ProblemError

__all__ = ["deinterleave_up_gate", "interleave_up_gate", "padded_rows", "scale_offset", "tile_scales", "untile_scales"]

Bytes = npt.NDArray[np.uint8]

TILE_ROWS: Final = 128
TILE_COLUMNS: Final = 4
INTERLEAVE: Final = 64  # consecutive up rows, then as many gate rows


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


def tile_scales(scales: Bytes) -> Bytes:
    """Row-major scales ``[R, C]`` in tiled order, as ``[⌈R/128⌉·128, C]`` bytes; padding rows are 0.

    Raises:
        ProblemError: C is not a multiple of 4.
    """
    rows, columns = scales.shape
    if columns % TILE_COLUMNS:
        raise ProblemError(f"{columns} scale columns: use a multiple of 4 (K % 64 == 0, contract section 2)")
    padded = np.zeros((padded_rows(rows), columns), dtype=np.uint8)
    padded[:rows] = scales
    # [row tile, 4 row quarters, 32 rows, column tile, 4 columns] → [row tile, column tile, 32 rows, 4 row quarters, 4 columns]
    blocks = padded.reshape(-1, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocks).reshape(padded.shape)


def untile_scales(tiled: Bytes, rows: int) -> Bytes:
    """Row-major scales ``[rows, C]`` of tiled bytes ``[⌈rows/128⌉·128, C]``.

    Raises:
        ProblemError: the shape is not that of ``rows`` rows.
    """
    if tiled.ndim != 2 or tiled.shape[0] != padded_rows(rows) or tiled.shape[1] % TILE_COLUMNS:
        raise ProblemError(f"tiled scales of shape {tiled.shape} for {rows} rows: use ({padded_rows(rows)}, a multiple of 4)")
    columns = tiled.shape[1]
    blocks = np.ascontiguousarray(tiled).reshape(-1, columns // 4, 32, 4, 4).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(blocks).reshape(tiled.shape)[:rows]


def _check_interleave(rows: int) -> None:
    if rows % (2 * INTERLEAVE):
        raise ProblemError(f"{rows} up and gate rows: use a multiple of {2 * INTERLEAVE} (I % 64 == 0, contract section 8)")


def interleave_up_gate(up: npt.NDArray[Any], gate: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows ``[2I, …]`` in groups of 64: up 0–63, gate 0–63, up 64–127, … (contract section 3) from w3 and w1, each ``[I, …]``."""
    if up.shape != gate.shape:
        raise ProblemError(f"up has shape {up.shape}, gate {gate.shape}: they must agree")
    _check_interleave(2 * up.shape[0])
    parts = [array.reshape(-1, INTERLEAVE, *array.shape[1:]) for array in (up, gate)]
    return np.stack(parts, axis=1).reshape(2 * up.shape[0], *up.shape[1:])


def deinterleave_up_gate(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """(up, gate), each ``[I, …]``, of interleaved rows ``[2I, …]``."""
    _check_interleave(rows.shape[0])
    blocks = rows.reshape(-1, 2, INTERLEAVE, *rows.shape[1:])
    return tuple(np.ascontiguousarray(blocks[:, part]).reshape(-1, *rows.shape[1:]) for part in (0, 1))  # type: ignore[return-value]
