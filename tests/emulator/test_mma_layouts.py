"""mma.sync fragments, ldmatrix and stmatrix against formulas written element by element from the PTX ISA."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from densemoe.compile.emulator import mma
from densemoe.runtime.errors import EmulatorError

KINDS = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "s8": np.int8,
    "u8": np.uint8,
}
FORMS = [
    (8, "f16", "f16", "f32"),
    (16, "f16", "f16", "f32"),
    (8, "f16", "f16", "f16"),
    (16, "f16", "f16", "f16"),
    (8, "bf16", "bf16", "f32"),
    (16, "bf16", "bf16", "f32"),
    (4, "tf32", "tf32", "f32"),
    (8, "tf32", "tf32", "f32"),
    (16, "e4m3", "e4m3", "f32"),
    (32, "e4m3", "e5m2", "f32"),
    (32, "e5m2", "e4m3", "f16"),
    (16, "s8", "u8", "s32"),
    (32, "u8", "s8", "s32"),
]


def a_position(bits: int, lane: int, i: int) -> tuple[int, int]:
    """Row and column of element a_i of a lane, as 9.7.14.5 writes them for each element width (k4/k8 tf32, k8/k16 16-bit, k16/k32
    8-bit)."""
    group, thread = lane >> 2, lane % 4
    if bits == 32:
        return group + (8 if i in (1, 3) else 0), thread + (4 if i >= 2 else 0)
    if bits == 16:
        return group + (0 if i < 2 or 4 <= i < 6 else 8), thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    return group + (0 if i < 4 or 8 <= i < 12 else 8), thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_position(bits: int, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    if bits == 32:
        return thread + 4 * i, group
    if bits == 16:
        return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def c_position(lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return group + (8 if i >= 2 else 0), thread * 2 + (i & 1)


def bits_of(name: str) -> int:
    return 32 if name == "tf32" else np.dtype(KINDS[name]).itemsize * 8


def random_elements(rng: np.random.Generator, shape: tuple[int, ...], name: str) -> np.ndarray:
    if name == "tf32":
        return (rng.integers(-64, 64, shape) / 8).astype(np.float32)
    if name in ("s8", "u8"):
        info = np.iinfo(KINDS[name])
        return rng.integers(info.min, info.max + 1, shape).astype(KINDS[name])
    return (rng.integers(-16, 17, shape) / 4).astype(KINDS[name])


def scatter(matrix: np.ndarray, name: str, count: int, position) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Registers [count, 32] of a matrix of elements."""
    bits = bits_of(name) if name not in ("f32", "s32") else 32
    per_lane = count * 32 // bits
    fragment = np.empty((32, per_lane), matrix.dtype)
    for lane in range(32):
        for i in range(per_lane):
            fragment[lane, i] = matrix[position(lane, i)]
    return np.ascontiguousarray(fragment).view(np.uint32).T.copy()


@pytest.mark.parametrize(("k", "a_type", "b_type", "c_type"), FORMS)
def test_product_equals_einsum_on_fragments_scattered_element_by_element(k: int, a_type: str, b_type: str, c_type: str) -> None:
    rng = np.random.default_rng(k)
    instruction = mma.make_mma(k, a_type, b_type, c_type)
    kind = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[c_type]
    batch, expected, stacks = 3, [], ([], [], [])
    for _ in range(batch):
        a, b = random_elements(rng, (16, k), a_type), random_elements(rng, (k, 8), b_type)
        c = rng.integers(-100, 100, (16, 8)).astype(kind)
        stacks[0].append(scatter(a, a_type, instruction.a_registers, lambda lane, i: a_position(bits_of(a_type), lane, i)))
        stacks[1].append(scatter(b, b_type, instruction.b_registers, lambda lane, i: b_position(bits_of(b_type), lane, i)))
        stacks[2].append(scatter(c, c_type, instruction.c_registers, c_position))
        d = np.einsum("mk,kn->mn", a.astype(np.float64), b.astype(np.float64)) + c.astype(np.float64)
        expected.append(scatter(d.astype(kind), c_type, instruction.c_registers, c_position))
    for a_words, b_words, c_words, want in zip(*stacks, expected, strict=True):
        result = instruction(a_words, b_words, c_words)
        assert result.dtype == np.uint32
        assert result.shape == (instruction.c_registers, 32)
        np.testing.assert_array_equal(result, want)
    together = instruction(*(np.stack(s, axis=1) for s in stacks))
    np.testing.assert_array_equal(together, np.stack(expected, axis=1))


