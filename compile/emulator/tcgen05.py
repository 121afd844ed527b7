"""``tcgen05.mma``: instruction descriptors, operands, scale factors and the product.

Sources: PTX ISA 9.x, 9.7.16.2.1 (shapes), 9.7.16.4.2 (instruction descriptor), 9.7.16.10.1–10.7 (transpose, negate, packing, block
    scaling, scale factor layouts and ids), 9.7.16.10.9 (``tcgen05.mma``, ``.ws``). Not modelled, and refused: sparse A, K = 96,
    ``.ashift``, 4- and 6-bit A in tensor memory.

An instruction is: `decode_instruction`, per CTA `operand_bytes` of A and B, `decode_operand` (and `scale_operand`), then `accumulate` on
    that CTA's tensor memory. Decoded operands are float64 ``[rows, k]`` and may be kept by the caller as long as their bytes do not
    change. With ``cta_group::2`` each CTA supplies its own M / 2 rows of A, both CTAs N / 2 rows of B each (concatenate the two), and
    each accumulates its own rows into its own memory.

Numerical model: products are exact, their sum and D are added in float64 and rounded once an instruction to D's type. A real tensor core
    adds with fewer bits; both agree whenever all partial sums are exact in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.formats import E2M1_PAIRS, decode_bytes, decode_table, decode_table64
from densemoe.compile.emulator.mma import round_accumulator
from densemoe.compile.emulator.smem_descriptor import decode_sm100, gather_operand
from densemoe.compile.emulator.tensor_memory import COLUMNS, AccumulatorLayout, accumulator_layout, split_address
from densemoe.runtime.errors import EmulatorError

__all__ = [
    "InstructionDescriptor",
    "accumulate",
    "decode_instruction",
    "decode_operand",
    "element_bytes",
    "exact_in_float32",
    "operand_bytes",
    "operand_in_tensor_memory",
    "read_scales",
    "scale_operand",
    "scale_vector_length",
]

Bytes = NDArray[np.uint8]
Matrix = NDArray[np.floating[Any]]  # float64, or float32 where sums are exact in it

_F8F6F4 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_D_FORMATS = {0: "f16", 1: "f32", 2: "s32"}


@dataclass(frozen=True)
class _Kind:
    """A ``.kind``: depth, element formats by code, formats of D, and what its descriptor may hold."""

    k: int
    formats: dict[int, str]
    d_formats: tuple[str, ...]
    reserved: int
    block_scaled: bool = False
    negate: bool = True


_KINDS: dict[str, _Kind] = {
    "f16": _Kind(16, {0: "f16", 1: "bf16"}, ("f16", "f32"), 0x2080_0048),
    "tf32": _Kind(8, {2: "tf32"}, ("f32",), 0x2080_0048),
    "f8f6f4": _Kind(32, _F8F6F4, ("f16", "f32"), 0x2080_0048),
    "i8": _Kind(32, {0: "u8", 1: "s8"}, ("s32",), 0x2080_0040, negate=False),
    "mxf8f6f4": _Kind(32, _F8F6F4, ("f32",), 0x8700_004B, True),
    "mxf4": _Kind(64, {1: "e2m1"}, ("f32",), 0x0701_804B, True),
    "mxf4nvf4": _Kind(64, {1: "e2m1"}, ("f32",), 0x0701_804B, True),
}
_TRANSPOSABLE = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1}  # bytes of an element of MN-major operands
_PACKED_BITS = {"e2m1": 4, "e2m3": 6, "e3m2": 6}
_K_BYTES = 32  # of one row of A or B in shared memory, for every dense kind with K other than 96


@dataclass(frozen=True)
class InstructionDescriptor:
    """A decoded 32-bit instruction descriptor.

    Attributes:
        kind: without ``.kind::``.
        m, n, k: shape of the instruction (of both CTAs together with ``cta_group`` 2).
        cta_group: 1 or 2.
        weight_stationary: ``.ws``.
        a_format, b_format: ``f16 bf16 tf32 e4m3 e5m2 e2m3 e3m2 e2m1 u8 s8``.
        d_format: ``f32``, ``f16`` or ``s32``.
        negate_a, negate_b, transpose_a, transpose_b: transposed means MN-major.
        saturate: clamp s32 results.
        scale_format: ``ue4m3`` or ``ue8m0`` of block-scaled kinds, else "".
        a_scale_id, b_scale_id: byte of a tensor memory word at which the scale factors start.
    """

    kind: str
    m: int
    n: int
    k: int
    cta_group: int
    weight_stationary: bool
    a_format: str
    b_format: str
    d_format: str
    negate_a: bool = False
    negate_b: bool = False
    transpose_a: bool = False
    transpose_b: bool = False
    saturate: bool = False
    scale_format: str = ""
    a_scale_id: int = 0
    b_scale_id: int = 0

    @property
    def layout(self) -> AccumulatorLayout:
        """Where each CTA's part of D lies in its tensor memory."""
        return accumulator_layout(self.m, self.cta_group, self.weight_stationary)

    @property
    def a_rows(self) -> int:
        """Rows of A that each CTA supplies."""
        return self.m // self.cta_group

    @property
    def b_rows(self) -> int:
        """Rows of B (columns of D) that each CTA supplies."""
        return self.n // self.cta_group

    def encode(self) -> int:
        """The 32-bit value."""
        kind = _KINDS[self.kind]
        codes = {name: code for code, name in kind.formats.items()}
        bits = codes[self.a_format] << 7 | codes[self.b_format] << 10 | self.negate_a << 13 | self.negate_b << 14
        bits |= self.transpose_a << 15 | self.transpose_b << 16 | self.n >> 3 << 17
        if kind.block_scaled:
            return bits | self.b_scale_id << 4 | (self.scale_format == "ue8m0") << 23 | self.m >> 7 << 27 | self.a_scale_id << 29
        d_codes = {name: code for code, name in _D_FORMATS.items()}
        return bits | self.saturate << 3 | d_codes[self.d_format] << 4 | self.m >> 4 << 24


