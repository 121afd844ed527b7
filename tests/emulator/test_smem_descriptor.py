"""Matrix descriptors: bit fields, and operand addresses against CuTe's canonical layouts evaluated as the ISA writes them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densemoe.compile.emulator.smem_descriptor import SmemDescriptor, decode_sm90, decode_sm100, gather_operand, operand_granules
from densemoe.compile.emulator.tensor_map import DataType, Swizzle, TensorMap
from densemoe.compile.emulator.tile import Tile
from densemoe.runtime.errors import EmulatorError

SHARED = 64 * 1024
CUTE_SWIZZLE = {
    Swizzle.NONE: (0, 4, 3),
    Swizzle.BYTES_32: (1, 4, 3),
    Swizzle.BYTES_64: (2, 4, 3),
    Swizzle.BYTES_128: (3, 4, 3),
    Swizzle.BYTES_128_ATOM_32: (2, 5, 2),
}
WIDTH = {Swizzle.NONE: 1, Swizzle.BYTES_32: 2, Swizzle.BYTES_64: 4, Swizzle.BYTES_128: 8, Swizzle.BYTES_128_ATOM_32: 8}  # 16-byte units


def cute_swizzle(b: int, m: int, s: int, address: int) -> int:
    """CuTe Swizzle<B, M, S>: XOR B bits above M + S into B bits above M."""
    return address ^ ((address >> s) & (((1 << b) - 1) << m))


def cute_layout(shape: list[tuple[int, int]], index: int) -> int:
    """Offset of a linear index in a CuTe mode given as (extent, stride) pairs, the first fastest; the last extent is unbounded."""
    offset = 0
    for extent, stride in shape[:-1]:
        offset += index % extent * stride
        index //= extent
    return offset + index * shape[-1][1]


def expected_address(descriptor: SmemDescriptor, element_bytes: int, row: int, k: int, mn_major: bool) -> int:
    """Byte address of element (row, k) by the canonical layouts of 9.7.15.5.1.2.1.3, in units of elements."""
    t, w = 16 // element_bytes, WIDTH[descriptor.swizzle]
    sbo, lbo = descriptor.stride // element_bytes, descriptor.leading // element_bytes
    depth = 4 if descriptor.swizzle is Swizzle.BYTES_128_ATOM_32 else 8
    if mn_major and descriptor.swizzle is Swizzle.NONE:
        mn, kk = [(t, 1), (1, t), (0, sbo)], [(8, t), (0, lbo)]
    elif mn_major:
        mn, kk = [(t, 1), (w, t), (0, lbo)], [(depth, w * t), (0, sbo)]
    elif descriptor.swizzle is Swizzle.NONE:
        mn, kk = [(8, t), (0, sbo)], [(t, 1), (0, lbo)]
    else:
        mn, kk = [(8, w * t), (0, sbo)], [(t, 1), (0, t)]
    linear = descriptor.start + element_bytes * (cute_layout(mn, row) + cute_layout(kk, k))
    return cute_swizzle(*CUTE_SWIZZLE[descriptor.swizzle], linear)


def check(descriptor: SmemDescriptor, rows: int, k_bytes: int, element_bytes: int, mn_major: bool) -> None:
    rng = np.random.default_rng(descriptor.start)
    shared = rng.integers(0, 256, SHARED).astype(np.uint8)
    data = gather_operand(shared, descriptor, rows, k_bytes, element_bytes if mn_major else 0)
    assert data.shape == (rows, k_bytes)
    for row, k in itertools.product(range(rows), range(k_bytes // element_bytes)):
        address = expected_address(descriptor, element_bytes, row, k, mn_major)
        expected = shared[address : address + element_bytes]
        assert (data[row, k * element_bytes : (k + 1) * element_bytes] == expected).all(), (row, k)
    granules = operand_granules(descriptor, rows, k_bytes, element_bytes if mn_major else 0)
    assert np.unique(granules).size == rows * k_bytes // 16


@pytest.mark.parametrize("swizzle", [Swizzle.NONE, Swizzle.BYTES_32, Swizzle.BYTES_64, Swizzle.BYTES_128])
@pytest.mark.parametrize("element_bytes", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_k_major_operands_follow_the_canonical_layouts(swizzle: Swizzle, element_bytes: int, step: int) -> None:
    span = 16 * WIDTH[swizzle]
    if swizzle is Swizzle.NONE:
        check(SmemDescriptor(2048 + 1024 * step, 128, 256), 64, 32, element_bytes, False)
        check(SmemDescriptor(2048 + 16 * step, 8192, 128), 24, 32, element_bytes, False)
    elif 32 * step < span:
        check(SmemDescriptor(4096 + 32 * step, 16, 8 * span, swizzle), 64, 32, element_bytes, False)
        check(SmemDescriptor(4096 + 32 * step, 0, 16 * span, swizzle), 16, 32, element_bytes, False)
    else:
        with pytest.raises(EmulatorError, match=r"base offset|cross"):
            check(SmemDescriptor(4096 + span - 16, 16, 8 * span, swizzle), 64, 32, element_bytes, False)


@pytest.mark.parametrize("swizzle", [Swizzle.NONE, Swizzle.BYTES_32, Swizzle.BYTES_64, Swizzle.BYTES_128])
@pytest.mark.parametrize("element_bytes", [1, 2])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_mn_major_operands_follow_the_canonical_layouts(swizzle: Swizzle, element_bytes: int, rows: int) -> None:
    span = 16 * WIDTH[swizzle]
    k = 32 // element_bytes
    atom = 8 * span
    blocks = max(rows * element_bytes // span, 1)
    if swizzle is Swizzle.NONE:
        check(SmemDescriptor(1024, 128 * blocks, 128), rows, 32, element_bytes, True)
        check(SmemDescriptor(1024, 128, 128 * k // 8), rows, 32, element_bytes, True)
    else:
        check(SmemDescriptor(1024, atom, atom * blocks, swizzle), rows, 32, element_bytes, True)
        check(SmemDescriptor(1024, atom * (k // 8), atom, swizzle), rows, 32, element_bytes, True)


def test_mn_major_tf32_uses_atoms_of_32_bytes() -> None:
    check(SmemDescriptor(1024, 512, 1024, Swizzle.BYTES_128_ATOM_32), 64, 32, 4, True)
    with pytest.raises(EmulatorError, match="32-bit"):
        operand_granules(SmemDescriptor(1024, 512, 1024, Swizzle.BYTES_128_ATOM_32), 64, 32)


@pytest.mark.parametrize("swizzle", [Swizzle.NONE, Swizzle.BYTES_32, Swizzle.BYTES_64, Swizzle.BYTES_128])
def test_an_operand_reads_back_what_a_tensor_copy_wrote(swizzle: Swizzle) -> None:
    """TMA and MMA agree: a K-major tile through both is the matrix itself, for every K step."""
    span = max(16 * WIDTH[swizzle], 16)
    rng = np.random.default_rng(span)
    matrix = rng.integers(0, 256, (64, 256)).astype(np.uint8)
    tensor_map = TensorMap(0x1000, DataType.UINT8, (256, 64), (256,), (span, 64), (1, 1), swizzle=swizzle)
    shared = np.zeros(SHARED, np.uint8)
    for i in range(256 // span):
        Tile(tensor_map, (i * span, 0)).load_shared(matrix.reshape(-1), 0x1000, shared, 1024 + i * 64 * span)
    for column in range(0, 256, 32):
        start = 1024 + column // span * 64 * span + column % span
        leading = 64 * 16 if swizzle is Swizzle.NONE else 0
        data = gather_operand(shared, SmemDescriptor(start, leading, 8 * span, swizzle), 64, 32)
        np.testing.assert_array_equal(data, matrix[:, column : column + 32])


def test_a_tile_between_patterns_has_its_base_offset_or_none() -> None:
    rng = np.random.default_rng(5)
    matrix = rng.integers(0, 256, (16, 128)).astype(np.uint8)
    tensor_map = TensorMap(0x1000, DataType.UINT8, (128, 16), (128,), (128, 16), (1, 1), swizzle=Swizzle.BYTES_128)
    shared = np.zeros(SHARED, np.uint8)
    Tile(tensor_map, (0, 0)).load_shared(matrix.reshape(-1), 0x1000, shared, 1024 + 384)
    for base_offset in (3, 0):
        data = gather_operand(shared, SmemDescriptor(1024 + 384, 0, 1024, Swizzle.BYTES_128, base_offset=base_offset), 16, 32)
        np.testing.assert_array_equal(data, matrix[:, :32])
    with pytest.raises(EmulatorError, match="line 3 of the BYTES_128 pattern, base offset is 2"):
        gather_operand(shared, SmemDescriptor(1024 + 384, 0, 1024, Swizzle.BYTES_128, base_offset=2), 16, 32)


fields = st.integers(0, 2**14 - 1).map(lambda n: 16 * n)


@given(fields, fields, fields, st.sampled_from(list(CUTE_SWIZZLE)), st.integers(0, 7))
def test_descriptors_survive_encode_and_decode(start: int, leading: int, stride: int, swizzle: Swizzle, base_offset: int) -> None:
    descriptor = SmemDescriptor(start, leading, stride, swizzle, base_offset)
    assert decode_sm100(descriptor.encode_sm100()) == descriptor
    if swizzle is not Swizzle.BYTES_128_ATOM_32:
        assert decode_sm90(descriptor.encode_sm90()) == descriptor
    else:
        with pytest.raises(EmulatorError, match="ATOM_32"):
            descriptor.encode_sm90()


def test_known_descriptors() -> None:
    """Descriptors of compiled kernels: tcgen05 A and B of a Triton GEMM (N-major B), and the formula of the wgmma trial."""
    assert decode_sm100(4611756662049472512) == SmemDescriptor(0, 0, 1024, Swizzle.BYTES_128)
    assert decode_sm100(4611756662083026944) == SmemDescriptor(0, 8192, 1024, Swizzle.BYTES_128)
    address, stride = 0x1400, 1024
    trial = ((address >> 4) & 0x3FFF) | (1 << 62) | ((stride >> 4) << 32) | (1 << 16)
    assert decode_sm90(trial) == SmemDescriptor(address, 16, stride, Swizzle.BYTES_128)


@pytest.mark.parametrize("bit", [14, 15, 30, 31, *range(53, 61)])
def test_reserved_bits_of_tcgen05_descriptors(bit: int) -> None:
    good = SmemDescriptor(1024, 16, 1024, Swizzle.BYTES_128).encode_sm100()
    with pytest.raises(EmulatorError, match="reserved"):
        decode_sm100(good | 1 << bit)


def test_constant_bits_of_tcgen05_descriptors() -> None:
    good = SmemDescriptor(1024, 16, 1024, Swizzle.BYTES_128).encode_sm100()
    for value in (0, 2, 3, 5, 7):
        with pytest.raises(EmulatorError, match="0b001 needed"):
            decode_sm100(good & ~(7 << 46) | value << 46)
    with pytest.raises(EmulatorError, match="absolute"):
        decode_sm100(good | 1 << 52)
    for mode in (3, 5, 7):
        with pytest.raises(EmulatorError, match=f"mode {mode} is invalid"):
            decode_sm100(good & ~(7 << 61) | mode << 61)


@pytest.mark.parametrize("bit", [14, 15, 30, 31, 46, 47, 48, *range(52, 62)])
def test_reserved_bits_of_wgmma_descriptors(bit: int) -> None:
    with pytest.raises(EmulatorError, match="reserved"):
        decode_sm90(SmemDescriptor(1024, 16, 1024, Swizzle.BYTES_128).encode_sm90() | 1 << bit)


def test_operands_beyond_shared_memory_are_errors() -> None:
    descriptor = SmemDescriptor(SHARED - 4096, 16, 1024, Swizzle.BYTES_128)
    shared = np.zeros(SHARED, np.uint8)
    gather_operand(shared, descriptor, 32, 32)
    with pytest.raises(EmulatorError, match="ends at"):
        gather_operand(shared, descriptor, 40, 32)
    with pytest.raises(EmulatorError, match="granules"):
        gather_operand(shared, descriptor, 8, 24)
    with pytest.raises(EmulatorError, match="multiple of 16"):
        SmemDescriptor(8, 0, 0).encode_sm90()
