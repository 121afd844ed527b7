"""Tensor memory maps and tcgen05.mma: CuTe's thread-value layouts, bijections, and whole products against float64 einsum."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from densemoe.compile.emulator import tcgen05, tensor_memory
from densemoe.compile.emulator.smem_descriptor import SmemDescriptor, gather_operand
from densemoe.compile.emulator.tcgen05 import InstructionDescriptor
from densemoe.compile.emulator.tensor_map import Swizzle
from densemoe.runtime.errors import EmulatorError

SHARED = 128 * 1024


def fresh(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (128, 512), dtype=np.uint32)


# --- ld and st --------------------------------------------------------------------------------------------------------

# CuTe Copy_Traits<SM100_TMEM_LOAD_*>::DstLayout: (thread modes, value modes) as (extent, stride) in bits; bits of a lane; lanes.
CUTE = {
    ("16x256b", 1): ([(4, 64), (8, 256)], [(64, 1), (2, 2048)], 256),
    ("16x256b", 2): ([(4, 64), (8, 512)], [(64, 1), (2, 4096), (2, 256)], 512),
    ("16x128b", 1): ([(4, 32), (8, 128)], [(32, 1), (2, 1024)], 128),
    ("16x128b", 2): ([(4, 32), (8, 256)], [(32, 1), (2, 2048), (2, 128)], 256),
    ("16x64b", 1): ([(2, 512), (2, 32), (8, 64)], [(32, 1)], 64),
    ("16x64b", 2): ([(2, 1024), (2, 32), (8, 128)], [(32, 1), (2, 64)], 128),
    ("16x32bx2", 1): ([(16, 64), (2, 32)], [(32, 1)], 64),
    ("16x32bx2", 2): ([(16, 128), (2, 64)], [(64, 1)], 128),
    ("32x32b", 2): ([(32, 64)], [(64, 1)], 64),
}


def mode(layout: list[tuple[int, int]], index: int) -> int:
    offset = 0
    for extent, stride in layout:
        offset += index % extent * stride
        index //= extent
    assert index == 0
    return offset


@pytest.mark.parametrize(("shape", "count"), sorted(CUTE))
def test_register_maps_equal_cutes_layouts(shape: str, count: int) -> None:
    threads, values, lane_bits = CUTE[shape, count]
    lanes, columns = tensor_memory.register_map(shape, count, split=count)
    for register, thread in itertools.product(range(lanes.shape[0]), range(32)):
        bit = mode(threads, thread) + mode(values, 32 * register)
        assert (lanes[register, thread], columns[register, thread]) == (bit // lane_bits, bit % lane_bits // 32)


@pytest.mark.parametrize("shape", ["32x32b", "16x64b", "16x128b", "16x256b", "16x32bx2"])
@pytest.mark.parametrize("packed", [False, True])
def test_ld_and_st_are_inverse_bijections(shape: str, packed: bool) -> None:
    per_count = {"16x128b": 2, "16x256b": 4}.get(shape, 1)
    lanes_of = 32 if shape == "32x32b" else 16
    for count in (1, 2, 4, 8, 16, 32, 64, 128):
        if per_count * count > 128:
            with pytest.raises(EmulatorError, match="does not exist"):
                tensor_memory.register_map(shape, count, packed)
            continue
        split = count * (1 + packed)
        lanes, columns = tensor_memory.register_map(shape, count, packed, split)
        cells = np.unique(lanes.ravel() * 512 + columns.ravel())
        assert cells.size == per_count * count * 32 * (1 + packed)
        width = cells.size // lanes_of
        np.testing.assert_array_equal(cells, (np.arange(lanes_of)[:, None] * 512 + np.arange(width)).ravel())
        for warp in range(4):
            memory = fresh(warp)
            original = memory.copy()
            address = 32 * warp << 16 | 512 - width
            registers = tensor_memory.load_registers(memory, address, shape, count, warp + 4, packed, split)
            assert registers.shape == (per_count * count, 32)
            np.testing.assert_array_equal(memory, original)
            changed = registers ^ np.uint32(0xA5A55A5A)
            tensor_memory.store_registers(memory, address, shape, count, warp, changed, packed, split)
            np.testing.assert_array_equal(tensor_memory.load_registers(memory, address, shape, count, warp, packed, split), changed)
            outside = np.ones((128, 512), np.bool_)
            outside[32 * warp : 32 * warp + lanes_of, 512 - width :] = False
            np.testing.assert_array_equal(memory[outside], original[outside])


def test_packing_joins_neighbouring_columns() -> None:
    memory = (np.arange(128, dtype=np.uint32)[:, None] << np.uint32(8)) + np.arange(512, dtype=np.uint32) % 256
    registers = tensor_memory.load_registers(memory, 32 << 16 | 4, "32x32b", 2, 1, packed=True)
    assert registers[1, 3] == (35 << 8 | 6) | (35 << 8 | 7) << 16


def test_warps_may_not_leave_their_lanes_or_the_memory() -> None:
    memory = fresh()
    for address, shape, warp in ((0, "32x32b", 1), (16 << 16, "32x32b", 0), (8 << 16, "16x64b", 0), (64 << 16, "16x256b", 1)):
        with pytest.raises(EmulatorError, match=f"of warp {warp} at lane {address >> 16}"):
            tensor_memory.load_registers(memory, address, shape, 1, warp)
    tensor_memory.load_registers(memory, 16 << 16, "16x64b", 1, 0)
    with pytest.raises(EmulatorError, match="reaches column 512"):
        tensor_memory.load_registers(memory, 509, "32x32b", 4, 0)
    with pytest.raises(EmulatorError, match="128 lanes and 512 columns"):
        tensor_memory.split_address(512)
    with pytest.raises(EmulatorError, match="128 lanes"):
        tensor_memory.split_address(128 << 16)
    with pytest.raises(EmulatorError, match=r"x3"):
        tensor_memory.load_registers(memory, 0, "32x32b", 3, 0)


# --- cp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "multicast", "destination"),
    [
        ("128x256b", "", lambda row: [row]),
        ("128x128b", "", lambda row: [row]),
        ("4x256b", "", lambda row: [32 * row]),
        ("64x128b", "warpx2::02_13", lambda row: [row, row + 64]),
        ("64x128b", "warpx2::01_23", lambda row: [row % 32 + 64 * (row // 32), row % 32 + 64 * (row // 32) + 32]),
        ("32x128b", "warpx4", lambda row: [row, row + 32, row + 64, row + 96]),
    ],
)
def test_cp_writes_each_row_to_its_lanes(shape: str, multicast: str, destination) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(4)
    shared = rng.integers(0, 256, SHARED).astype(np.uint8)
    copy = tensor_memory.copy_shape(shape, multicast)
    descriptor = SmemDescriptor(2048, 2048, 256)
    given = gather_operand(shared, descriptor, copy.rows, copy.row_bytes).view(np.uint32)
    memory, column = fresh(), 37
    before = memory.copy()
    tensor_memory.write_rows(memory, column, given, copy)
    rows, bits = (int(n) for n in shape.removesuffix("b").split("x"))
    touched = np.zeros((128, 512), np.bool_)
    for row in range(rows):
        data = b"".join(
            shared[2048 + row // 8 * 256 + row % 8 * 16 + chunk * 2048 :][:16].tobytes() for chunk in range(bits // 128)
        )  # 8 x 16 byte core matrices: SBO between groups of 8 rows, LBO between 16-byte columns
        for lane in destination(row):
            assert memory[lane, column : column + bits // 32].tobytes() == data
            touched[lane, column : column + bits // 32] = True
    np.testing.assert_array_equal(memory[~touched], before[~touched])
    for address in (512 - bits // 32 + 1, 112 << 16):
        with pytest.raises(EmulatorError, match="reaches beyond"):
            tensor_memory.write_rows(memory, address, given, copy)


def test_other_copies_are_errors() -> None:
    for shape, multicast in (("64x128b", ""), ("32x128b", "warpx2::02_13"), ("128x256b", "warpx4"), ("16x128b", "")):
        with pytest.raises(EmulatorError, match=f"cp.{shape}"):
            tensor_memory.copy_shape(shape, multicast)


# --- accumulators -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "group", "ws", "place"),
    [
        (256, 2, False, lambda r, c, n: (r, c)),
        (128, 1, False, lambda r, c, n: (r, c)),
        (128, 1, True, lambda r, c, n: (r, c)),
        (128, 2, False, lambda r, c, n: (r + 64 * (c // (n // 2)), c % (n // 2))),
        (64, 1, True, lambda r, c, n: (r + 64 * (c // (n // 2)), c % (n // 2))),
        (64, 1, False, lambda r, c, n: (32 * (r // 16) + r % 16, c)),
        (32, 1, True, lambda r, c, n: (r + 32 * (c // (n // 4)), c % (n // 4))),
    ],
)
def test_accumulator_layouts(m: int, group: int, ws: bool, place) -> None:  # type: ignore[no-untyped-def]
    layout = tensor_memory.accumulator_layout(m, group, ws)
    n, column = 64, 100
    rows = m // group
    assert layout.rows == rows
    words = np.arange(rows * n, dtype=np.uint32).reshape(rows, n)
    memory = fresh()
    before = memory.copy()
    layout.write(memory, column, words)
    touched = np.zeros((128, 512), np.bool_)
    for r, c in itertools.product(range(rows), range(n)):
        lane, offset = place(r, c, n)
        assert memory[lane, column + offset] == words[r, c]
        touched[lane, column + offset] = True
    assert touched.sum() == rows * n
    np.testing.assert_array_equal(memory[~touched], before[~touched])
    np.testing.assert_array_equal(layout.read(memory, column, n), words)
    disabled = np.arange(128) % 3 == 0
    layout.write(memory, column, words + np.uint32(7), disabled)
    for r, c in itertools.product(range(rows), range(n)):
        lane, offset = place(r, c, n)
        assert memory[lane, column + offset] == words[r, c] + (0 if disabled[lane] else 7)
    with pytest.raises(EmulatorError, match="lane"):
        layout.write(memory, 32 << 16, words)
    with pytest.raises(EmulatorError, match="512 exist"):
        layout.write(memory, 500, words)


def test_half_datapath_layout_may_start_at_lane_16() -> None:
    layout = tensor_memory.accumulator_layout(64, 1)
    memory = np.zeros((128, 512), np.uint32)
    layout.write(memory, 16 << 16, np.ones((64, 8), np.uint32))
    assert sorted(np.flatnonzero(memory[:, 0])) == [32 * w + 16 + i for w in range(4) for i in range(16)]


def test_shapes_that_do_not_exist() -> None:
    for arguments in ((32, 1, False), (256, 1, False), (64, 2, False), (128, 2, True)):
        with pytest.raises(EmulatorError, match=f"M = {arguments[0]}"):
            tensor_memory.accumulator_layout(*arguments)


# --- instruction descriptors ------------------------------------------------------------------------------------------


def describe(kind: str, m: int, n: int, a: str, b: str, d: str = "f32", group: int = 1, **options: object) -> InstructionDescriptor:
    depth = {"f16": 16, "tf32": 8, "mxf4": 64, "mxf4nvf4": 64}.get(kind, 32)
    return InstructionDescriptor(kind, m, n, depth, group, bool(options.pop("ws", False)), a, b, d, **options)  # type: ignore[arg-type]


DESCRIPTORS = [
    describe("f16", 64, 8, "f16", "f16", "f16"),
    describe("f16", 256, 256, "bf16", "bf16", "f32", 2, negate_a=True, transpose_b=True),
    describe("f16", 32, 64, "bf16", "bf16", ws=True),
    describe("tf32", 128, 24, "tf32", "tf32", transpose_a=True),
    describe("f8f6f4", 128, 64, "e4m3", "e2m1", "f16"),
    describe("i8", 128, 24, "s8", "u8", "s32", saturate=True),
    describe("mxf8f6f4", 128, 128, "e5m2", "e3m2", scale_format="ue8m0", a_scale_id=3, b_scale_id=1),
    describe("mxf4", 256, 96, "e2m1", "e2m1", group=2, scale_format="ue8m0", a_scale_id=2),
    describe("mxf4nvf4", 128, 256, "e2m1", "e2m1", negate_b=True, scale_format="ue4m3"),
]


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_descriptors_survive_encode_and_decode(descriptor: InstructionDescriptor) -> None:
    decoded = tcgen05.decode_instruction(descriptor.encode(), descriptor.kind, descriptor.cta_group, descriptor.weight_stationary)
    assert decoded == descriptor


def test_known_descriptors() -> None:
    """A Triton f16 GEMM (138477584: dense, D f32, B transposed, N 256, M 128) and the NVFP4 formula of public sm_100 kernels."""
    assert tcgen05.decode_instruction(138477584, "f16") == describe("f16", 128, 256, "f16", "f16", transpose_b=True)
    m, n = 128, 192
    bits = (1 << 7) | (1 << 10) | ((n >> 3) << 17) | ((m >> 7) << 27)
    assert tcgen05.decode_instruction(bits, "mxf4nvf4") == describe("mxf4nvf4", 128, 192, "e2m1", "e2m1", scale_format="ue4m3")


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_every_reserved_bit_is_checked(descriptor: InstructionDescriptor) -> None:
    reserved = {
        "f16": [3, 6, 23, 29],
        "tf32": [3, 6, 23, 29],
        "f8f6f4": [3, 6, 23, 29],
        "i8": [6, 23, 29],
        "mxf8f6f4": [0, 1, 3, 6, 24, 25, 26, 31],
        "mxf4": [0, 1, 3, 6, 15, 16, 24, 25, 26, 31],
        "mxf4nvf4": [0, 1, 3, 6, 15, 16, 24, 25, 26, 31],
    }[descriptor.kind]
    for bit in [2, *reserved]:
        with pytest.raises(EmulatorError, match=r"reserved|sparse|K = 96"):
            tcgen05.decode_instruction(descriptor.encode() | 1 << bit, descriptor.kind, descriptor.cta_group, descriptor.weight_stationary)
    if descriptor.kind.startswith("mxf4"):  # the sparsity version, which NVIDIA's descriptor builder sets for dense products too
        assert tcgen05.decode_instruction(descriptor.encode() | 1 << 12, descriptor.kind, descriptor.cta_group) == descriptor


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [
        (describe("f16", 128, 12, "f16", "f16"), None),
        (describe("f16", 256, 64, "f16", "f16"), "M = 256"),
        (describe("f16", 64, 64, "f16", "f16", group=2), "M = 64"),
        (describe("f16", 128, 8, "f16", "f16", group=2), "N = 8"),
        (describe("f16", 64, 72, "f16", "f16", ws=True), "N = 72"),
        (describe("f16", 128, 64, "bf16", "bf16", "f16"), "f16 operands"),
        (describe("tf32", 128, 64, "tf32", "tf32", "f16"), "D type"),
        (describe("i8", 128, 64, "s8", "s8", "s32", negate_a=True), "negate"),
        (describe("i8", 128, 40, "s8", "s8", "s32"), "N = 40"),
        (describe("f8f6f4", 128, 64, "e2m1", "e4m3", transpose_a=True), "e2m1 operands cannot be transposed"),
        (describe("f8f6f4", 128, 24, "e4m3", "e4m3", transpose_b=True), "transposed 8-bit B"),
        (describe("mxf4", 128, 64, "e2m1", "e2m1", scale_format="ue4m3"), "UE4M3"),
        (describe("mxf4", 128, 64, "e2m1", "e2m1", scale_format="ue8m0", a_scale_id=1), "0 or 2"),
        (describe("mxf4nvf4", 128, 64, "e2m1", "e2m1", group=2, scale_format="ue4m3"), "two CTAs"),
    ],
)
def test_values_a_kind_does_not_allow(descriptor: InstructionDescriptor, message: str | None) -> None:
    if message is None:  # N = 12 cannot be encoded: it decodes as 8
        assert tcgen05.decode_instruction(descriptor.encode(), "f16").n == 8
        return
    with pytest.raises(EmulatorError, match=message):
        tcgen05.decode_instruction(descriptor.encode(), descriptor.kind, descriptor.cta_group, descriptor.weight_stationary)
    with pytest.raises(EmulatorError, match="unknown kind"):
        tcgen05.decode_instruction(0, "f64")


# --- products ---------------------------------------------------------------------------------------------------------

CODES = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "e2m3": 6, "e3m2": 6, "e2m1": 4, "s8": 8, "u8": 8}
ORACLE = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "s8": np.int8,
    "u8": np.uint8,
}


def random_operand(rng: np.random.Generator, rows: int, k: int, name: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Values [rows, k] and their bytes [rows, 32] as they lie in shared memory, written bit by bit."""
    bits = CODES[name]
    if bits < 8:
        codes = rng.integers(0, 1 << bits, (rows, k)).astype(np.uint8)
        values = codes.view(ORACLE[name]).astype(np.float64)
        stream = np.zeros((rows, 256), np.uint8)  # one bit each
        per_granule = 16 if kind.endswith("f8f6f4") else 32
        for i in range(k):
            start = i // per_granule * 128 + i % per_granule * bits
            for bit in range(bits):
                stream[:, start + bit] = codes[:, i] >> bit & 1
        return values, np.packbits(stream, axis=1, bitorder="little")
    if name in ("s8", "u8"):
        info = np.iinfo(ORACLE[name])
        elements = rng.integers(info.min, info.max + 1, (rows, k)).astype(ORACLE[name])
    else:
        elements = (rng.integers(-8, 9, (rows, k)) / 4).astype(ORACLE[name])
    return elements.astype(np.float64), elements.view(np.uint8).reshape(rows, 32)


