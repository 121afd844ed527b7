"""Shared-memory matrix descriptors of ``wgmma`` (sm_90) and ``tcgen05`` (sm_100), and where the bytes of an operand lie.

Sources: PTX ISA 9.x, 9.7.15.5.1.2 (wgmma: strides, canonical layouts, descriptor), 9.7.16.3.1 (leading dimension stride), 9.7.16.4.1
    (tcgen05 descriptor), 9.7.16.10.6 (shared-memory layouts and swizzling), 5.5.7 (swizzle patterns); CUTLASS states the canonical
    layouts as CuTe layouts.

With ``span`` = 128, 64 or 32 bytes of the swizzle, LBO and SBO the leading and stride byte offsets, all in bytes before the swizzle's XOR:

============  ========  ==========================================================================================
majorness     swizzle   address of row (m or n) r and byte b of its k, or of k and byte b along its m or n
============  ========  ==========================================================================================
K             none      start + (r / 8)·SBO + (r % 8)·16 + (b / 16)·LBO + b % 16
K             span      start + (r / 8)·SBO + (r % 8)·span + b
MN            none      start + (b / 16)·SBO + b % 16 + (k / 8)·LBO + (k % 8)·16
MN            span      start + (b / span)·LBO + b % span + (k / 8)·SBO + (k % 8)·span
MN            128/32    start + (b / 128)·LBO + b % 128 + (k / 4)·SBO + (k % 4)·128   (128 B swizzle with 32 B atoms)
============  ========  ==========================================================================================

The XOR acts on the absolute shared address, as it does for tensor copies (`tensor_map.swizzle_address`). The start address need not be that of a
swizzle atom: a K step advances it by 32 bytes within the atom's lines. The ISA asks for a base offset that names the line of the pattern at which the
matrix starts, ``(start >> 7) & 7`` for the 128 B swizzle; NVIDIA's own kernels align such matrices to 128 bytes and give 0, and work. Both are taken,
with the same addresses; another base offset is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.tensor_map import GRANULE, Swizzle, swizzle_address
from densemoe.runtime.errors import EmulatorError

__all__ = ["SmemDescriptor", "decode_sm90", "decode_sm100", "gather_operand", "operand_granules"]

_SM90_SWIZZLES = (Swizzle.NONE, Swizzle.BYTES_128, Swizzle.BYTES_64, Swizzle.BYTES_32)
_SM100_SWIZZLES = {0: Swizzle.NONE, 1: Swizzle.BYTES_128_ATOM_32, 2: Swizzle.BYTES_128, 4: Swizzle.BYTES_64, 6: Swizzle.BYTES_32}
_SPANS = {Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64, Swizzle.BYTES_128: 128, Swizzle.BYTES_128_ATOM_32: 128}
_PATTERN_LINES = {Swizzle.NONE: 1, Swizzle.BYTES_32: 2, Swizzle.BYTES_64: 4, Swizzle.BYTES_128: 8, Swizzle.BYTES_128_ATOM_32: 4}
_PATTERN = 1024  # bytes after which every swizzle pattern repeats
_FIELD = 0x3FFF  # matrix-descriptor-encode(x) = (x & 0x3FFFF) >> 4
_SM90_RESERVED = 0x3FF1_C000_C000_C000  # bits 14, 15, 30, 31, 46–48 and 52–61
_SM100_RESERVED = 0x1FE0_0000_C000_C000  # bits 14, 15, 30, 31 and 53–60
_SM100_CONSTANT = (7 << 46, 1 << 46)  # bits 46–48 must be 0b001


@dataclass(frozen=True)
class SmemDescriptor:
    """A decoded matrix descriptor; all offsets in bytes.

    Attributes:
        start: shared address of the matrix.
        leading: leading dimension byte offset.
        stride: stride dimension byte offset.
        swizzle: swizzle mode.
        base_offset: line of the swizzle pattern at which the matrix starts.
    """

    start: int
    leading: int
    stride: int
    swizzle: Swizzle = Swizzle.NONE
    base_offset: int = 0

    def encode_sm90(self) -> int:
        """The 64-bit descriptor of ``wgmma``."""
        if self.swizzle not in _SM90_SWIZZLES:
            raise EmulatorError(f"swizzle {self.swizzle.name} in a wgmma descriptor: use none, 32, 64 or 128 bytes")
        return self._fields() | _SM90_SWIZZLES.index(self.swizzle) << 62

    def encode_sm100(self) -> int:
        """The 64-bit descriptor of ``tcgen05``."""
        codes = {swizzle: code for code, swizzle in _SM100_SWIZZLES.items()}
        if self.swizzle not in codes:
            raise EmulatorError(f"swizzle {self.swizzle.name} in a tcgen05 descriptor: use none, 32, 64, 128 bytes, or 128 with 32 B atoms")
        return self._fields() | _SM100_CONSTANT[1] | codes[self.swizzle] << 61

    def _fields(self) -> int:
        for name, value in (("start", self.start), ("leading", self.leading), ("stride", self.stride)):
            if value % GRANULE or not 0 <= value < 1 << 18:
                raise EmulatorError(f"{name} {value:#x} of a matrix descriptor: a multiple of 16 below 2^18 needed")
        return self.start >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32 | self.base_offset << 49


@cache
def decode_sm90(bits: int) -> SmemDescriptor:
    """Decodes a ``wgmma`` descriptor (PTX ISA 9.7.15.5.1.2.2).

    Raises:
        EmulatorError: reserved bits that are not 0.
    """
    if bits & _SM90_RESERVED:
        raise EmulatorError(f"wgmma matrix descriptor {bits:#018x}: reserved bits {bits & _SM90_RESERVED:#x} are set, 0 needed")
    return _decode(bits, _SM90_SWIZZLES[bits >> 62])


@cache
def decode_sm100(bits: int) -> SmemDescriptor:
    """Decodes a ``tcgen05`` descriptor (PTX ISA 9.7.16.4.1).

    Raises:
        EmulatorError: reserved or constant bits with other values, an invalid swizzle, or the absolute leading address mode (not modelled).
    """
    if bits & _SM100_RESERVED:
        raise EmulatorError(f"tcgen05 matrix descriptor {bits:#018x}: reserved bits {bits & _SM100_RESERVED:#x} are set, 0 needed")
    mask, value = _SM100_CONSTANT
    if bits & mask != value:
        raise EmulatorError(f"tcgen05 matrix descriptor {bits:#018x}: bits 46-48 are {bits >> 46 & 7:#05b}, 0b001 needed")
    if bits >> 52 & 1:
        raise EmulatorError(f"tcgen05 matrix descriptor {bits:#018x}: the absolute leading address mode (bit 52) is not modelled")
    swizzle = _SM100_SWIZZLES.get(bits >> 61)
    if swizzle is None:
        raise EmulatorError(f"tcgen05 matrix descriptor {bits:#018x}: swizzle mode {bits >> 61} is invalid, use 0, 1, 2, 4 or 6")
    return _decode(bits, swizzle)


def _decode(bits: int, swizzle: Swizzle) -> SmemDescriptor:
    leading, stride = (bits >> 16 & _FIELD) << 4, (bits >> 32 & _FIELD) << 4
    return SmemDescriptor((bits & _FIELD) << 4, leading, stride, swizzle, bits >> 49 & 7)


def operand_granules(descriptor: SmemDescriptor, rows: int, k_bytes: int, element_bytes: int = 0) -> NDArray[np.intp]:
    """Shared-memory granules (16 bytes each) of one instruction's operand.

    Args:
        descriptor: from `decode_sm90` or `decode_sm100`.
        rows: extent along M or N.
        k_bytes: bytes of K in a row: 32 for every full MMA step.
        element_bytes: 0 for a K-major operand; for an MN-major (transposed) one the size of an element, 1, 2 or 4.

    Returns:
        Absolute granule indices (shared address / 16): ``[rows, k_bytes / 16]``, or for an MN-major operand ``[k, rows · element_bytes /
        16]``.

    Raises:
        EmulatorError: a base offset that does not fit the start address, a shape that does not fill granules, or rows beyond the
            swizzle's span.
    """
    first = descriptor.start // _PATTERN * (_PATTERN // GRANULE)
    return _relative_granules(descriptor, descriptor.start % _PATTERN, rows, k_bytes, element_bytes)[0] + first


@cache
def _layout(
    start: int, leading: int, stride: int, swizzle: Swizzle, rows: int, k_bytes: int, element_bytes: int
) -> tuple[NDArray[np.intp], int]:
    """Granules relative to the 1024-byte block of the start, and the end of the last one in bytes."""
    if element_bytes:
        k, width = k_bytes // element_bytes, rows * element_bytes
        index, byte = np.arange(k)[:, None], np.arange(0, width, GRANULE)
        if swizzle is Swizzle.NONE:
            linear = byte // GRANULE * stride + index // 8 * leading + index % 8 * GRANULE
        else:
            span, depth = _SPANS[swizzle], 4 if swizzle is Swizzle.BYTES_128_ATOM_32 else 8
            linear = byte // span * leading + byte % span + index // depth * stride + index % depth * span
    else:
        row, byte = np.arange(rows)[:, None], np.arange(0, k_bytes, GRANULE)
        if swizzle is Swizzle.NONE:
            linear = row // 8 * stride + row % 8 * GRANULE + byte // GRANULE * leading
        else:
            linear = row // 8 * stride + row % 8 * _SPANS[swizzle] + byte
    addresses = swizzle_address(start + linear, swizzle)
    granules: NDArray[np.intp] = (addresses // GRANULE).astype(np.intp)
    granules.setflags(write=False)
    return granules, int(addresses.max()) + GRANULE


def _relative_granules(descriptor: SmemDescriptor, start: int, rows: int, k_bytes: int, element_bytes: int) -> tuple[NDArray[np.intp], int]:
    swizzle = descriptor.swizzle
    line = (start >> 7) % _PATTERN_LINES[swizzle]
    if swizzle is not Swizzle.NONE and descriptor.base_offset and descriptor.base_offset % _PATTERN_LINES[swizzle] != line:
        raise EmulatorError(
            f"matrix descriptor: start {descriptor.start:#x} lies on line {line} of the {swizzle.name} pattern, "
            f"base offset is {descriptor.base_offset}: give {line} or 0"
        )
    if swizzle is not Swizzle.NONE and not element_bytes and start % _SPANS[swizzle] + k_bytes > _SPANS[swizzle]:
        raise EmulatorError(
            f"matrix descriptor: {k_bytes} bytes of K from start {descriptor.start:#x} cross the {_SPANS[swizzle]}-byte swizzle span"
        )
    if swizzle is Swizzle.BYTES_128_ATOM_32 and element_bytes != 4:
        raise EmulatorError("matrix descriptor: the 128 B swizzle with 32 B atoms is for MN-major 32-bit operands")
    if (rows * element_bytes if element_bytes else k_bytes) % GRANULE:
        raise EmulatorError(f"matrix descriptor: {rows} rows and {k_bytes} bytes of K do not fill 16-byte granules")
    return _layout(start, descriptor.leading, descriptor.stride, swizzle, rows, k_bytes, element_bytes)


def gather_operand(
    shared: NDArray[np.uint8], descriptor: SmemDescriptor, rows: int, k_bytes: int, element_bytes: int = 0
) -> NDArray[np.uint8]:
    """The bytes of one instruction's operand, K contiguous whatever its majorness.

    Args:
        shared: the CTA's shared window, uint8, index = shared address; its size a multiple of 16.
        descriptor, rows, k_bytes, element_bytes: as `operand_granules`.

    Returns:
        uint8 ``[rows, k_bytes]``.

    Raises:
        EmulatorError: as `operand_granules`, or the operand leaves shared memory.
    """
    start = descriptor.start % _PATTERN
    granules, end = _relative_granules(descriptor, start, rows, k_bytes, element_bytes)
    block = descriptor.start - start
    if block + end > shared.size:
        raise EmulatorError(
            f"matrix descriptor: an operand at {descriptor.start:#x} ends at {block + end:#x}, shared memory has {shared.size:#x} bytes"
        )
    picked = shared[block:].view(np.complex128).take(granules).view(np.uint8)
    if not element_bytes:
        return picked
    elements = picked.view(f"u{element_bytes}").reshape(k_bytes // element_bytes, rows)
    return np.ascontiguousarray(elements.T).view(np.uint8)
