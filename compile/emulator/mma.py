"""``mma.sync``, ``ldmatrix`` and ``stmatrix``: fragment layouts and products, vectorised over lanes and over batches of warps.

Sources: PTX ISA 9.x, 9.7.14.5 (matrix fragments and ``mma`` for m16n8k4, k8, k16, k32), 9.7.14.5.15 ``ldmatrix``, 9.7.14.5.16 ``stmatrix``.

Registers come as uint32 arrays ``[registers, …, 32]``: the register axis first, the 32 lanes last, any batch axes (warps, or independent
instructions) between; ``numpy.array((r0, r1, …))`` of a lane array per register has this shape already.

Numerical model: every product is exact, the sum of all products and C is taken in float64 and rounded once to the type of D (nearest
    even, NaN canonical 0x7FFFFFFF). A real tensor core adds with fewer bits and truncates; both agree whenever all partial sums are exact
    in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.formats import decode_table64
from densemoe.runtime.errors import EmulatorError

__all__ = ["Mma", "ldmatrix_addresses", "make_mma", "round_accumulator", "stmatrix_addresses"]

Registers = NDArray[np.uint32]

_ELEMENT_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}
_K = {32: (4, 8), 16: (8, 16), 8: (16, 32)}  # element bits: values of k in m16n8k*
_VIEWS: dict[str, type[np.generic]] = {"f16": np.float16, "s8": np.int8, "u8": np.uint8}  # types that numpy converts to float64
_ROWS, _COLUMNS, _LANES = 16, 8, 32
_GROUPS, _THREADS = 8, 4
_SIXTEEN, _UPPER_HALF, _TF32 = np.uint32(16), np.uint32(0xFFFF0000), np.uint32(0xFFFFE000)


def _unpack(words: Registers, name: str) -> NDArray[Any]:
    """Elements of packed registers in a type from which float64 is exact.

    Shape ``[registers, …, 32 · elements a word]``; bf16 alone has its two halves as planes, ``[2, registers, …, 32]``, which is cheaper.
    """
    elements: NDArray[Any]
    if name == "bf16":
        halves = np.empty((2, *words.shape), np.uint32)
        np.left_shift(words, _SIXTEEN, out=halves[0])
        np.bitwise_and(words, _UPPER_HALF, out=halves[1])
        elements = halves.view(np.float32)
    elif name == "tf32":
        elements = (words & _TF32).view(np.float32)
    elif name in _VIEWS:
        elements = words.view(_VIEWS[name])
    else:
        elements = decode_table64(name).take(words.view(np.uint8))
    return elements


def round_accumulator(values: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Sums rounded once to float32; NaN becomes the canonical 0x7FFFFFFF. Call it under ``numpy.errstate`` that ignores overflow. Sums that are
    float32 already are changed in place."""
    rounded = values.astype(np.float32, copy=False)
    flat = rounded.ravel()
    if np.isnan(flat.dot(flat)):  # a sum of squares is NaN only if an element is
        rounded[np.isnan(rounded)] = np.uint32(0x7FFFFFFF).view(np.float32)
    return rounded


@dataclass(frozen=True)
class _Axes:
    """Splits and orders of axes between registers and matrices, for one number of batch axes.

    A lane is 4·g + t. Element i of register 2·h + r of A is row g + 8·r, k = (4·h + t)·w + i, with w elements a word; element i of
    register h of B is column g and the same k; register 2·r + i of C is row g + 8·r, column 2·t + i.
    """

    a_split: tuple[int, ...]
    a_order: tuple[int, ...]
    a_shape: tuple[int, ...]
    b_split: tuple[int, ...]
    b_order: tuple[int, ...]
    b_shape: tuple[int, ...]
    c_split: tuple[int, ...]
    d_split: tuple[int, ...]
    d_order: tuple[int, ...]
    d_shape: tuple[int, ...]