def test_products_are_exact_and_rounded_once() -> None:
    """2^12 + 2^-12 squared times 16 needs 49 bits; C cancels the leading part."""
    instruction = mma.make_mma(8, "tf32", "tf32", "f32")
    one = np.float32(1 + 2.0**-10).view(np.uint32)
    a, b = np.full((4, 32), one, np.uint32), np.full((2, 32), one, np.uint32)
    c = np.full((4, 32), np.float32(-8).view(np.uint32), np.uint32)
    expected = np.float32(8 * (1 + 2.0**-10) ** 2 - 8)
    np.testing.assert_array_equal(instruction(a, b, c).view(np.float32), expected)


def test_tf32_ignores_the_lower_bits() -> None:
    instruction = mma.make_mma(4, "tf32", "tf32", "f32")
    dirty = np.full((2, 32), 0x3F801FFF, np.uint32)
    zero = np.zeros((4, 32), np.uint32)
    np.testing.assert_array_equal(instruction(dirty, dirty[:1], zero).view(np.float32), 4.0)


def test_nan_is_canonical_and_overflow_is_infinite() -> None:
    instruction = mma.make_mma(16, "bf16", "bf16", "f32")
    a, b, c = np.zeros((4, 32), np.uint32), np.zeros((2, 32), np.uint32), np.zeros((4, 32), np.uint32)
    a[0, 0] = 0x7FA1  # row 0, k 0: a NaN with a payload
    assert (instruction(a, b, c)[:2, :4] == 0x7FFFFFFF).all()
    a[:], b[:] = 0x7F007F00, 0x7F007F00
    np.testing.assert_array_equal(instruction(a, b, c), 0x7F800000)


def test_integer_accumulators_wrap_or_saturate() -> None:
    a, b = np.full((4, 32), 0x7F7F7F7F, np.uint32), np.full((2, 32), 0x7F7F7F7F, np.uint32)
    c = np.full((4, 32), 0x7FFFFFFF, np.uint32)
    total = 32 * 127 * 127
    np.testing.assert_array_equal(mma.make_mma(32, "s8", "s8", "s32")(a, b, c), 0x7FFFFFFF + total)
    np.testing.assert_array_equal(mma.make_mma(32, "s8", "s8", "s32", saturate=True)(a, b, c), 0x7FFFFFFF)


@pytest.mark.parametrize(
    "form",
    [
        (16, "f16", "bf16", "f32"),
        (16, "bf16", "bf16", "f16"),
        (32, "f16", "f16", "f32"),
        (16, "f16", "f16", "f32", "f16"),
        (8, "f64", "f64", "f64"),
    ],
)
def test_other_forms_are_errors_that_name_the_instruction(form: tuple[object, ...]) -> None:
    with pytest.raises(EmulatorError, match=f"m16n8k{form[0]}"):
        mma.make_mma(*form)  # type: ignore[arg-type]
    with pytest.raises(EmulatorError, match="satfinite"):
        mma.make_mma(16, "f16", "f16", "f32", saturate=True)


