"""wgmma.mma_async: fragments by the ISA's element formulas, operands in every majorness, products against float64 einsum."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from densemoe.compile.emulator import wgmma
from densemoe.compile.emulator.smem_descriptor import SmemDescriptor
from densemoe.compile.emulator.tensor_map import Swizzle, swizzle_address
from densemoe.runtime.errors import EmulatorError

KINDS = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "s8": np.int8,
    "u8": np.uint8,
}
RESULTS = {"f32": np.float32, "f16": np.float16, "s32": np.int32}
FORMS = [
    (8, "f32", "f16", "f16"),
    (64, "f32", "bf16", "bf16"),
    (256, "f16", "f16", "f16"),
    (24, "f32", "tf32", "tf32"),
    (40, "f32", "e4m3", "e5m2"),
    (16, "f16", "e5m2", "e4m3"),
    (32, "s32", "s8", "u8"),
    (96, "s32", "u8", "u8"),
]


def d_position(warp: int, lane: int, i: int) -> tuple[int, int]:
    """9.7.15.5.1: row and column of element i of D of a lane."""
    return 16 * warp + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + lane % 4 * 2 + i % 2


def a_position(size: int, warp: int, lane: int, i: int) -> tuple[int, int]:
    """Element i of A in registers; `size` bytes an element, 4 / size of them a register."""
    per_word = 4 // size
    register = i // per_word
    return 16 * warp + lane // 4 + 8 * (register % 2), (lane % 4 + 4 * (register // 2)) * per_word + i % per_word


def fragments(matrix: np.ndarray, per_lane: int, position) -> np.ndarray:  # type: ignore[no-untyped-def]
    elements = np.empty((128, per_lane), matrix.dtype)
    for warp, lane, i in itertools.product(range(4), range(32), range(per_lane)):
        elements[32 * warp + lane, i] = matrix[position(warp, lane, i)]
    return np.ascontiguousarray(np.ascontiguousarray(elements).view(np.uint32).T)


def random_elements(rng: np.random.Generator, shape: tuple[int, int], name: str) -> np.ndarray:
    if name in ("s8", "u8"):
        info = np.iinfo(KINDS[name])
        return rng.integers(info.min, info.max + 1, shape).astype(KINDS[name])
    return (rng.integers(-8, 9, shape) / 4).astype(KINDS[name])


def place(shared: np.ndarray, start: int, elements: np.ndarray, swizzle: Swizzle, transposed: bool) -> int:
    """Stores [rows, k] elements in the canonical layout, one element at a time; the descriptor."""
    rows, k = elements.shape
    size = elements.itemsize
    span = {Swizzle.NONE: 16, Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64, Swizzle.BYTES_128: 128}[swizzle]
    if not transposed:
        stride, leading = (128, 128 * -(-rows // 8)) if swizzle is Swizzle.NONE else (8 * span, 16)
    elif swizzle is Swizzle.NONE:
        stride, leading = 128, 128 * -(-rows * size // 16)
    else:
        leading, stride = 8 * span, 8 * span * -(-rows * size // span)
    for row, kk in itertools.product(range(rows), range(k)):
        mn, depth = row * size, kk * size
        if not transposed and swizzle is Swizzle.NONE:
            address = row // 8 * stride + row % 8 * 16 + depth // 16 * leading + depth % 16
        elif not transposed:
            address = row // 8 * stride + row % 8 * span + depth
        elif swizzle is Swizzle.NONE:
            address = mn // 16 * stride + mn % 16 + kk // 8 * leading + kk % 8 * 16
        else:
            address = mn // span * leading + mn % span + kk // 8 * stride + kk % 8 * span
        address = swizzle_address(start + address, swizzle)
        shared[address : address + size] = elements[row : row + 1, kk : kk + 1].view(np.uint8).ravel()
    return SmemDescriptor(start, leading, stride, swizzle).encode_sm90()


@pytest.mark.parametrize(("n", "d_type", "a_type", "b_type"), FORMS)
@pytest.mark.parametrize("swizzle", [Swizzle.NONE, Swizzle.BYTES_32, Swizzle.BYTES_64, Swizzle.BYTES_128])
def test_products_equal_einsum(n: int, d_type: str, a_type: str, b_type: str, swizzle: Swizzle) -> None:
    rng = np.random.default_rng(n)
    instruction = wgmma.make_wgmma(n, d_type, a_type, b_type)
    kind = RESULTS[d_type]
    a, b = random_elements(rng, (64, instruction.k), a_type), random_elements(rng, (n, instruction.k), b_type)
    shared = np.zeros(65536, np.uint8)
    a_bits, b_bits = place(shared, 1024, a, swizzle, False), place(shared, 16384, b, swizzle, False)
    a_shared, b_shared = instruction.a_from_shared(shared, a_bits), instruction.b_from_shared(shared, b_bits)
    per_lane = 64 * instruction.k // 128
    a_registers = instruction.a_from_registers(fragments(a, per_lane, lambda w, t, i: a_position(a.itemsize, w, t, i)))
    np.testing.assert_array_equal(a_shared, a.astype(np.float64))
    np.testing.assert_array_equal(a_registers, a.astype(np.float64))
    np.testing.assert_array_equal(b_shared, b.astype(np.float64))
    old = rng.integers(-40, 40, (64, n)).astype(kind)
    exact = np.einsum("mk,nk->mn", a.astype(np.float64), b.astype(np.float64))
    d = fragments(old, n // 2, d_position)
    assert d.shape == (instruction.d_registers, 128)
    keep = d.copy()
    result = instruction.multiply(a_registers, b_shared, d)
    np.testing.assert_array_equal(d, keep)
    np.testing.assert_array_equal(result, fragments((exact + old.astype(np.float64)).astype(kind), n // 2, d_position))
    np.testing.assert_array_equal(instruction.multiply(a_shared, b_shared, None), fragments(exact.astype(kind), n // 2, d_position))
    if d_type != "s32":
        negated = instruction.multiply(a_shared, b_shared, d, -1, 1)
        np.testing.assert_array_equal(negated, fragments((old.astype(np.float64) - exact).astype(kind), n // 2, d_position))
        np.testing.assert_array_equal(instruction.multiply(a_shared, b_shared, d, -1, -1), result)


@pytest.mark.parametrize("swizzle", [Swizzle.NONE, Swizzle.BYTES_32, Swizzle.BYTES_64, Swizzle.BYTES_128])
@pytest.mark.parametrize("n", [64, 128])
def test_sixteen_bit_operands_may_be_transposed(swizzle: Swizzle, n: int) -> None:
    rng = np.random.default_rng(n)
    instruction = wgmma.make_wgmma(n, "f32", "bf16", "bf16")
    a, b = random_elements(rng, (64, 16), "bf16"), random_elements(rng, (n, 16), "bf16")
    shared = np.zeros(65536, np.uint8)
    a_bits, b_bits = place(shared, 1024, a, swizzle, True), place(shared, 16384, b, swizzle, True)
    np.testing.assert_array_equal(instruction.a_from_shared(shared, a_bits, True), a.astype(np.float64))
    np.testing.assert_array_equal(instruction.b_from_shared(shared, b_bits, True), b.astype(np.float64))
    with pytest.raises(EmulatorError, match="16-bit"):
        wgmma.make_wgmma(n, "f32", "tf32", "tf32").b_from_shared(shared, b_bits, True)


def test_d_fragments_are_a_bijection() -> None:
    for n in (8, 64, 256):
        places = [d_position(w, t, i) for w in range(4) for t in range(32) for i in range(n // 2)]
        assert sorted(places) == list(itertools.product(range(64), range(n)))


def test_integers_wrap_or_saturate_and_nan_is_canonical() -> None:
    a, b = np.full((64, 32), 127.0), np.full((8, 32), 127.0)
    d = np.full((4, 128), 0x7FFFFFFF, np.uint32)
    np.testing.assert_array_equal(wgmma.make_wgmma(8, "s32", "s8", "s8").multiply(a, b, d), 0x7FFFFFFF + 32 * 127 * 127)
    np.testing.assert_array_equal(wgmma.make_wgmma(8, "s32", "s8", "s8", saturate=True).multiply(a, b, d), 0x7FFFFFFF)
    a[3, 5] = np.nan
    result = wgmma.make_wgmma(8, "f32", "e4m3", "e4m3").multiply(a, b, None)
    assert np.count_nonzero(result == 0x7FFFFFFF) == 8
    halves = wgmma.make_wgmma(8, "f16", "e4m3", "e4m3").multiply(a, b, None).view(np.uint16)
    assert np.count_nonzero(halves == 0x7FFF) == 8
    assert np.count_nonzero(halves == 0x7C00) == 64 * 8 - 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((12, "f32", "f16", "f16"), "multiple of 8"),
        ((264, "f32", "f16", "f16"), "up to 256"),
        ((40, "s32", "s8", "s8"), "of 16 above 32"),
        ((64, "f16", "bf16", "bf16"), "D is f32"),
        ((64, "f32", "f16", "bf16"), "with themselves"),
        ((64, "f32", "f16", "f16", 8), "k is 16"),
        ((64, "f32", "f16", "f16", 16, True), "satfinite"),
    ],
)
def test_other_forms_are_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        wgmma.make_wgmma(*arguments)  # type: ignore[arg-type]
    instruction = wgmma.make_wgmma(8, "s32", "s8", "s8")
    with pytest.raises(EmulatorError, match="imm-scale"):
        instruction.multiply(np.zeros((64, 32)), np.zeros((8, 32)), None, -1, 1)