def place_k_major(shared: np.ndarray, start: int, data: np.ndarray) -> int:
    """Puts [rows, 32] bytes with a 128 B swizzle at byte 0 of each line; the matrix descriptor."""
    for row in range(data.shape[0]):
        line = start // 128 + row
        for chunk in range(2):
            shared[128 * line + 16 * (chunk ^ line % 8) :][:16] = data[row, 16 * chunk : 16 * chunk + 16]
    return SmemDescriptor(start, 16, 1024, Swizzle.BYTES_128).encode_sm100()


def place_mn_major(shared: np.ndarray, start: int, elements: np.ndarray) -> int:
    """Puts [rows, k] elements MN-major without swizzle: 16-byte pieces along rows, 8 k to a core matrix."""
    rows, k = elements.shape
    size = elements.itemsize
    per_chunk = 16 // size
    stride, leading = 128, 128 * (rows // per_chunk)
    for row, kk in itertools.product(range(rows), range(k)):
        address = start + row // per_chunk * stride + row % per_chunk * size + kk // 8 * leading + kk % 8 * 16
        shared[address : address + size] = elements[row : row + 1, kk : kk + 1].view(np.uint8).ravel()
    return SmemDescriptor(start, leading, stride).encode_sm100()


PLAIN = [d for d in DESCRIPTORS if not d.scale_format] + [
    describe("f16", 64, 96, "f16", "f16"),
    describe("f16", 128, 32, "bf16", "bf16", "f32", 2),
    describe("f16", 64, 128, "f16", "f16", ws=True),
    describe("f8f6f4", 128, 40, "e2m3", "e3m2"),
    describe("f8f6f4", 256, 64, "e5m2", "e4m3", group=2, transpose_a=True, transpose_b=True),
    describe("tf32", 64, 16, "tf32", "tf32", negate_a=True, negate_b=True),
    describe("i8", 64, 32, "u8", "s8", "s32"),
]


@pytest.mark.parametrize("descriptor", [d for d in PLAIN if not (d.kind == "tf32" and d.transpose_a)])
@pytest.mark.parametrize("add", [False, True])
def test_plain_products_equal_einsum(descriptor: InstructionDescriptor, add: bool) -> None:
    rng = np.random.default_rng(descriptor.n)
    group = descriptor.cta_group
    shared = [np.zeros(SHARED, np.uint8) for _ in range(group)]
    values: dict[str, np.ndarray] = {}
    bits: dict[str, list[int]] = {"a": [], "b": []}
    for operand, total, name, transposed, start in (
        ("a", descriptor.m, descriptor.a_format, descriptor.transpose_a, 1024),
        ("b", descriptor.n, descriptor.b_format, descriptor.transpose_b, 65536),
    ):
        values[operand], data = random_operand(rng, total, descriptor.k, name, descriptor.kind)
        share = total // group
        for rank in range(group):
            part = data[rank * share : (rank + 1) * share]
            if transposed:
                kind = np.dtype(f"u{32 // descriptor.k}")
                bits[operand].append(place_mn_major(shared[rank], start, np.ascontiguousarray(part).view(kind)))
            else:
                bits[operand].append(place_k_major(shared[rank], start, part))
    decoded_b = np.concatenate(
        [
            tcgen05.decode_operand(tcgen05.operand_bytes(shared[r], bits["b"][r], descriptor, "b"), descriptor.b_format, descriptor.kind)
            for r in range(group)
        ]
    )
    np.testing.assert_array_equal(decoded_b, values["b"])
    kind = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[descriptor.d_format]
    old = rng.integers(-50, 50, (descriptor.m, descriptor.n)).astype(kind)
    sign = -1 if descriptor.negate_a != descriptor.negate_b else 1
    expected = sign * np.einsum("mk,nk->mn", values["a"], values["b"]) + (old.astype(np.float64) if add else 0)
    column = 64
    for rank in range(group):
        rows = slice(rank * descriptor.a_rows, (rank + 1) * descriptor.a_rows)
        a = tcgen05.decode_operand(
            tcgen05.operand_bytes(shared[rank], bits["a"][rank], descriptor, "a"), descriptor.a_format, descriptor.kind
        )
        np.testing.assert_array_equal(a, values["a"][rows])
        memory = fresh(rank)
        words = old[rows].view(np.uint32) if kind is not np.float16 else old[rows].view(np.uint16).astype(np.uint32)
        descriptor.layout.write(memory, column, words)
        tcgen05.accumulate(memory, column, descriptor, a, decoded_b, add)
        result = descriptor.layout.read(memory, column, descriptor.n)
        if kind is np.float16:
            assert not (result >> 16).any()
            result = np.ascontiguousarray(result).astype(np.uint16)
        np.testing.assert_array_equal(np.ascontiguousarray(result).view(kind), expected[rows].astype(kind))


def scales_in_memory(memory: np.ndarray, column: int, scales: np.ndarray, scale_id: int) -> int:
    """Writes scale bytes [rows, length] where 9.7.16.10.7 says, to all four lane quarters; the address operand."""
    cells = memory.view(np.uint8).reshape(128, 512, 4)
    for row, block in itertools.product(range(scales.shape[0]), range(scales.shape[1])):
        for quarter in range(4):
            cells[32 * quarter + row % 32, column + row // 32, scale_id + block] = scales[row, block]
    return scale_id << 30 | column


SCALED = [
    (describe("mxf4nvf4", 128, 256, "e2m1", "e2m1", scale_format="ue4m3"), "block16"),
    (describe("mxf4nvf4", 128, 64, "e2m1", "e2m1", scale_format="ue4m3", negate_a=True), "scale_vec::4X"),
    (describe("mxf4nvf4", 256, 192, "e2m1", "e2m1", group=2, scale_format="ue8m0"), "scale_vec::4X"),
    (describe("mxf4nvf4", 128, 8, "e2m1", "e2m1", scale_format="ue8m0", a_scale_id=2), "block32"),
    (describe("mxf4", 128, 128, "e2m1", "e2m1", scale_format="ue8m0", b_scale_id=2), ""),
    (describe("mxf8f6f4", 128, 72, "e4m3", "e5m2", scale_format="ue8m0", a_scale_id=1, b_scale_id=3), "block32"),
    (describe("mxf8f6f4", 256, 64, "e2m1", "e3m2", group=2, scale_format="ue8m0"), "scale_vec::1X"),
    (describe("mxf8f6f4", 128, 64, "e4m3", "e4m3", scale_format="ue8m0", transpose_a=True, transpose_b=True), "scale_vec::1X"),
]


@pytest.mark.parametrize(("descriptor", "qualifier"), SCALED)
def test_block_scaled_products_equal_einsum(descriptor: InstructionDescriptor, qualifier: str) -> None:
    rng = np.random.default_rng(descriptor.n)
    length = tcgen05.scale_vector_length(descriptor, qualifier)
    group, k = descriptor.cta_group, descriptor.k
    values, parts, scales = {}, {}, {}
    for operand, total, name in (("a", descriptor.m, descriptor.a_format), ("b", descriptor.n, descriptor.b_format)):
        values[operand], parts[operand] = random_operand(rng, total, k, name, descriptor.kind)
        # scales 1/2, 1, 2, 4 as ue8m0, or any of 0.5 … 3.5 as ue4m3
        codes = rng.integers(126, 130, (total, length)) if descriptor.scale_format == "ue8m0" else rng.integers(0x30, 0x47, (total, length))
        scales[operand] = codes.astype(np.uint8)
    kind = ml_dtypes.float8_e8m0fnu if descriptor.scale_format == "ue8m0" else ml_dtypes.float8_e4m3fn
    scaled = {o: values[o] * np.repeat(scales[o].view(kind).astype(np.float64), k // length, axis=1) for o in ("a", "b")}
    sign = -1 if descriptor.negate_a != descriptor.negate_b else 1
    exact = sign * np.einsum("mk,nk->mn", scaled["a"], scaled["b"])
    b_values = tcgen05.decode_operand(parts["b"], descriptor.b_format, descriptor.kind)
    for rank in range(group):
        rows = slice(128 * rank, 128 * rank + 128)
        memory = fresh(rank)
        a_address = scales_in_memory(memory, 300, scales["a"][rows], descriptor.a_scale_id)
        b_address = scales_in_memory(memory, 320, scales["b"], descriptor.b_scale_id)
        a = tcgen05.decode_operand(parts["a"][rows], descriptor.a_format, descriptor.kind)
        a_scales = tcgen05.read_scales(memory, a_address, 128, length, descriptor.a_scale_id)
        np.testing.assert_array_equal(a_scales, scales["a"][rows])
        a = tcgen05.scale_operand(a, a_scales, descriptor.scale_format)
        b_scales = tcgen05.read_scales(memory, b_address, descriptor.n, length, descriptor.b_scale_id)
        np.testing.assert_array_equal(b_scales, scales["b"])
        b = tcgen05.scale_operand(b_values, b_scales, descriptor.scale_format)
        np.testing.assert_array_equal(a, scaled["a"][rows])
        tcgen05.accumulate(memory, 0, descriptor, a, b, False)
        tcgen05.accumulate(memory, 0, descriptor, a, b, True)
        result = np.ascontiguousarray(descriptor.layout.read(memory, 0, descriptor.n)).view(np.float32)
        once = exact[rows].astype(np.float32)
        np.testing.assert_array_equal(result, (once.astype(np.float64) + exact[rows]).astype(np.float32))


@pytest.mark.parametrize(
    ("low", "high", "answers"),
    [
        (0x30, 0x40, {True}),
        (0x7A, 0x7F, {True}),
        (0x38, 0x58, {False, True}),
        (0x38, 0x5B, {False, True}),
        (0x00, 0x20, {False, True}),
        (0x00, 0x7F, {False, True}),
    ],
)
def test_sums_that_are_said_to_be_exact_in_float32_are(low: int, high: int, answers: set[bool]) -> None:
    """Also the largest that may be: all elements 6 but one of 1/2, scale factors the largest but for one of the finest."""
    descriptor = describe("mxf4nvf4", 128, 64, "e2m1", "e2m1", scale_format="ue4m3")
    rng, said = np.random.default_rng(low * 256 + high), set()
    for attempt in range(40):
        scales = {"a": rng.integers(low, high, (128, 4)).astype(np.uint8), "b": rng.integers(low, high, (64, 4)).astype(np.uint8)}
        codes = {name: rng.integers(0, 256, (len(each), 32)).astype(np.uint8) for name, each in scales.items()}
        if attempt % 2:
            for name in scales:
                codes[name][:], codes[name][:, 9] = 0x77, 0x17
                scales[name][:] = scales[name].max()
                scales[name][3:, 1] = rng.integers(low, high)
        if attempt % 3 == 0:
            scales["a"][100:] = 0  # padding
        exact = tcgen05.exact_in_float32(scales["a"], scales["b"], descriptor)
        said.add(exact)
        wide, narrow = (
            [tcgen05.scale_operand(tcgen05.decode_operand(codes[o], "e2m1", "mxf4nvf4", dtype), scales[o], "ue4m3") for o in ("a", "b")]
            for dtype in (np.float64, np.float32)
        )
        for a, b in zip(wide, narrow, strict=True):
            np.testing.assert_array_equal(a, b)  # the factors are, always
        if exact:
            order = rng.permutation(64)
            sums = narrow[0][:, order] @ narrow[1][:, order].T
            assert sums.dtype == np.float32
            np.testing.assert_array_equal(sums, wide[0] @ wide[1].T)
    assert said == answers
    nan = scales["a"].copy()
    for code in (0x7F, 0x80, 0xFF):
        nan[0, 0] = code
        assert not tcgen05.exact_in_float32(nan, scales["b"], descriptor)


def test_odd_tiles_of_64_rows_start_two_columns_further() -> None:
    memory = fresh()
    scales = np.random.default_rng(1).integers(0, 127, (128, 4)).astype(np.uint8)
    address = scales_in_memory(memory, 40, scales, 0)
    np.testing.assert_array_equal(tcgen05.read_scales(memory, address + 2, 64, 4, 0), scales[64:])
    memory[:, 510:] = 0
    assert tcgen05.read_scales(memory, 510, 64, 4, 0).shape == (64, 4)  # only ceil(64 / 32) columns are read
    with pytest.raises(EmulatorError, match="columns 510 to 513"):
        tcgen05.read_scales(memory, 510, 128, 4, 0)


def test_scale_factor_faults_are_found() -> None:
    memory = fresh()
    address = scales_in_memory(memory, 8, np.full((128, 2), 9, np.uint8), 2)
    tcgen05.read_scales(memory, address, 128, 2, 2)
    with pytest.raises(EmulatorError, match="id 2 in address"):
        tcgen05.read_scales(memory, address, 128, 2, 0)
    with pytest.raises(EmulatorError, match="lane 0"):
        tcgen05.read_scales(memory, address | 32 << 16, 128, 2, 2)
    memory[70, 9] ^= np.uint32(0xFFFF)  # bytes 0 and 1: other scale factors
    tcgen05.read_scales(memory, address, 128, 2, 2)
    memory[70, 9] ^= np.uint32(1 << 31)
    with pytest.raises(EmulatorError, match="lanes 64-95"):
        tcgen05.read_scales(memory, address, 128, 2, 2)
    nvfp4, mx = describe("mxf4nvf4", 128, 64, "e2m1", "e2m1", scale_format="ue4m3"), describe("f16", 128, 64, "f16", "f16")
    for descriptor, qualifier in ((nvfp4, "block32"), (nvfp4, ""), (mx, "block16"), (SCALED[4][0], "scale_vec::4X")):
        with pytest.raises(EmulatorError, match="does not exist"):
            tcgen05.scale_vector_length(descriptor, qualifier)
    with pytest.raises(EmulatorError, match="0 needed"):
        tcgen05.scale_vector_length(describe("mxf4nvf4", 128, 64, "e2m1", "e2m1", scale_format="ue4m3", a_scale_id=2), "block16")


def test_a_nan_scale_of_a_padding_block_reaches_the_output() -> None:
    descriptor = describe("mxf4nvf4", 128, 64, "e2m1", "e2m1", scale_format="ue4m3")
    zeros = np.zeros((128, 64))
    scales = np.full((128, 4), 0x38, np.uint8)
    scales[5, 3] = 0x7F
    memory = fresh()
    a = tcgen05.scale_operand(zeros, scales, "ue4m3")
    tcgen05.accumulate(memory, 0, descriptor, a, np.ones((64, 64)), False)
    assert (memory[5, :64] == 0x7FFFFFFF).all()
    assert not memory[:5, :64].any()
    assert not memory[6:, :64].any()


def test_scaled_and_disabled_accumulators() -> None:
    descriptor = describe("f16", 128, 16, "f16", "f16")
    memory = np.zeros((128, 512), np.uint32)
    memory[:, :16] = np.float32(8).view(np.uint32)
    ones = np.ones((128, 16))
    disabled = np.arange(128) >= 100
    tcgen05.accumulate(memory, 0, descriptor, ones, ones[:16], True, scale_input_d=2, disabled_lanes=disabled)
    assert (memory[:100, :16].view(np.float32) == 18).all()
    assert (memory[100:, :16].view(np.float32) == 8).all()
    with pytest.raises(EmulatorError, match="scale-input-d"):
        tcgen05.accumulate(memory, 0, describe("f8f6f4", 128, 16, "e4m3", "e4m3"), ones, ones[:16], True, scale_input_d=2)
    with pytest.raises(EmulatorError, match="needed"):
        tcgen05.accumulate(memory, 0, descriptor, ones[:64], ones[:16], True)


@pytest.mark.parametrize(("m", "group"), [(128, 1), (64, 1), (256, 2)])
def test_a_may_lie_in_tensor_memory(m: int, group: int) -> None:
    descriptor = describe("f16", m, 16, "bf16", "bf16", group=group)
    rows = m // group
    elements = np.random.default_rng(m).normal(size=(rows, 16)).astype(ml_dtypes.bfloat16)
    memory = fresh()
    lanes = [r % 16 + 32 * (r // 16) for r in range(64)] if m == 64 else range(128)
    for row, lane in enumerate(lanes):
        memory[lane, 40:48] = elements[row].view(np.uint32)
    data = tcgen05.operand_in_tensor_memory(memory, 40, descriptor)
    np.testing.assert_array_equal(tcgen05.decode_operand(data, "bf16", "f16"), elements.astype(np.float64))
    with pytest.raises(EmulatorError, match="not modelled"):
        tcgen05.operand_in_tensor_memory(memory, 40, describe("f8f6f4", 128, 16, "e2m1", "e4m3"))
    with pytest.raises(EmulatorError, match="layout B"):
        tcgen05.operand_in_tensor_memory(memory, 40, describe("f16", 128, 32, "bf16", "bf16", group=2))


def test_results_are_rounded_once_and_f16_overflows_to_infinity() -> None:
    descriptor = describe("f16", 128, 16, "f16", "f16", "f16")
    memory = np.zeros((128, 512), np.uint32)
    a, b = np.full((128, 16), 4096.0), np.full((16, 16), 1.0)
    tcgen05.accumulate(memory, 0, descriptor, a, b, False)
    assert (memory[:, :16] == 0x7C00).all()
    wide = describe("tf32", 128, 16, "tf32", "tf32")
    a = np.zeros((128, 8))
    a[:, :3] = 2.0**24, 1.0, 2.0**-20  # 2^24 + 1 is a tie in float32; the last term decides it
    tcgen05.accumulate(memory, 0, wide, a, np.ones((16, 8)), False)
    assert (memory[:, :16].view(np.float32) == 2.0**24 + 2).all()


def test_integer_accumulators() -> None:
    for saturate, expected in ((False, (2**31 - 1 + 32 * 127 * 255) % 2**32), (True, 2**31 - 1)):
        descriptor = describe("i8", 128, 16, "s8", "u8", "s32", saturate=saturate)
        memory = np.full((128, 512), 2**31 - 1, np.uint32)
        tcgen05.accumulate(memory, 0, descriptor, np.full((128, 32), 127.0), np.full((16, 32), 255.0), True)
        assert (memory[:, :16] == expected).all()