@cache
def decode_instruction(bits: int, kind: str, cta_group: int = 1, weight_stationary: bool = False) -> InstructionDescriptor:
    """Decodes and checks an instruction descriptor (PTX ISA 9.7.16.4.2, tables of each kind).

    Args:
        bits: the operand ``idesc``.
        kind: ``f16 tf32 f8f6f4 i8 mxf8f6f4 mxf4 mxf4nvf4``.
        cta_group: 1 or 2.
        weight_stationary: the instruction is ``tcgen05.mma.ws``.

    Raises:
        EmulatorError: reserved bits, a value or a shape that the kind does not allow, or a form that is not modelled (sparse, K = 96).
    """
    text = f"tcgen05.mma{'.ws' if weight_stationary else ''}.cta_group::{cta_group}.kind::{kind}, descriptor {bits:#010x}"
    if kind not in _KINDS:
        raise EmulatorError(f"{text}: unknown kind, use one of {', '.join(_KINDS)}")
    known = _KINDS[kind]

    def check(ok: bool, reason: str) -> None:
        if not ok:
            raise EmulatorError(f"{text}: {reason}")

    check(not bits & 4, "sparse A is not modelled")
    check(not bits & known.reserved, f"reserved bits {bits & known.reserved:#x} are set, 0 needed")
    # bit 12 of the mxf4 kinds is the sparsity version, which dense products ignore; NVIDIA's descriptor builder sets it
    b_field = bits >> 10 & (3 if kind.startswith("mxf4") else 7)
    a_format, b_format = known.formats.get(bits >> 7 & 7), known.formats.get(b_field)
    if a_format is None or b_format is None:
        raise EmulatorError(f"{text}: formats {bits >> 7 & 7} and {b_field}, allowed {known.formats}")
    negate_a, negate_b, transpose_a, transpose_b = (bool(bits >> i & 1) for i in (13, 14, 15, 16))
    check(known.negate or not (negate_a or negate_b), "this kind cannot negate")
    for name, transposed in ((a_format, transpose_a), (b_format, transpose_b)):
        check(not transposed or name in _TRANSPOSABLE, f"{name} operands cannot be transposed")
    n = (bits >> 17 & 63) << 3
    scale_format, a_id, b_id, saturate = "", 0, 0, False
    if known.block_scaled:
        check(not bits >> 31, "K = 96 is not modelled")
        m, d_format = (bits >> 27 & 3) << 7, "f32"
        scale_format = "ue8m0" if bits >> 23 & 1 else "ue4m3"
        a_id, b_id = bits >> 29 & 3, bits >> 4 & 3
        check(scale_format == "ue8m0" or kind == "mxf4nvf4", "scale type UE4M3 (bit 23 = 0) is for mxf4nvf4 alone")
        check(kind == "mxf8f6f4" or (a_id % 2 == 0 and b_id % 2 == 0), f"scale factor ids {a_id} and {b_id}, 0 or 2 needed")
    else:
        m, saturate = (bits >> 24 & 31) << 4, bool(bits >> 3 & 1)
        d_format = _D_FORMATS.get(bits >> 4 & 3, "")
        check(d_format in known.d_formats, f"D type {bits >> 4 & 3} is not {' or '.join(known.d_formats)}")
        check(weight_stationary or not bits >> 30, "bits 30-31 (shift) are for .ws")
        check(d_format != "f16" or kind != "f16" or (a_format == b_format == "f16"), "an f16 D needs f16 operands")
    shapes = {1: (128,) if known.block_scaled else (64, 128), 2: (128, 256)}
    check(m in ((32, 64, 128) if weight_stationary else shapes.get(cta_group, ())), f"M = {m} is not allowed")
    check(not (known.block_scaled and cta_group == 2 and m == 128), "block-scaled M = 128 over two CTAs is not modelled")
    check(not weight_stationary or (cta_group == 1 and not known.block_scaled), ".ws has cta_group::1 and no block scaling")
    step = 8 * cta_group if kind != "i8" else 16 * cta_group
    allowed_n = (
        n in (64, 128, 256)
        if weight_stationary
        else (0 < n <= 256 and (n % step == 0 or (kind == "i8" and cta_group == 1 and n in (8, 24))))
    )
    check(allowed_n, f"N = {n}, {'64, 128 or 256' if weight_stationary else f'a multiple of {step} up to 256'} needed")
    if transpose_b and _TRANSPOSABLE[b_format] == 1:
        check(n % (16 * cta_group) == 0, f"N = {n} with transposed 8-bit B, a multiple of {16 * cta_group} needed")
    return InstructionDescriptor(
        kind, m, n, known.k, cta_group, weight_stationary, a_format, b_format, d_format,
        negate_a, negate_b, transpose_a, transpose_b, saturate, scale_format, a_id, b_id,
    )  # fmt: skip


