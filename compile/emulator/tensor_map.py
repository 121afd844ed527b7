"""Tensor maps (CUtensorMap) and the tile copies they describe.

Sources: CUDA driver API, ``cuTensorMapEncodeTiled`` (parameters and rules); PTX ISA 9.x, 5.5 (tensors, tiled mode, out-of-bound access,
    5.5.7 swizzling modes), 9.7.9.27 (``cp.async.bulk.tensor``, ``cp.reduce.async.bulk.tensor``) and ``tensormap.replace`` (field
    encodings). The 128 opaque bytes were
decoded from two compilers: the CuTe DSL, whose host code computes them in plain arithmetic, and ptxas, whose code for every
``tensormap.replace`` shows the bits of its field. Only the first 64 bytes carry fields:

======  ==========  ================================================================================
u64     bits        field
======  ==========  ================================================================================
q0      0–63        global address
q1      0–3         2 = tiled
q1      4–6         rank − 1
q1      7–10        element type: u8 u16 u32 s32 u64 s64 f16 f32 f32.ftz f64 bf16 u4 u4-unpack u6-unpack
q1      11–12       interleave: none, 16 B, 32 B
q1      13–14       swizzle: none, 32 B, 64 B, 128 B
q1      15          fill out-of-bound elements with NaN
q1      16          f32 is rounded to tf32
q1      17–18       L2 promotion (2 in maps that ask for 128 B; the other values are assumed)
q1      19–20       atom of the 128 B swizzle: 16 B, 32 B, 32 B with 8 B flip, 64 B
q1      21          1 in every map the DSL encodes
q1–q3               u32 each from byte 12: strides / 16, low 32 bits; byte 28: bits 32–35 of each, 4 bits a stride
q4–q6               u32 each from byte 32: sizes − 1
q6      32–46       element strides − 1, 3 bits each
q6      56–63       box[0] − 1
q7      0–31        box[1…4] − 1, 8 bits each
======  ==========  ================================================================================

Dimension 0 is the innermost, contiguous one. `tile` has the copies. A tile is a box at signed coordinates, clipped by the tensor's sizes:
the part inside the tensor is a box too, so a copy is one strided numpy view of global memory, and one cached permutation of 16-byte
granules in shared memory (the swizzle).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densemoe.runtime.errors import EmulatorError

__all__ = [
    "BLACKWELL_FORM",
    "HOPPER_FORM",
    "DataType",
    "Interleave",
    "L2Promotion",
    "OobFill",
    "Swizzle",
    "TensorMap",
    "swizzle_address",
]

Bytes = NDArray[np.uint8]

GRANULE = 16
"""Bytes that no swizzle used here splits; boxes are whole granules wide."""
LARGEST_TILE = 232_448  # bytes; an H200's driver took 230,400 and refused 245,760
BLACKWELL_FORM, HOPPER_FORM = 1 << 21 | 2, 0  # bits of the flags
_FORM_BITS = 1 << 21 | 15
_FORMS = (BLACKWELL_FORM, HOPPER_FORM, 2)  # the last as host code of NVIDIA's examples writes it too
_PATTERN = 1024  # bytes after which every swizzle pattern repeats
_SHARED_ALIGNMENT = 128  # of a tile's shared address, PTX ISA cp.async.bulk.tensor


class DataType(IntEnum):
    """CUtensorMapDataType."""

    UINT8 = 0
    UINT16 = 1
    UINT32 = 2
    INT32 = 3
    UINT64 = 4
    INT64 = 5
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9
    FLOAT32_FTZ = 10
    TFLOAT32 = 11
    TFLOAT32_FTZ = 12
    U4X16_ALIGN8B = 13
    U4X16_ALIGN16B = 14
    U6X16_ALIGN16B = 15


class Interleave(IntEnum):
    """CUtensorMapInterleave."""

    NONE = 0
    BYTES_16 = 1
    BYTES_32 = 2


class Swizzle(IntEnum):
    """CUtensorMapSwizzle."""

    NONE = 0
    BYTES_32 = 1
    BYTES_64 = 2
    BYTES_128 = 3
    BYTES_128_ATOM_32 = 4
    BYTES_128_ATOM_32_FLIP_8 = 5
    BYTES_128_ATOM_64 = 6


class L2Promotion(IntEnum):
    """CUtensorMapL2promotion."""

    NONE = 0
    BYTES_64 = 1
    BYTES_128 = 2
    BYTES_256 = 3


class OobFill(IntEnum):
    """CUtensorMapFloatOOBfill."""

    ZERO = 0
    NAN = 1


@dataclass(frozen=True)
class ElementKind:
    """What a data type means for copies: bits of an element in global and in shared memory, its code in the map, the NaN of OOB fill."""

    bits: int
    code: int
    shared_bits: int
    nan: int | None = None
    numpy: type[np.generic] | None = None
    tf32: bool = False


KINDS: dict[DataType, ElementKind] = {
    DataType.UINT8: ElementKind(8, 0, 8, numpy=np.uint8),
    DataType.UINT16: ElementKind(16, 1, 16, numpy=np.uint16),
    DataType.UINT32: ElementKind(32, 2, 32, numpy=np.uint32),
    DataType.INT32: ElementKind(32, 3, 32, numpy=np.int32),
    DataType.UINT64: ElementKind(64, 4, 64, numpy=np.uint64),
    DataType.INT64: ElementKind(64, 5, 64, numpy=np.int64),
    DataType.FLOAT16: ElementKind(16, 6, 16, 0x7FFF, np.uint16),
    DataType.FLOAT32: ElementKind(32, 7, 32, 0x7FFFFFFF, np.uint32),
    DataType.FLOAT32_FTZ: ElementKind(32, 8, 32, 0x7FFFFFFF, np.uint32),
    DataType.FLOAT64: ElementKind(64, 9, 64, 0x7FF8000000000000, np.uint64),
    DataType.BFLOAT16: ElementKind(16, 10, 16, 0x7FFF, np.uint16),
    DataType.TFLOAT32: ElementKind(32, 7, 32, 0x7FFFFFFF, np.uint32, tf32=True),
    DataType.TFLOAT32_FTZ: ElementKind(32, 8, 32, 0x7FFFFFFF, np.uint32, tf32=True),
    DataType.U4X16_ALIGN8B: ElementKind(4, 11, 4),
    DataType.U4X16_ALIGN16B: ElementKind(4, 12, 8),
    DataType.U6X16_ALIGN16B: ElementKind(6, 13, 8),
}
_BY_CODE = {(kind.code, kind.tf32): dtype for dtype, kind in KINDS.items()}
UNPACKED = (DataType.U4X16_ALIGN16B, DataType.U6X16_ALIGN16B)
_SWIZZLE_SPAN = {Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64}  # the others 128
_ATOMS = {Swizzle.BYTES_128_ATOM_32: 1, Swizzle.BYTES_128_ATOM_32_FLIP_8: 2, Swizzle.BYTES_128_ATOM_64: 3}
# swizzle: (mask on the line number address >> 7, shift to the bits it is XORed into)
_XOR = {
    Swizzle.BYTES_32: (1, 4),
    Swizzle.BYTES_64: (3, 4),
    Swizzle.BYTES_128: (7, 4),
    Swizzle.BYTES_128_ATOM_32: (3, 5),
    Swizzle.BYTES_128_ATOM_64: (1, 6),
}


def swizzle_address(address: Any, swizzle: Swizzle) -> Any:
    """Where byte `address` of an unswizzled tile lies (PTX ISA 5.5.7): some of its bits 4–6 XORed with bits 7–9. An involution.

    Args:
        address: shared-memory byte address, an int or an integer array; absolute, as patterns start at multiples of 1024 bytes.
    """
    if swizzle is Swizzle.NONE:
        return address
    if swizzle not in _XOR:
        raise EmulatorError("the 128 B swizzle with 32 B atoms and 8 B flip is not modelled: use 16, 32 or 64 B atoms")
    mask, shift = _XOR[swizzle]
    return address ^ (((address >> 7) & mask) << shift)


@dataclass(frozen=True)
class TensorMap:
    """The arguments of ``cuTensorMapEncodeTiled``.

    Attributes:
        address: global address of element (0, …, 0).
        dtype: element type; the elements of a packed type are its 4- or 6-bit values.
        sizes: elements along each dimension, innermost first; its length is the rank, 1–5.
        strides: bytes between neighbours along dimensions 1 … rank − 1.
        box: elements of a tile along each dimension.
        element_strides: step along each dimension (dimension 0 ignores it).
        interleave, swizzle, l2_promotion, oob_fill: as the driver has them.
    """

    address: int
    dtype: DataType
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: Interleave = Interleave.NONE
    swizzle: Swizzle = Swizzle.NONE
    l2_promotion: L2Promotion = L2Promotion.NONE
    oob_fill: OobFill = OobFill.ZERO

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.sizes)

    @property
    def bits(self) -> int:
        """Bits of an element in global memory."""
        return KINDS[self.dtype].bits

    def validate(self) -> None:
        """Checks the rules of ``cuTensorMapEncodeTiled``.

        Raises:
            EmulatorError: the first rule that is broken, with the value and what is allowed.
        """
        for text in self._broken_rules():
            raise EmulatorError(f"tensor map: {text}")

    def _broken_rules(self) -> Sequence[str]:
        rank, interleaved = self.rank, self.interleave is not Interleave.NONE
        unpacked = self.dtype in UNPACKED
        inner_bits = self.box[0] * self.bits if self.box else 0
        alignment = 32 if unpacked or self.interleave is Interleave.BYTES_32 else 16
        span = _SWIZZLE_SPAN.get(self.swizzle, 128)
        wanted_lengths = {"strides": rank - 1, "box": rank, "element_strides": rank}
        floats = KINDS[self.dtype].nan is not None
        checks: list[tuple[bool, str]] = [
            (1 <= rank <= 5, f"rank {rank}, allowed 1 to 5"),
            (not interleaved or rank >= 3, f"rank {rank} with interleave, at least 3 needed"),
            *(
                (len(getattr(self, name)) == n, f"{len(getattr(self, name))} {name} for rank {rank}, {n} needed")
                for name, n in wanted_lengths.items()
            ),
            (self.address % alignment == 0, f"address {self.address:#x} is not aligned to {alignment} bytes"),
            (0 <= self.address < 1 << 64, f"address {self.address:#x} has more than 64 bits"),
            *((1 <= n <= 1 << 32, f"size {n} of dimension {i}, allowed 1 to 2^32") for i, n in enumerate(self.sizes)),
            *(
                (n % alignment == 0 and 0 <= n < 1 << 40, f"stride {n} of dimension {i + 1}, a multiple of {alignment} below 2^40 needed")
                for i, n in enumerate(self.strides)
            ),
            *((1 <= n <= 256, f"box {n} in dimension {i}, allowed 1 to 256") for i, n in enumerate(self.box)),
            *((1 <= n <= 8, f"element stride {n} of dimension {i}, allowed 1 to 8") for i, n in enumerate(self.element_strides)),
            (
                interleaved or inner_bits % 128 == 0,
                f"box {self.box[:1]} of {self.bits}-bit elements is {inner_bits / 8} bytes wide, a multiple of 16 needed",
            ),
            (
                interleaved or self.swizzle is Swizzle.NONE or self._inner_shared_bytes() <= span,
                f"a box {self._inner_shared_bytes()} bytes wide, at most {span} with this swizzle",
            ),
            (
                # 32 B alone by the documentation; a driver on an H200 took 128 B too (tests/emulator/hardware)
                self.interleave is not Interleave.BYTES_32 or self.swizzle in (Swizzle.BYTES_32, Swizzle.BYTES_128),
                "interleave 32 B needs swizzle 32 B or 128 B",
            ),
            (
                self.dtype is not DataType.U4X16_ALIGN8B or self.sizes[0] % 2 == 0,
                f"size {self.sizes[:1]} of packed 4-bit elements, an even number needed",
            ),
            (
                not unpacked or (self.sizes[0] % 128 == 0 and self.box[0] == 128),
                "this packed type needs sizes[0] % 128 == 0 and box[0] == 128",
            ),
            (
                not unpacked or self.swizzle in (Swizzle.NONE, Swizzle.BYTES_128, Swizzle.BYTES_128_ATOM_32, Swizzle.BYTES_128_ATOM_64),
                "this packed type needs no swizzle or a 128 B one",
            ),
            (not unpacked or not interleaved, "this packed type needs no interleave"),
            (self.oob_fill is OobFill.ZERO or floats, f"NaN fill with {self.dtype.name}, a floating-point type needed"),
        ]
        broken = [text for ok, text in checks if not ok][:1]
        if not broken and self.tile_bytes > LARGEST_TILE:
            broken = [f"a tile of {self.tile_bytes} bytes: at most {LARGEST_TILE}, the shared memory of a CTA"]
        return broken

    def _inner_shared_bytes(self) -> int:
        return self.box[0] * KINDS[self.dtype].shared_bits // 8 if self.box else 0

    def encode(self, form: int = BLACKWELL_FORM) -> bytes:
        """The 128 bytes of the CUtensorMap; bytes 64–127 are zero. The map is validated first.

        Args:
            form: bits of the flags that say who reads it: those that CuTe DSL's host code writes, or ``HOPPER_FORM``, as a driver on an H200 wrote.
        """
        self.validate()
        kind = KINDS[self.dtype]
        atom = _ATOMS.get(self.swizzle, 0)
        flags = (
            form
            | (self.rank - 1) << 4
            | kind.code << 7
            | int(self.interleave) << 11
            | (3 if atom else int(self.swizzle)) << 13
            | int(self.oob_fill) << 15
            | int(kind.tf32) << 16
            | int(self.l2_promotion) << 17
            | atom << 19
        )
        pad = 5 - self.rank
        strides = [s >> 4 for s in self.strides] + [0] * pad
        sizes = [n - 1 for n in self.sizes] + [0] * pad
        box = [n - 1 for n in self.box] + [0] * pad
        high = sum((s >> 32) << 4 * i for i, s in enumerate(strides))
        steps = sum((n - 1) << 3 * i for i, n in enumerate(self.element_strides)) | box[0] << 24
        words = [flags, *(s & 0xFFFFFFFF for s in strides), high, *sizes, steps]
        return (struct.pack("<Q12I4B", self.address, *words, *box[1:]) + bytes(4)).ljust(128, b"\0")

    @staticmethod
    def decode(data: bytes) -> TensorMap:
        """The map in 128 (or the first 64) bytes. Equal bytes give the same object, so caches inside it persist.

        Raises:
            EmulatorError: not a tiled map, an unknown field value, or a map that the driver would have refused.
        """
        if len(data) < 64:
            raise EmulatorError(f"a tensor map has 128 bytes, {len(data)} given")
        return _decode(bytes(data[:64]))

    # --- tiles ----------------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape of a tile in shared memory before the swizzle: outermost dimension first, the innermost in bytes."""
        counts = [-(-n // step) for n, step in zip(self.box[1:], self.element_strides[1:], strict=True)]
        return (*reversed(counts), self._inner_shared_bytes())

    @cached_property
    def tile_bytes(self) -> int:
        """Bytes of a tile in shared memory."""
        return int(np.prod(self.tile_shape))

    @cached_property
    def transaction_bytes(self) -> int:
        """What a load takes off an mbarrier's transaction count, clipped or not: the tile without the padding of unpacked elements."""
        return self.tile_bytes * self.bits // KINDS[self.dtype].shared_bits

    def shared_granules(self, shared_address: int) -> NDArray[np.intp]:
        """Order in which the 16-byte granules of a tile lie in shared memory.

        Args:
            shared_address: of the tile, absolute in its CTA's shared window; a multiple of 128.

        Returns:
            ``[tile_bytes / 16]``: granule i of the tile in row-major order lies at byte ``shared_address + 16 · result[i]``. Cached,
            read-only.

        Raises:
            EmulatorError: a misaligned address, or a swizzle that is not modelled.
        """
        if shared_address % _SHARED_ALIGNMENT:
            raise EmulatorError(f"shared address {shared_address:#x} of a tensor copy must be a multiple of {_SHARED_ALIGNMENT}")
        return _granules(self.tile_bytes // GRANULE, self.swizzle, shared_address % _PATTERN)


@cache
def _granules(count: int, swizzle: Swizzle, start: int) -> NDArray[np.intp]:
    linear = start + GRANULE * np.arange(count, dtype=np.intp)
    order: NDArray[np.intp] = (swizzle_address(linear, swizzle) - start) // GRANULE
    if order.max() >= count:
        raise EmulatorError(
            f"a tile of {count * GRANULE} bytes, {start} after a multiple of {_PATTERN}, leaves its bytes when swizzled: fill whole lines"
        )
    order.setflags(write=False)
    return order


@cache
def _decode(data: bytes) -> TensorMap:
    address, flags, *words = struct.unpack("<Q12I4B4x", data)
    boxes = words[11:]
    strides_low, high, sizes, steps = words[:4], words[4], words[5:10], words[10]
    if flags & _FORM_BITS not in _FORMS:
        raise EmulatorError(
            f"tensor map: bits 0-3 and 21 of its third word are {flags & _FORM_BITS:#x}, {BLACKWELL_FORM:#x} or {HOPPER_FORM:#x} (tiled) needed;"
            " im2col maps are not modelled"
        )
    rank = (flags >> 4 & 7) + 1
    dtype = _BY_CODE.get((flags >> 7 & 15, bool(flags >> 16 & 1)))
    interleave, swizzle, atom = flags >> 11 & 3, flags >> 13 & 3, flags >> 19 & 3
    if rank > 5 or dtype is None or interleave > 2 or (atom and swizzle != 3) or flags >> 22:
        raise EmulatorError(
            f"tensor map: unknown value in its flags {flags:#010x} (rank {rank}, type {flags >> 7 & 15}, interleave {interleave})"
        )
    if atom:
        swizzle = {code: s for s, code in _ATOMS.items()}[atom]
    box = [(steps >> 24) + 1, *(b + 1 for b in boxes)]
    result = TensorMap(
        address,
        dtype,
        tuple(n + 1 for n in sizes[:rank]),
        tuple((low | (high >> 4 * i & 15) << 32) << 4 for i, low in enumerate(strides_low[: rank - 1])),
        tuple(box[:rank]),
        tuple((steps >> 3 * i & 7) + 1 for i in range(rank)),
        Interleave(interleave),
        Swizzle(swizzle),
        L2Promotion(flags >> 17 & 3),
        OobFill(flags >> 15 & 1),
    )
    result.validate()
    return result