@cache
def _axes(a_registers: int, b_registers: int, k: int, batch: tuple[int, ...], planes: bool) -> _Axes:
    """`planes`: the element axis comes first, not last. The order of k is free as long as A and B have the same."""
    n, per_word = len(batch), k // (4 * b_registers)
    if planes:
        a_split: tuple[int, ...] = (per_word, a_registers // 2, 2, *batch, _GROUPS, _THREADS)
        a_order: tuple[int, ...] = (*range(3, 3 + n), 2, 3 + n, 0, 1, 4 + n)
        b_split: tuple[int, ...] = (per_word, b_registers, *batch, _GROUPS, _THREADS)
        b_order: tuple[int, ...] = (*range(2, 2 + n), 2 + n, 0, 1, 3 + n)
    else:
        a_split = (a_registers // 2, 2, *batch, _GROUPS, _THREADS, per_word)
        a_order = (*range(2, 2 + n), 1, 2 + n, 0, 3 + n, 4 + n)
        b_split = (b_registers, *batch, _GROUPS, _THREADS, per_word)
        b_order = (*range(1, 1 + n), 1 + n, 0, 2 + n, 3 + n)
    return _Axes(
        a_split,
        a_order,
        (*batch, _ROWS, k),
        b_split,
        b_order,
        (*batch, _COLUMNS, k),
        (2, 2, *batch, _GROUPS, _THREADS),
        (*batch, 2, _GROUPS, _THREADS, 2),
        (n, 3 + n, *range(n), 1 + n, 2 + n),
        (4, *batch, _LANES),
    )


@dataclass(frozen=True)
class Mma:
    """One ``mma.sync.m16n8k*`` of given types: register counts and the product.

    Attributes:
        k: depth of the instruction.
        a_type, b_type: ``f16 bf16 tf32 e4m3 e5m2 s8 u8``.
        c_type: type of C and D: ``f32``, ``f16`` or ``s32``.
        a_registers, b_registers, c_registers: 32-bit registers a lane gives for A and B, and for C and D each.
        saturate: ``.satfinite`` of the integer forms: clamp to s32 instead of wrapping.
    """

    k: int
    a_type: str
    b_type: str
    c_type: str
    a_registers: int
    b_registers: int
    c_registers: int
    saturate: bool = False

    def multiply(self, operands: Registers) -> Registers:
        """D = A·B + C for one instruction or a batch of independent ones.

        Args:
            operands: uint32 ``[a_registers + b_registers + c_registers, …, 32]``, C-contiguous: the registers of A, then B, then C, in
                the order of the instruction's operands.

        Returns:
            uint32 ``[c_registers, …, 32]``, the registers of D.
        """
        planes = self.a_type == "bf16"
        axes = _axes(self.a_registers, self.b_registers, self.k, operands.shape[1:-1], planes)
        b_start, c_start = self.a_registers, self.a_registers + self.b_registers
        with np.errstate(over="ignore", invalid="ignore"):
            if self.a_type == self.b_type:
                both = _unpack(operands[:c_start], self.a_type)
                a, b = (both[:, :b_start], both[:, b_start:]) if planes else (both[:b_start], both[b_start:])
            else:
                a, b = _unpack(operands[:b_start], self.a_type), _unpack(operands[b_start:c_start], self.b_type)
            a_matrix = a.reshape(axes.a_split).transpose(axes.a_order).astype(np.float64, order="C").reshape(axes.a_shape)
            b_matrix = b.reshape(axes.b_split).transpose(axes.b_order).astype(np.float64, order="C").reshape(axes.b_shape)
            product = np.matmul(a_matrix, b_matrix.swapaxes(-1, -2)).reshape(axes.d_split).transpose(axes.d_order)
            return self._accumulate(product, operands[c_start:], axes)

    def _accumulate(self, product: NDArray[np.float64], c: Registers, axes: _Axes) -> Registers:
        """Adds C to a product ``[2 (row / 8), 2 (column % 2), …, 8, 4]`` and rounds."""
        words: Registers
        if self.c_type == "f32":
            words = round_accumulator(product + c.view(np.float32).reshape(axes.c_split)).view(np.uint32)
        elif self.c_type == "s32":
            sums = product + c.view(np.int32).reshape(axes.c_split)
            if self.saturate:
                sums = np.clip(sums, -(2.0**31), 2.0**31 - 1)
            words = sums.astype(np.int64).astype(np.uint32)
        else:  # register r holds columns 2t and 2t + 1 of row g + 8·r
            pairs = np.moveaxis(product, 1, -1)
            halves = (pairs + c.view(np.float16).reshape(pairs.shape)).astype(np.float16, order="C")
            halves[np.isnan(halves)] = np.uint16(0x7FFF).view(np.float16)
            return halves.view(np.uint32).reshape(2, *axes.d_shape[1:])
        return words.reshape(axes.d_shape)

    def __call__(self, a: Registers, b: Registers, c: Registers) -> Registers:
        """D = A·B + C with the registers of A, B and C as separate arrays ``[registers, …, 32]``."""
        return self.multiply(np.concatenate((a, b, c)))


@cache
def make_mma(k: int, a_type: str, b_type: str, c_type: str, d_type: str | None = None, saturate: bool = False) -> Mma:
    """The instruction ``mma.sync.aligned.m16n8k{k}.row.col{.satfinite}.d.a.b.c``.

    Raises:
        EmulatorError: a shape or combination of types that is not modelled.
    """
    d_type = c_type if d_type is None else d_type
    text = f"mma.sync.m16n8k{k}.row.col.{d_type}.{a_type}.{b_type}.{c_type}"
    bits = _ELEMENT_BITS.get(a_type)
    same_class = {"e4m3": ("e4m3", "e5m2"), "e5m2": ("e4m3", "e5m2"), "s8": ("s8", "u8"), "u8": ("s8", "u8")}.get(a_type, (a_type,))
    accumulators = {"f16": ("f32", "f16"), "e4m3": ("f32", "f16"), "e5m2": ("f32", "f16"), "s8": ("s32",), "u8": ("s32",)}.get(
        a_type, ("f32",)
    )
    if bits is None or k not in _K[bits] or b_type not in same_class or c_type not in accumulators or d_type != c_type:
        raise EmulatorError(
            f"{text} is not modelled: use m16n8k8/k16 with f16 or bf16, m16n8k4/k8 with tf32, m16n8k16/k32 with e4m3, e5m2, s8 or u8, "
            "C and D both f32 (also f16 for f16, e4m3, e5m2; s32 for integers)"
        )
    if saturate and c_type != "s32":
        raise EmulatorError(f"{text}: .satfinite belongs to the integer forms")
    words = k * bits // 32 // _THREADS  # 32-bit words of one row that a lane holds
    return Mma(k, a_type, b_type, c_type, 2 * words, words, 2 if c_type == "f16" else 4, saturate)


# --- ldmatrix and stmatrix --------------------------------------------------------------------------------------------


@cache
def _matrix_map(count: int, transpose: bool, element: str) -> tuple[NDArray[np.intp], NDArray[np.int64], int]:
    """Which lane's address, and which byte in its 16-byte row, feeds each unit of each register: ``[registers, 32, units]``."""
    lane = np.arange(_LANES)
    g, t = lane // _THREADS, lane % _THREADS
    if element == "b16" and not transpose:  # row g, bytes 4t…4t + 3
        source = np.stack([8 * j + g for j in range(count)])[..., None]
        return source.astype(np.intp), np.broadcast_to((4 * t)[:, None], source.shape).astype(np.int64), 4
    if element == "b16":  # rows 2t and 2t + 1, half word g
        source = np.stack([np.stack([8 * j + 2 * t + i for i in range(2)], axis=-1) for j in range(count)])
        return source.astype(np.intp), np.broadcast_to((2 * g)[:, None], source.shape).astype(np.int64), 2
    # b8, transposed: bytes (row, column) = (r, g), (r + 1, g), (r, g + 8), (r + 1, g + 8) of register j
    registers = []
    for j in range(count):
        # stmatrix.m16n8: eight rows a register; ldmatrix.m16n16: sixteen rows a pair of registers, four consecutive ones a lane
        first = 8 * j + 2 * t if element == "b8 m16n8" else 16 * (j // 2) + 4 * t + 2 * (j % 2)
        registers.append(np.stack([first, first + 1, first, first + 1], axis=-1))
    source = np.stack(registers)
    column = np.stack([g, g, g + 8, g + 8], axis=-1)
    return source.astype(np.intp), np.broadcast_to(column, source.shape).astype(np.int64), 1


def _resolve(
    addresses: NDArray[np.integer], count: int, transpose: bool, element: str, rows: int, text: str
) -> tuple[NDArray[np.int64], int]:
    source, offset, unit = _matrix_map(count, transpose, element)
    starts = np.asarray(addresses, np.int64)
    used = starts[..., :rows]
    if np.bitwise_or.reduce(used, axis=None) & 15:
        lane = int(np.argwhere(used & 15)[0][-1])
        raise EmulatorError(f"{text}: lane {lane} gives address {int(starts[..., lane].ravel()[0]):#x}; each row must be 16-byte aligned")
    if starts.ndim == 1:
        return starts[source] + offset, unit
    return np.moveaxis(starts[..., source] + offset, -3, 0), unit


def ldmatrix_addresses(
    addresses: NDArray[np.integer], count: int, transpose: bool = False, element: str = "b16"
) -> tuple[NDArray[np.int64], int]:
    """Where each part of each destination register of ``ldmatrix`` lies in shared memory.

    Args:
        addresses: ``[…, 32]``, the address operand of each lane; of ``.x1`` lanes 0–7 are read, of ``.x2`` 0–15, of ``.x4`` all (``.b8``:
            0–15 of ``.x1``, all of ``.x2``).
        count: 1, 2 or 4, the number after ``.x``.
        transpose: ``.trans``.
        element: ``b16`` for ``.m8n8``, ``b8`` for ``.m16n16.trans`` (sm_100a; two registers a matrix).

    Returns:
        Addresses int64 ``[registers, …, 32, 4 / unit]`` and the unit in bytes (4, 2 or 1). A register is the little-endian concatenation
        of the units at its addresses.

    Raises:
        EmulatorError: a row that is not 16-byte aligned, or a form that is not modelled.
    """
    text = f"ldmatrix.x{count}{'.trans' if transpose else ''}.{element}"
    if element == "b16" and count in (1, 2, 4):
        return _resolve(addresses, count, transpose, element, 8 * count, text)
    if element == "b8" and transpose and count in (1, 2):
        return _resolve(addresses, 2 * count, True, "b8 m16n16", 16 * count, text)
    raise EmulatorError(f"{text} is not modelled: use .m8n8 .b16 with .x1 .x2 .x4, or .m16n16.trans.b8 with .x1 .x2")


def stmatrix_addresses(
    addresses: NDArray[np.integer], count: int, transpose: bool = False, element: str = "b16"
) -> tuple[NDArray[np.int64], int]:
    """Where ``stmatrix`` puts each part of each source register; arguments and results as `ldmatrix_addresses`.

    ``element="b8"`` is ``.m16n8.trans`` (sm_100a; one register a matrix, eight row addresses each).
    """
    text = f"stmatrix.x{count}{'.trans' if transpose else ''}.{element}"
    if element == "b16" and count in (1, 2, 4):
        return _resolve(addresses, count, transpose, element, 8 * count, text)
    if element == "b8" and transpose and count in (1, 2, 4):
        return _resolve(addresses, count, True, "b8 m16n8", 8 * count, text)
    raise EmulatorError(f"{text} is not modelled: use .m8n8 .b16 or .m16n8.trans.b8, with .x1 .x2 .x4")