def gather(memory: np.ndarray, addresses: np.ndarray, unit: int) -> np.ndarray:
    """Registers from byte addresses [..., 4/unit]."""
    byte = addresses[..., None] + np.arange(unit)
    return memory[byte].reshape(*addresses.shape[:-1], 4).view(np.uint32)[..., 0]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix_gives_each_lane_its_elements(count: int, transpose: bool) -> None:
    """9.7.14.5.15: lane holds row lane / 4, elements 2·(lane % 4) and the next; with .trans the same of the transposed matrix."""
    rng = np.random.default_rng(count)
    memory = rng.integers(0, 256, 4096).astype(np.uint8)
    rows = rng.permutation(256)[:32] * 16
    addresses, unit = mma.ldmatrix_addresses(rows, count, transpose)
    registers = gather(memory, addresses, unit)
    assert registers.shape == (count, 32)
    for j in range(count):
        matrix = np.stack([memory[rows[8 * j + r] :][:16].view(np.uint16) for r in range(8)])
        if transpose:
            matrix = matrix.T
        for lane in range(32):
            low, high = (int(matrix[lane // 4, 2 * (lane % 4) + i]) for i in range(2))
            assert registers[j, lane] == low | high << 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transpose", [False, True])
def test_stmatrix_addresses_are_a_bijection_and_the_inverse_of_ldmatrix(count: int, transpose: bool) -> None:
    rows = np.random.default_rng(9).permutation(32) * 16
    addresses, unit = mma.stmatrix_addresses(rows, count, transpose)
    touched = np.sort((addresses[..., None] + np.arange(unit)).ravel())
    expected = np.sort((rows[: 8 * count, None] + np.arange(16)).ravel())
    np.testing.assert_array_equal(touched, expected)
    back, back_unit = mma.ldmatrix_addresses(rows, count, transpose)
    np.testing.assert_array_equal(back, addresses)
    assert back_unit == unit


def test_byte_forms_cover_their_matrices_once() -> None:
    """b8 transposed: a register holds bytes of two memory rows, at columns g and g + 8 (CuTe SM100_U8x8_LDSM_T, SM100_U8x4_STSM_T)."""
    rows = np.arange(32) * 16
    loads, unit = mma.ldmatrix_addresses(rows, 2, True, "b8")
    assert (loads.shape, unit) == ((4, 32, 4), 1)
    np.testing.assert_array_equal(np.sort(loads.ravel()), np.arange(512))
    np.testing.assert_array_equal(np.sort(mma.ldmatrix_addresses(rows, 1, True, "b8")[0].ravel()), np.arange(256))
    lane = 4 * 3 + 2  # g = 3, t = 2
    assert (loads[1, lane] // 16).tolist() == [10, 11, 10, 11]
    assert (loads[1, lane] % 16).tolist() == [3, 3, 11, 11]
    stores, unit = mma.stmatrix_addresses(rows, 4, True, "b8")
    assert (stores.shape, unit) == ((4, 32, 4), 1)
    np.testing.assert_array_equal(np.sort(stores.ravel()), np.arange(512))
    assert (stores[1, lane] // 16).tolist() == [12, 13, 12, 13]


def test_matrix_rows_may_be_batched_by_warp() -> None:
    rows = np.stack([np.arange(32) * 16, np.arange(32)[::-1] * 16])
    both, _ = mma.ldmatrix_addresses(rows, 4, True)
    assert both.shape == (4, 2, 32, 2)
    for warp in range(2):
        np.testing.assert_array_equal(both[:, warp], mma.ldmatrix_addresses(rows[warp], 4, True)[0])


def test_misaligned_rows_name_the_lane_and_unused_lanes_do_not_matter() -> None:
    rows = np.arange(32) * 16
    rows[9] += 8
    mma.ldmatrix_addresses(rows, 1)
    with pytest.raises(EmulatorError, match="lane 9"):
        mma.ldmatrix_addresses(rows, 2)
    with pytest.raises(EmulatorError, match="b8"):
        mma.ldmatrix_addresses(rows, 4, False, "b8")
    with pytest.raises(EmulatorError, match="x3"):
        mma.stmatrix_addresses(rows, 3)
