"""``wgmma.mma_async``: operands, register fragments and the product of one warpgroup instruction.

Sources: PTX ISA 9.x, 9.7.15.2 (shapes), 9.7.15.5.1 (register fragments of A and D, shared-memory layouts), 9.7.15.5.2
    (``wgmma.mma_async``: scale-d, imm-scale, imm-trans, types). Sparse A is not modelled.

Registers of a warpgroup come as uint32 arrays ``[registers, 128]``: 128 lanes, warp by warp, as ``numpy.array`` of one 128-lane array per
register gives. Decoded operands are float64 ``[rows, k]`` and may be kept by the caller as long as their bytes do not change.

Numerical model: products are exact, their sum and D are added in float64 and rounded once an instruction to D's type. A real tensor core
    adds with fewer bits; both agree whenever all partial sums are exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.formats import decode_bytes
from densemoe.compile.emulator.mma import round_accumulator
from densemoe.compile.emulator.smem_descriptor import decode_sm90, gather_operand
from densemoe.runtime.errors import EmulatorError

__all__ = ["Wgmma", "make_wgmma"]

Bytes = NDArray[np.uint8]
Matrix = NDArray[np.float64]
Registers = NDArray[np.uint32]

_ELEMENT_BYTES = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}
_PARTNERS = {"e4m3": ("e4m3", "e5m2"), "e5m2": ("e4m3", "e5m2"), "s8": ("s8", "u8"), "u8": ("s8", "u8")}
_ACCUMULATORS = {
    "f16": ("f16", "f32"),
    "bf16": ("f32",),
    "tf32": ("f32",),
    "e4m3": ("f16", "f32"),
    "e5m2": ("f16", "f32"),
    "s8": ("s32",),
    "u8": ("s32",),
}
_M, _WARPS, _LANES = 64, 4, 128
_K_BYTES = 32  # of a row of A or B, for every type
_GROUPS, _THREADS = 8, 4  # a lane of a warp is 4·g + t


@dataclass(frozen=True)
class Wgmma:
    """One ``wgmma.mma_async.m64nNkK`` of given types.

    Attributes:
        n, k: shape; M is 64.
        a_type, b_type: ``f16 bf16 tf32 e4m3 e5m2 s8 u8``.
        d_type: ``f32``, ``f16`` or ``s32``.
        saturate: ``.satfinite`` of the integer forms.
    """

    n: int
    k: int
    a_type: str
    b_type: str
    d_type: str
    saturate: bool = False

    def element_bytes(self, operand: str) -> int:
        """Bytes of an element of operand ``a`` or ``b``."""
        return _ELEMENT_BYTES[self.a_type if operand == "a" else self.b_type]

    @property
    def a_registers(self) -> int:
        """Registers a lane holds of A: 4."""
        return 4

    @property
    def d_registers(self) -> int:
        """Registers a lane holds of D: N / 2, or N / 4 for f16."""
        return self.n // (4 if self.d_type == "f16" else 2)

    def a_from_registers(self, a: Registers) -> Matrix:
        """A, float64 ``[64, k]``, from uint32 ``[4, 128]``.

        Register 2·h + r of lane 4·g + t of warp w holds row 16·w + 8·r + g, bytes 16·h + 4·t … + 3 of its k.
        """
        words = a.reshape(2, 2, _WARPS, _GROUPS, _THREADS).transpose(2, 1, 3, 0, 4)
        return decode_bytes(np.ascontiguousarray(words).view(np.uint8).reshape(_M, _K_BYTES), self.a_type)

    def a_from_shared(self, shared: Bytes, bits: int, transpose: bool = False) -> Matrix:
        """A, float64 ``[64, k]``, from a matrix descriptor; `transpose` (``imm-trans-a``) means M-major, 16-bit types only."""
        return self._from_shared(shared, bits, _M, self.a_type, transpose)

    def b_from_shared(self, shared: Bytes, bits: int, transpose: bool = False) -> Matrix:
        """B, float64 ``[n, k]``, from a matrix descriptor; `transpose` (``imm-trans-b``) means N-major, 16-bit types only.

        Args:
            shared: the CTA's shared window (uint8, index = shared address).
            bits: the 64-bit descriptor.

        Raises:
            EmulatorError: a bad descriptor, or transposition of a type that has none.
        """
        return self._from_shared(shared, bits, self.n, self.b_type, transpose)

    def _from_shared(self, shared: Bytes, bits: int, rows: int, name: str, transpose: bool) -> Matrix:
        if transpose and _ELEMENT_BYTES[name] != 2:
            raise EmulatorError(f"wgmma with {name}: only 16-bit operands can be transposed")
        data = gather_operand(shared, decode_sm90(bits), rows, _K_BYTES, _ELEMENT_BYTES[name] if transpose else 0)
        return decode_bytes(data, name)

    def multiply(self, a: Matrix, b: Matrix, d: Registers | None, scale_a: int = 1, scale_b: int = 1) -> Registers:
        """D = ±A·Bᵀ (+ D).

        Args:
            a: float64 ``[64, k]``.
            b: float64 ``[n, k]``.
            d: uint32 ``[d_registers, 128]``, or None where ``scale-d`` is false.
            scale_a, scale_b: ``imm-scale-a`` and ``imm-scale-b``, 1 or −1.

        Returns:
            New registers of D, uint32 ``[d_registers, 128]``: register 4·j + 2·r + i (f32, s32) of lane 4·g + t of warp w holds row 16·w
            + 8·r + g, column 8·j + 2·t + i; f16 holds i = 0, 1 in the halves of register 2·j + r.

        Raises:
            EmulatorError: a scale other than 1 and −1, or −1 with integers.
        """
        if abs(scale_a) != 1 or abs(scale_b) != 1 or (self.d_type == "s32" and (scale_a, scale_b) != (1, 1)):
            raise EmulatorError(f"wgmma imm-scale-a {scale_a}, imm-scale-b {scale_b}: 1 or -1 needed, 1 for integers")
        words: Registers
        with np.errstate(over="ignore", invalid="ignore"):
            # rows 16·w + 8·r + g, columns 8·j + 2·t + i -> j, r, i, w, g, t
            product = np.matmul(a, b.T).reshape(_WARPS, 2, _GROUPS, self.n // 8, _THREADS, 2)
            if scale_a != scale_b:
                np.negative(product, out=product)
            if self.d_type == "f16":
                pairs = product.transpose(3, 1, 0, 2, 4, 5).reshape(self.d_registers, _LANES, 2)
                if d is not None:
                    pairs = pairs + np.ascontiguousarray(d).view(np.float16).reshape(pairs.shape)
                halves = pairs.astype(np.float16, order="C")
                halves[np.isnan(halves)] = np.uint16(0x7FFF).view(np.float16)
                words = halves.view(np.uint32)[..., 0]
                return words
            sums = product.transpose(3, 1, 5, 0, 2, 4).reshape(self.d_registers, _LANES)
            if self.d_type == "f32":
                if d is not None:
                    sums += d.view(np.float32)
                words = round_accumulator(sums).view(np.uint32)
                return words
            if d is not None:
                sums += d.view(np.int32)
            if self.saturate:
                sums = np.clip(sums, -(2.0**31), 2.0**31 - 1)
            words = sums.astype(np.int64).astype(np.uint32)
        return words


@cache
def make_wgmma(n: int, d_type: str, a_type: str, b_type: str, k: int | None = None, saturate: bool = False) -> Wgmma:
    """The instruction ``wgmma.mma_async.sync.aligned.m64n{n}k{k}.d.a.b``.

    Args:
        k: as written in the shape, checked against the type; None takes the type's.

    Raises:
        EmulatorError: a shape or combination of types that does not exist or is not modelled.
    """
    text = f"wgmma.mma_async.m64n{n}k{k or '?'}.{d_type}.{a_type}.{b_type}"
    if a_type not in _ELEMENT_BYTES or b_type not in _PARTNERS.get(a_type, (a_type,)) or d_type not in _ACCUMULATORS[a_type]:
        raise EmulatorError(
            f"{text}: types are f16, bf16, tf32 with themselves, e4m3 with e5m2, s8 with u8; D is f32, f16 for f16 and fp8, s32 for integers"
        )
    depth = _K_BYTES // _ELEMENT_BYTES[a_type]
    if k not in (None, depth):
        raise EmulatorError(f"{text}: k is {depth} for {a_type}")
    if not 8 <= n <= 256 or n % 8 or (d_type == "s32" and n > 32 and n % 16):
        raise EmulatorError(f"{text}: n is a multiple of 8 up to 256, for integers of 16 above 32")
    if saturate and d_type != "s32":
        raise EmulatorError(f"{text}: .satfinite belongs to the integer forms")
    return Wgmma(n, depth, a_type, b_type, d_type, saturate)
