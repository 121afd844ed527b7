"""Tensor memory: addresses, accumulator layouts, ``tcgen05.ld``, ``tcgen05.st`` and ``tcgen05.cp``.

Sources: PTX ISA 9.x, 9.7.16.1 (tensor memory and its addresses), 9.7.16.2.3 (data movement shapes), 9.7.16.8 (ld, st), 9.7.16.9.2 (cp),
    9.7.16.10.5 (data path layouts A–G). Register and lane maps that the ISA gives as figures were read from CuTe's copy and MMA traits
    for sm_100.

A CTA's tensor memory is a uint32 array ``[128, 512]``, lanes × columns; the functions here take that array and keep no state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from densemoe.runtime.errors import EmulatorError

__all__ = [
    "COLUMNS",
    "LANES",
    "AccumulatorLayout",
    "CopyShape",
    "accumulator_layout",
    "copy_shape",
    "load_registers",
    "register_map",
    "split_address",
    "store_registers",
    "write_rows",
]

TensorMemory = NDArray[np.uint32]
LANES, COLUMNS = 128, 512
_WARP_LANES = 32
_COUNTS = {  # .num allowed for each shape of ld and st, and registers per repetition
    "32x32b": (1, 128),
    "16x64b": (1, 128),
    "16x128b": (2, 64),
    "16x256b": (4, 32),
    "16x32bx2": (1, 128),
}


def split_address(address: int) -> tuple[int, int]:
    """(lane, column) of a tensor memory address: lane in bits 16–31, column in bits 0–15.

    Raises:
        EmulatorError: outside of 128 lanes and 512 columns.
    """
    lane, column = address >> 16 & 0xFFFF, address & 0xFFFF
    if lane >= LANES or column >= COLUMNS:
        raise EmulatorError(
            f"tensor memory address {address:#010x} is lane {lane}, column {column}: {LANES} lanes and {COLUMNS} columns exist"
        )
    return lane, column


# --- ld and st --------------------------------------------------------------------------------------------------------


@cache
def register_map(shape: str, count: int, packed: bool = False, split: int = 0) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which tensor memory cells the registers of ``tcgen05.ld`` and ``tcgen05.st`` are.

    Args:
        shape: ``32x32b 16x64b 16x128b 16x256b 16x32bx2``.
        count: the number after ``.x``.
        packed: ``.pack::16b`` of ld, ``.unpack::16b`` of st: a register holds the lower halves of two neighbouring columns.
        split: ``immHalfSplitoff`` of ``.16x32bx2``: columns between the halves that threads 0–15 and 16–31 access.

    Returns:
        Lanes and columns relative to the address, ``[registers, 32]`` (``[registers, 32, 2]`` when packed, the lower half first).
        Read-only.

    Raises:
        EmulatorError: an unknown shape or count.
    """
    per_count, largest = _COUNTS.get(shape, (0, 0))
    if not per_count or count not in (1, 2, 4, 8, 16, 32, 64, 128) or count > largest:
        raise EmulatorError(
            f"tcgen05.ld/st.{shape}.x{count} does not exist: shapes are {', '.join(_COUNTS)}, .x is a power of two up to {largest or 128}"
        )
    thread, register = np.arange(_WARP_LANES)[None, :], np.arange(per_count * count)[:, None]
    offset = np.zeros(thread.shape, np.intp)
    if shape == "32x32b":
        lane, column = thread + 0 * register, register + 0 * thread
    elif shape == "16x64b":  # threads 2i and 2i + 1 hold lanes i / 2 and i / 2 + 8
        lane, column = thread // 4 + 8 * (thread % 2) + 0 * register, 2 * register + thread // 2 % 2
    elif shape == "16x128b":
        lane, column = thread // 4 + 8 * (register % 2), 4 * (register // 2) + thread % 4
    elif shape == "16x256b":
        lane, column = thread // 4 + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * (thread % 4) + register % 2
    else:
        lane, column, offset = thread % 16 + 0 * register, register + 0 * thread, split * (thread // 16)
    if packed:
        lane, column = np.stack([lane, lane], axis=-1), np.stack([2 * column, 2 * column + 1], axis=-1)
        offset = offset[..., None]
    lanes, columns = lane.astype(np.intp), (column + offset).astype(np.intp)
    lanes.setflags(write=False)
    columns.setflags(write=False)
    return lanes, columns


def _cells(address: int, shape: str, count: int, warp: int, packed: bool, split: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Absolute lanes and columns, checked against the quarter of the lanes that a warp may access."""
    lanes, columns = register_map(shape, count, packed, split)
    lane, column = split_address(address)
    first = _WARP_LANES * (warp % 4)
    allowed = (first,) if shape == "32x32b" else (first, first + 16)
    if lane not in allowed:
        raise EmulatorError(f"tcgen05.ld/st.{shape} of warp {warp} at lane {lane}: it may access lane {' or '.join(map(str, allowed))}")
    last = column + int(columns.max())
    if last >= COLUMNS:
        raise EmulatorError(f"tcgen05.ld/st.{shape}.x{count} at column {column} reaches column {last}: {COLUMNS} exist")
    return lanes + lane, columns + column


def load_registers(
    memory: TensorMemory, address: int, shape: str, count: int, warp: int, packed: bool = False, split: int = 0
) -> NDArray[np.uint32]:
    """``tcgen05.ld``: the registers of one warp, uint32 ``[registers, 32]``.

    Args:
        memory: uint32 ``[128, 512]``.
        address: tensor memory address, the same in all lanes of the warp.
        shape, count, packed, split: as `register_map`.
        warp: index of the warp in its CTA; warp w accesses lanes 32·(w % 4) … + 31.

    Raises:
        EmulatorError: an address outside of the warp's lanes or the memory.
    """
    if shape == "32x32b" and not packed:
        return np.ascontiguousarray(memory[_block_32x32(address, count, warp)].T)
    lanes, columns = _cells(address, shape, count, warp, packed, split)
    words = memory[lanes, columns]
    if not packed:
        return words
    halves = words & np.uint32(0xFFFF)
    return halves[..., 0] | (halves[..., 1] << np.uint32(16))


def store_registers(
    memory: TensorMemory,
    address: int,
    shape: str,
    count: int,
    warp: int,
    registers: NDArray[np.uint32],
    packed: bool = False,
    split: int = 0,
) -> None:
    """``tcgen05.st``: the inverse of `load_registers`; unpacked halves leave the upper half of their column 0.

    Args:
        registers: uint32 ``[registers, 32]``.
    """
    if shape == "32x32b" and not packed:
        memory[_block_32x32(address, count, warp)] = registers.T
        return
    lanes, columns = _cells(address, shape, count, warp, packed, split)
    memory[lanes, columns] = np.stack([registers & np.uint32(0xFFFF), registers >> np.uint32(16)], axis=-1) if packed else registers


def _block_32x32(address: int, count: int, warp: int) -> tuple[slice, slice]:
    """The lanes and columns of ``.32x32b``, which are a block."""
    lane, column = split_address(address)
    if lane != _WARP_LANES * (warp % 4) or column + count > COLUMNS or count not in (1, 2, 4, 8, 16, 32, 64, 128):
        _cells(address, "32x32b", count, warp, False, 0)  # raises with the reason
    return slice(lane, lane + _WARP_LANES), slice(column, column + count)


# --- cp ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyShape:
    """A shape of ``tcgen05.cp``.

    Attributes:
        rows: rows of shared memory read.
        row_bytes: bytes of each, 16 or 32: 4 or 8 columns.
        lanes: destination lanes of each row, ``[rows, copies]``.
        row_of_lane: where all 128 lanes are written, the row that each receives, ``[128]``.
        in_turn: all rows in order, and again, up to lane 127.
    """

    rows: int
    row_bytes: int
    lanes: NDArray[np.intp]
    row_of_lane: NDArray[np.intp] | None
    in_turn: bool = False


@cache
def copy_shape(shape: str, multicast: str = "") -> CopyShape:
    """The shape of ``tcgen05.cp.{shape}{.multicast}``.

    Args:
        shape: ``128x256b 4x256b 128x128b 64x128b 32x128b``.
        multicast: ``warpx2::02_13`` or ``warpx2::01_23`` with ``64x128b``, ``warpx4`` with ``32x128b``.

    Raises:
        EmulatorError: another combination.
    """
    rows = np.arange(LANES)
    shapes: dict[tuple[str, str], tuple[int, NDArray[np.intp]]] = {
        ("128x256b", ""): (32, rows[:, None]),
        ("128x128b", ""): (16, rows[:, None]),
        ("4x256b", ""): (32, 32 * rows[:4, None]),
        ("64x128b", "warpx2::02_13"): (16, rows[:64, None] + np.array([0, 64])),
        ("64x128b", "warpx2::01_23"): (16, (rows[:64] + 32 * (rows[:64] // 32))[:, None] + np.array([0, 32])),
        ("32x128b", "warpx4"): (16, rows[:32, None] + np.array([0, 32, 64, 96])),
    }
    if (shape, multicast) not in shapes:
        known = ", ".join(".".join(filter(None, pair)) for pair in shapes)
        raise EmulatorError(f"tcgen05.cp.{shape}{'.' + multicast if multicast else ''} is not modelled: use {known}, without decompression")
    row_bytes, lanes = shapes[shape, multicast]
    row_of_lane = None
    if lanes.size == LANES:
        row_of_lane = np.empty(LANES, np.intp)
        row_of_lane[lanes] = np.arange(lanes.shape[0])[:, None]
    in_turn = row_of_lane is not None and np.array_equal(row_of_lane, np.arange(LANES) % lanes.shape[0])
    return CopyShape(lanes.shape[0], row_bytes, lanes.astype(np.intp), row_of_lane, in_turn)


def write_rows(memory: TensorMemory, address: int, data: TensorMemory, shape: CopyShape) -> None:
    """``tcgen05.cp`` of one CTA (with ``.cta_group::2`` each CTA copies its own shared memory, at the same offsets).

    Args:
        memory: uint32 ``[128, 512]``, the destination.
        address: tensor memory address.
        data: the rows that the descriptor names in shared memory, K-major, uint32 ``[rows, words]``.
        shape: from `copy_shape`.

    Raises:
        EmulatorError: outside of tensor memory.
    """
    lane, column = split_address(address)
    words = shape.row_bytes // 4
    if (lane and (shape.row_of_lane is not None or lane + int(shape.lanes.max()) >= LANES)) or column + words > COLUMNS:
        raise EmulatorError(f"tcgen05.cp to lane {lane}, column {column} reaches beyond lane {LANES - 1} or column {COLUMNS - 1}")
    if shape.in_turn:
        memory.reshape(-1, shape.rows, COLUMNS)[:, :, column : column + words] = data
    elif shape.row_of_lane is not None:
        memory[:, column : column + words] = data.take(shape.row_of_lane, axis=0)
    else:
        memory[shape.lanes[:, 0] + lane, column : column + words] = data


# --- accumulators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AccumulatorLayout:
    """Where one CTA's part of D lies (PTX ISA 9.7.16.10.5).

    The rows of the CTA are dealt to ``lanes``; N is cut into ``parts`` pieces that lie side by side in lanes, in the same columns.

    Attributes:
        name: the ISA's letter.
        rows: rows of D (and of A) that this CTA holds.
        lanes: lane of each row for the first piece of N, relative to the address's lane.
        parts: pieces of N; piece p is ``part_lanes · p`` lanes further.
        part_lanes: lanes between pieces.
    """

    name: str
    rows: int
    lanes: tuple[int, ...]
    parts: int = 1
    part_lanes: int = 0

    def columns(self, n: int) -> int:
        """Columns that D takes."""
        return n // self.parts

    def read(self, memory: TensorMemory, address: int, n: int) -> NDArray[np.uint32]:
        """The words of D, uint32 ``[rows, n]``; a view where the layout allows, else a copy."""
        lane, column = self._place(address, n)
        width = self.columns(n)
        if self.rows == LANES:
            return memory[:, column : column + width]
        lanes = np.array(self.lanes) + lane
        return np.concatenate([memory[lanes + p * self.part_lanes, column : column + width] for p in range(self.parts)], axis=1)

    def write(self, memory: TensorMemory, address: int, words: NDArray[np.uint32], disabled: NDArray[np.bool_] | None = None) -> None:
        """Stores D, uint32 ``[rows, n]``; lanes that `disabled` (bool ``[128]``) marks keep their content."""
        n = words.shape[1]
        lane, column = self._place(address, n)
        width = self.columns(n)
        if self.rows == LANES and disabled is None:
            memory[:, column : column + width] = words
            return
        lanes = np.array(self.lanes) + lane
        for p in range(self.parts):
            target, piece = lanes + p * self.part_lanes, words[:, p * width : (p + 1) * width]
            if disabled is not None:
                kept = ~disabled[target]
                target, piece = target[kept], piece[kept]
            memory[target, column : column + width] = piece

    def _place(self, address: int, n: int) -> tuple[int, int]:
        lane, column = split_address(address)
        allowed = (0, 16) if self.name == "F" else (0,)
        if lane not in allowed:
            raise EmulatorError(f"D of layout {self.name} at lane {lane}: lane {' or '.join(map(str, allowed))} needed")
        if column + self.columns(n) > COLUMNS:
            raise EmulatorError(f"D with N = {n} at column {column} reaches column {column + self.columns(n) - 1}: {COLUMNS} exist")
        return lane, column


@cache
def accumulator_layout(m: int, cta_group: int, weight_stationary: bool = False) -> AccumulatorLayout:
    """The layout of D for a dense MMA of M rows (of both CTAs together with ``cta_group`` 2).

    Raises:
        EmulatorError: a combination that the ISA does not have.
    """
    layouts = {
        (256, 2, False): AccumulatorLayout("A", 128, tuple(range(128))),
        (128, 2, False): AccumulatorLayout("B", 64, tuple(range(64)), 2, 64),
        (128, 1, False): AccumulatorLayout("D", 128, tuple(range(128))),
        (128, 1, True): AccumulatorLayout("D", 128, tuple(range(128))),
        (64, 1, True): AccumulatorLayout("E", 64, tuple(range(64)), 2, 64),
        (64, 1, False): AccumulatorLayout("F", 64, tuple(r % 16 + 32 * (r // 16) for r in range(64))),
        (32, 1, True): AccumulatorLayout("G", 32, tuple(range(32)), 4, 32),
    }
    if (m, cta_group, weight_stationary) not in layouts:
        raise EmulatorError(f"tcgen05.mma{'.ws' if weight_stationary else ''} with M = {m} and cta_group {cta_group} does not exist")
    return layouts[m, cta_group, weight_stationary]