def element_bytes(name: str) -> int:
    """Bytes of an element of an MN-major operand."""
    return _TRANSPOSABLE[name]


# --- operands ---------------------------------------------------------------------------------------------------------


def operand_bytes(shared: Bytes, bits: int, descriptor: InstructionDescriptor, operand: str) -> Bytes:
    """The bytes that one CTA supplies of A or B, K contiguous: uint8 ``[rows, 32]``.

    Args:
        shared: the CTA's shared window (uint8, index = shared address).
        bits: its matrix descriptor.
        descriptor: the instruction's.
        operand: ``"a"`` or ``"b"``.

    Raises:
        EmulatorError: a bad matrix descriptor, or a swizzle that the operand's majorness does not allow.
    """
    rows, name, transposed = (
        (descriptor.a_rows, descriptor.a_format, descriptor.transpose_a)
        if operand == "a"
        else (descriptor.b_rows, descriptor.b_format, descriptor.transpose_b)
    )
    return gather_operand(shared, decode_sm100(bits), rows, _K_BYTES, _TRANSPOSABLE[name] if transposed else 0)


def operand_in_tensor_memory(memory: NDArray[np.uint32], address: int, descriptor: InstructionDescriptor) -> Bytes:
    """A from tensor memory (``[a-tmem]``), uint8 ``[rows, 32]``: row i in the lane of D's row i, K packed along 8 columns.

    Raises:
        EmulatorError: 4- or 6-bit formats of f8f6f4, or a layout with N in pieces (not modelled); an address outside of the memory.
    """
    if descriptor.transpose_a or (descriptor.a_format in _PACKED_BITS and descriptor.kind.endswith("f8f6f4")):
        raise EmulatorError(
            f"A in tensor memory as {descriptor.a_format}{', transposed' if descriptor.transpose_a else ''} is not modelled"
        )
    layout = descriptor.layout
    if layout.parts > 1:
        raise EmulatorError(f"A in tensor memory with layout {layout.name} is not modelled")
    words = np.ascontiguousarray(layout.read(memory, address, _K_BYTES // 4))
    return words.view(np.uint8)


def decode_operand(data: Bytes, name: str, kind: str, dtype: type[np.floating[Any]] = np.float64) -> Matrix:
    """Values of an operand, ``[rows, k]``, exactly.

    Args:
        data: uint8 ``[rows, 32]`` from `operand_bytes`.
        name: its format.
        kind: with f8f6f4 and mxf8f6f4, 16 elements of 4 or 6 bits lie in the first 8 or 12 of every 16 bytes; with mxf4 kinds 4 bits are
            packed densely.
        dtype: of the values; float32 for packed 4-bit elements alone.
    """
    rows = data.shape[0]
    if dtype is np.float32:
        return _pairs_as_words().take(data).view(np.float32)
    if name == "e2m1":
        packed = data if kind.startswith("mxf4") else np.ascontiguousarray(data.reshape(rows, 2, 16)[..., :8])
        return _pairs64().take(packed, axis=0).reshape(rows, -1)
    if name in _PACKED_BITS:
        groups = np.ascontiguousarray(data.reshape(rows, 2, 16)[..., :12]).reshape(rows, 8, 3).astype(np.uint32)
        triple = groups[..., 0] | groups[..., 1] << np.uint32(8) | groups[..., 2] << np.uint32(16)
        codes = triple[..., None] >> np.array([0, 6, 12, 18], np.uint32) & np.uint32(63)
        return decode_table64(name).take(codes).reshape(rows, 32)
    return decode_bytes(data, name)


@cache
def _pairs64() -> NDArray[np.float64]:
    return E2M1_PAIRS.astype(np.float64)


@cache
def _pairs_as_words() -> NDArray[np.uint64]:
    """The two float32 of each byte as one word."""
    return np.ascontiguousarray(E2M1_PAIRS).view(np.uint64).reshape(-1)


# --- scale factors ----------------------------------------------------------------------------------------------------


def scale_vector_length(descriptor: InstructionDescriptor, qualifier: str) -> int:
    """Scale factors a row has: the X of ``.scale_vec::NX`` (PTX ISA 9.7.16.10.7.1).

    Args:
        qualifier: ``scale_vec::1X``, ``scale_vec::2X``, ``scale_vec::4X``, ``block16``, ``block32``, or "" where the instruction has none.

    Raises:
        EmulatorError: a combination of kind, scale type and vector size that does not exist.
    """
    names = {"mxf8f6f4": {"scale_vec::1X": 1, "block32": 1, "": 1}, "mxf4": {"scale_vec::2X": 2, "block32": 2, "": 2}}
    lengths = names.get(descriptor.kind, {"scale_vec::2X": 2, "block32": 2, "scale_vec::4X": 4, "block16": 4})
    length = lengths.get(qualifier, 0) if descriptor.scale_format else 0
    if not length or (descriptor.scale_format == "ue4m3" and length != 4):
        raise EmulatorError(
            f"kind::{descriptor.kind} with scale type {descriptor.scale_format or 'none'} and scale vector {qualifier or 'none'} does not exist"
        )
    if length == 4 and (descriptor.a_scale_id or descriptor.b_scale_id):
        raise EmulatorError(f"scale factor ids {descriptor.a_scale_id} and {descriptor.b_scale_id} with scale_vec::4X, 0 needed")
    return length


def read_scales(memory: NDArray[np.uint32], address: int, rows: int, length: int, scale_id: int) -> Bytes:
    """Scale factors of A or B, uint8 ``[rows, length]`` (PTX ISA 9.7.16.10.7.2 and .3).

    Row r lies in lane r % 32, column base + r / 32, bytes scale_id … of the word; only ⌈rows / 32⌉ columns are read.

    Args:
        memory: uint32 ``[128, 512]`` of the CTA that accumulates.
        address: the operand ``scale-A-tmem`` or ``scale-B-tmem``; its bits 30–31 hold the scale factor id.
        rows: 128 for A, N for B.
        length: from `scale_vector_length`.
        scale_id: the id in the instruction descriptor.

    Raises:
        EmulatorError: ids that differ, a lane other than 0, columns outside of the memory, or copies in the four lane quarters that differ.
    """
    if address >> 30 != scale_id:
        raise EmulatorError(
            f"scale factor id {address >> 30} in address {address:#010x} differs from {scale_id} in the instruction descriptor"
        )
    lane, column = split_address(address & 0x3FFFFFFF)
    columns = -(-rows // 32)
    if lane or column + columns > COLUMNS:
        raise EmulatorError(
            f"scale factors at lane {lane}, columns {column} to {column + columns - 1}: lane 0 and at most column {COLUMNS - 1} needed"
        )
    words = memory[:, column : column + columns].reshape(4, 32, columns)
    quarter = words[0]
    used, data = _scale_mask(rows, length, scale_id), words.tobytes()
    if data != 4 * data[: len(data) // 4] and ((words[1:] ^ quarter) & used).any():
        wrong = int(np.argwhere(((words ^ quarter) & used).any(axis=(1, 2)))[0][0])
        raise EmulatorError(
            f"scale factors at column {column} differ between lanes 0-31 and lanes {32 * wrong}-{32 * wrong + 31}: copy them to all four"
        )
    by_row = np.ascontiguousarray(quarter.T).view(np.uint8).reshape(32 * columns, 4)
    return by_row[:rows, scale_id : scale_id + length]


@cache
def _scale_mask(rows: int, length: int, scale_id: int) -> NDArray[np.uint32]:
    """Bits of the cells ``[32, columns]`` of one lane quarter that hold scale factors."""
    row = np.arange(-(-rows // 32)) * 32 + np.arange(32)[:, None]
    return np.where(row < rows, np.uint32((1 << 8 * length) - 1 << 8 * scale_id), np.uint32(0))


def scale_operand(values: Matrix, scales: Bytes, scale_format: str) -> Matrix:
    """Decoded values times their block scales, exact in float64; in float32 too for UE4M3, whose products have 6 significant bits.

    Args:
        values: ``[rows, k]`` from `decode_operand`.
        scales: uint8 ``[rows, length]`` from `read_scales`; each applies to k / length consecutive elements.
        scale_format: ``ue4m3`` or ``ue8m0``.
    """
    rows, k = values.shape
    table: NDArray[Any] = decode_table64(scale_format) if values.dtype == np.float64 else decode_table(scale_format)
    factors = table.take(scales)
    return (values.reshape(rows, scales.shape[1], -1) * factors[..., None]).reshape(rows, k)


def exact_in_float32(a_scales: Bytes, b_scales: Bytes, descriptor: InstructionDescriptor) -> bool:
    """Whether the sum of products, in any order, is exact in float32, from the scale factors of A and B alone; never for UE8M0.

    Elements are multiples of 1/2 up to 6, so a product is a multiple of u/4 up to 36 s, with u the product of the greatest powers of two that divide
    all scale factors of A and of B, and s the product of the largest ones: exact where K · 36 s ≤ 2^24 · u/4.
    """
    if descriptor.scale_format != "ue4m3":
        return False
    (a_largest, a_unit), (b_largest, b_unit) = _range_of(a_scales.tobytes()), _range_of(b_scales.tobytes())
    return descriptor.k * 36 * a_largest * b_largest <= 2**22 * a_unit * b_unit


@lru_cache(maxsize=4096)
def _range_of(scales: bytes) -> tuple[float, float]:
    """The largest of some UE4M3 codes' values, and the greatest power of two that divides all of them."""
    codes = np.frombuffer(scales, np.uint8)
    return float(_E4M3_SIZES[codes.max()]), float(_E4M3_UNITS.take(codes).min())


def _e4m3_units() -> NDArray[np.float32]:
    """The greatest power of two that divides each UE4M3 value; infinite for 0."""
    code = np.arange(256)
    mantissa, exponent = code % 8 + 8 * (code % 128 >= 8), np.maximum(code % 128 // 8, 1)
    return np.where(mantissa == 0, np.inf, np.ldexp((mantissa & -mantissa).astype(np.float32), exponent - 10)).astype(np.float32)


#: By code; what is no number, or has bit 7 set, counts as infinite, so that nothing is exact.
_E4M3_SIZES = np.where(np.arange(256) < 0x7F, decode_table("ue4m3"), np.float32(np.inf))
_E4M3_UNITS = _e4m3_units()


# --- product ----------------------------------------------------------------------------------------------------------


def accumulate(
    memory: NDArray[np.uint32],
    address: int,
    descriptor: InstructionDescriptor,
    a: Matrix,
    b: Matrix,
    add: bool,
    scale_input_d: int = 0,
    disabled_lanes: NDArray[np.bool_] | None = None,
) -> None:
    """D = A·Bᵀ (+ D) in one CTA's tensor memory.

    Args:
        memory: uint32 ``[128, 512]``.
        address: of D.
        descriptor: the instruction's.
        a: ``[m / cta_group, k]``, this CTA's rows, scaled; float64, or, as b, float32 where the sum of products is exact in it.
        b: ``[n, k]``, of all CTAs, scaled.
        add: ``enable-input-d``; false overwrites D.
        scale_input_d: D is multiplied by 2^-scale_input_d first (f16 and tf32 kinds).
        disabled_lanes: bool ``[128]``, lanes that keep their content (``disable-output-lane``).

    Raises:
        EmulatorError: operands of another shape, or D outside of the memory.
    """
    layout = descriptor.layout
    if a.shape != (layout.rows, b.shape[1]) or b.shape[0] != descriptor.n:
        raise EmulatorError(
            f"operands {a.shape} and {b.shape} for M = {descriptor.m}, N = {descriptor.n}: [{layout.rows}, k] and [{descriptor.n}, k] needed"
        )
    if scale_input_d and (descriptor.kind not in ("f16", "tf32") or not 0 <= scale_input_d <= 15):
        raise EmulatorError(f"scale-input-d {scale_input_d} with kind::{descriptor.kind}: 0 to 15 with f16 or tf32")
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.matmul(a, b.T)
        if descriptor.negate_a != descriptor.negate_b:
            np.negative(sums, out=sums)
        if add:
            previous = _accumulator_values(layout.read(memory, address, descriptor.n), descriptor.d_format)
            sums += previous if not scale_input_d else np.ldexp(previous, -scale_input_d)
        words: NDArray[np.uint32]
        if descriptor.d_format == "f32":
            words = round_accumulator(sums).view(np.uint32)
        elif descriptor.d_format == "f16":  # one element in the lower half of each word
            halves = sums.astype(np.float16)
            halves[np.isnan(halves)] = np.uint16(0x7FFF).view(np.float16)
            words = halves.view(np.uint16).astype(np.uint32)
        else:
            if descriptor.saturate:
                sums = np.clip(sums, -(2.0**31), 2.0**31 - 1)
            words = sums.astype(np.int64).astype(np.uint32)
    layout.write(memory, address, words, disabled_lanes)


def _accumulator_values(words: NDArray[np.uint32], d_format: str) -> NDArray[Any]:
    if d_format == "f16":
        return words.astype(np.uint16).view(np.float16).astype(np.float32)
    values: NDArray[Any] = words.view(np.float32 if d_format == "f32" else np.int32)
    return values
