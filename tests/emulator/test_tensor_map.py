"""Tensor maps: encodings known from two compilers, the driver's rules, and tile copies against element-by-element loops."""

from __future__ import annotations

import itertools
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densemoe.compile.emulator import tensor_map as tm
from densemoe.compile.emulator.tensor_map import DataType, Interleave, L2Promotion, OobFill, Swizzle, TensorMap
from densemoe.compile.emulator.tile import Tile, reduce_elements
from densemoe.runtime.errors import EmulatorError

BASE = 0x7123456789A80
BYTES = {d: tm.KINDS[d].bits // 8 for d in DataType if tm.KINDS[d].bits >= 8}

# What the CuTe DSL 4.8.1 encodes on the host (make_tiled_tma_atom, all with L2 promotion 128 B): dtype, sizes, box, swizzle and the eight u64.
ENCODED_BY_THE_DSL = [
    (DataType.FLOAT16, (256, 512), (64, 32), Swizzle.BYTES_128, "2000246312 0 0 1ff000000ff 0 3f00000000000000 1f"),
    (DataType.FLOAT16, (256, 512), (32, 32), Swizzle.BYTES_64, "2000244312 0 0 1ff000000ff 0 1f00000000000000 1f"),
    (DataType.FLOAT16, (256, 512), (16, 32), Swizzle.BYTES_32, "2000242312 0 0 1ff000000ff 0 f00000000000000 1f"),
    (DataType.FLOAT16, (256, 512), (64, 32), Swizzle.NONE, "2000240312 0 0 1ff000000ff 0 3f00000000000000 1f"),
    (DataType.FLOAT32, (256, 512), (32, 32), Swizzle.BYTES_128_ATOM_32, "40002c6392 0 0 1ff000000ff 0 1f00000000000000 1f"),
    (DataType.FLOAT32, (256, 512), (32, 32), Swizzle.BYTES_128_ATOM_64, "40003c6392 0 0 1ff000000ff 0 1f00000000000000 1f"),
    (DataType.FLOAT16, (256, 512, 8), (64, 32, 2), Swizzle.BYTES_128, "2000246322 4000 0 1ff000000ff 7 3f00000000000000 11f"),
    (
        DataType.FLOAT16,
        (128, 24, 40, 6, 10),
        (8, 3, 5, 2, 4),
        Swizzle.NONE,
        "1000240342 3c0000000180 16800 170000007f 500000027 700000000000009 3010402",
    ),
    (DataType.UINT8, (512, 512), (128, 32), Swizzle.BYTES_128, "2000246012 0 0 1ff000001ff 0 7f00000000000000 1f"),
    (DataType.UINT16, (256, 512), (64, 32), Swizzle.BYTES_128, "2000246092 0 0 1ff000000ff 0 3f00000000000000 1f"),
    (DataType.UINT32, (128, 512), (32, 32), Swizzle.BYTES_128, "2000246112 0 0 1ff0000007f 0 1f00000000000000 1f"),
    (DataType.UINT64, (64, 512), (16, 32), Swizzle.BYTES_128, "2000246212 0 0 1ff0000003f 0 f00000000000000 1f"),
    (DataType.FLOAT32, (128, 512), (32, 32), Swizzle.BYTES_128, "2000246392 0 0 1ff0000007f 0 1f00000000000000 1f"),
    (DataType.BFLOAT16, (256, 512), (64, 32), Swizzle.BYTES_128, "2000246512 0 0 1ff000000ff 0 3f00000000000000 1f"),
    (DataType.TFLOAT32, (128, 512), (32, 32), Swizzle.BYTES_128, "2000256392 0 0 1ff0000007f 0 1f00000000000000 1f"),
    (DataType.FLOAT64, (64, 512), (16, 32), Swizzle.BYTES_128, "2000246492 0 0 1ff0000003f 0 f00000000000000 1f"),
    (DataType.U4X16_ALIGN8B, (1024, 512), (256, 32), Swizzle.BYTES_128, "2000246592 0 0 1ff000003ff 0 ff00000000000000 1f"),
    (DataType.U4X16_ALIGN16B, (1024, 512), (128, 32), Swizzle.BYTES_128, "2000246612 0 0 1ff000003ff 0 7f00000000000000 1f"),
    (DataType.FLOAT16, (65536, 70000), (64, 256), Swizzle.BYTES_128, "200000246312 0 0 1116f0000ffff 0 3f00000000000000 ff"),
]


def packed_strides(dtype: DataType, sizes: tuple[int, ...]) -> tuple[int, ...]:
    widths = itertools.accumulate(sizes[:-1], lambda a, b: a * b)
    return tuple(w * tm.KINDS[dtype].bits // 8 for w in widths)


def make(dtype: DataType, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: Swizzle = Swizzle.NONE, **options: object) -> TensorMap:
    defaults: dict[str, object] = {"strides": packed_strides(dtype, sizes), "element_strides": (1,) * len(sizes), "address": BASE}
    return TensorMap(dtype=dtype, sizes=sizes, box=box, swizzle=swizzle, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "sizes", "box", "swizzle", "words"), ENCODED_BY_THE_DSL)
def test_encoding_equals_the_dsls(dtype: DataType, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: Swizzle, words: str) -> None:
    expected = struct.pack("<8Q", BASE, *(int(word, 16) for word in words.split()))
    tensor_map = make(dtype, sizes, box, swizzle, l2_promotion=L2Promotion.BYTES_128)
    encoded = tensor_map.encode()
    assert len(encoded) == 128
    assert encoded[:64] == expected
    assert TensorMap.decode(expected + b"\xa5" * 64) == tensor_map


def test_fields_lie_where_tensormap_replace_puts_them() -> None:
    """Byte offsets and masks of the code that ptxas makes for each tensormap.replace field."""
    sizes, strides = (64, 3, 5, 7, 11), (128, 0xF_FFFF_FFF0, 0xA_0000_0010, 0x5_0000_0000)
    tensor_map = make(
        DataType.FLOAT16, sizes, (8, 3, 5, 7, 11), strides=strides, element_strides=(1, 2, 3, 4, 8), oob_fill=OobFill.NAN, address=16
    )
    data = tensor_map.encode()
    (flags,) = struct.unpack_from("<I", data, 0x8)
    assert flags & 0x70 == 4 << 4
    assert flags & 0x780 == 6 << 7
    assert flags & 0x8000
    for i, stride in enumerate(strides):
        assert struct.unpack_from("<I", data, 0xC + 4 * i)[0] == (stride >> 4) & 0xFFFFFFFF
        assert struct.unpack_from("<I", data, 0x1C)[0] >> 4 * i & 15 == stride >> 36
    assert struct.unpack_from("<5I", data, 0x20) == tuple(n - 1 for n in sizes)
    (steps,) = struct.unpack_from("<I", data, 0x34)
    assert [steps >> 3 * i & 7 for i in range(5)] == [0, 1, 2, 3, 7]
    assert steps >> 24 == 7
    assert data[0x38:0x3C] == bytes([2, 4, 6, 10])
    assert TensorMap.decode(data) == tensor_map


@st.composite
def maps(draw: st.DrawFn) -> TensorMap:
    dtype = draw(st.sampled_from([d for d in DataType if tm.KINDS[d].bits >= 8]))
    rank = draw(st.integers(1, 5))
    sizes = tuple(draw(st.integers(1, 2**32)) for _ in range(rank))
    strides = tuple(16 * draw(st.integers(0, 2**36 - 1)) for _ in range(rank - 1))
    swizzle = draw(st.sampled_from(list(Swizzle)))
    span = {Swizzle.NONE: 256 * BYTES[dtype], Swizzle.BYTES_32: 32, Swizzle.BYTES_64: 64}.get(swizzle, 128)
    inner = 16 * draw(st.integers(1, min(span, 256 * BYTES[dtype]) // 16)) // BYTES[dtype]
    box, room = [inner], tm.LARGEST_TILE // (inner * BYTES[dtype])
    for _ in range(rank - 1):
        box.append(draw(st.integers(1, min(256, room))))
        room //= box[-1]
    return TensorMap(
        16 * draw(st.integers(0, 2**60 - 1)),
        dtype,
        sizes,
        strides,
        tuple(box),
        tuple(draw(st.integers(1, 8)) for _ in range(rank)),
        Interleave.NONE,
        swizzle,
        draw(st.sampled_from(list(L2Promotion))),
        draw(st.sampled_from(list(OobFill))) if tm.KINDS[dtype].nan else OobFill.ZERO,
    )


@given(maps())
def test_every_legal_map_survives_encode_and_decode(tensor_map: TensorMap) -> None:
    assert TensorMap.decode(tensor_map.encode()) == tensor_map
    assert TensorMap.decode(tensor_map.encode(tm.HOPPER_FORM)) == tensor_map


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": BASE + 8}, "not aligned to 16"),
        ({"sizes": (256, 0)}, "size 0 of dimension 1"),
        ({"sizes": (256, 2**32 + 1)}, "allowed 1 to 2\\^32"),
        ({"strides": (520,)}, "stride 520 of dimension 1"),
        ({"strides": (1 << 40,)}, "below 2\\^40"),
        ({"box": (64, 257)}, "box 257 in dimension 1"),
        ({"sizes": (64,) * 3, "strides": (128,) * 2, "box": (64, 256, 8), "element_strides": (1,) * 3}, "tile of 262144 bytes: at most 232448"),
        ({"box": (20, 8)}, "40.0 bytes wide, a multiple of 16"),
        ({"box": (128, 8)}, "256 bytes wide, at most 128"),
        ({"box": (32, 8), "swizzle": Swizzle.BYTES_32}, "64 bytes wide, at most 32"),
        ({"element_strides": (1, 9)}, "element stride 9"),
        ({"element_strides": (1,)}, "1 element_strides for rank 2"),
        ({"interleave": Interleave.BYTES_16}, "at least 3 needed"),
        ({"dtype": DataType.UINT16, "oob_fill": OobFill.NAN}, "NaN fill with UINT16"),
        ({"dtype": DataType.U4X16_ALIGN16B, "box": (64, 8)}, "aligned to 32|box\\[0\\] == 128"),
        ({"sizes": (1,) * 6, "strides": (16,) * 5, "box": (8,) * 6, "element_strides": (1,) * 6}, "rank 6"),
    ],
)
def test_maps_the_driver_refuses_are_errors(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "dtype": DataType.FLOAT16,
        "sizes": (256, 512),
        "strides": (512,),
        "box": (64, 8),
        "element_strides": (1, 1),
        "address": BASE,
        "swizzle": Swizzle.BYTES_128,
    }
    TensorMap(**arguments).encode()  # type: ignore[arg-type]
    with pytest.raises(EmulatorError, match=message):
        TensorMap(**{**arguments, **change}).encode()  # type: ignore[arg-type]


def test_unknown_bits_are_errors() -> None:
    good = make(DataType.FLOAT16, (256, 512), (64, 8)).encode()
    for position, value in ((8, 0x13), (9, 0x07), (9, 0x1B), (11, 0x01)):
        bad = bytearray(good)
        bad[position] = value
        with pytest.raises(EmulatorError, match="tensor map"):
            TensorMap.decode(bytes(bad))
    with pytest.raises(EmulatorError, match="128 bytes"):
        TensorMap.decode(good[:32])


# --- swizzles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("swizzle", "rows"),
    [
        (Swizzle.BYTES_32, ["01234567", "10325476"]),
        (Swizzle.BYTES_64, ["01234567", "10325476", "23016745", "32107654"]),
        (Swizzle.BYTES_128, ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"]),
        (Swizzle.BYTES_128_ATOM_32, ["01234567", "23016745", "45670123", "67452301"]),
        (Swizzle.BYTES_128_ATOM_64, ["01234567", "45670123"]),
    ],
)
def test_swizzles_equal_the_tables_of_the_isa(swizzle: Swizzle, rows: list[str]) -> None:
    """5.5.7: each row is one 128-byte line of shared memory, each digit the 16-byte element that lies there."""
    for line in range(16):
        for column in range(8):
            stored_at = tm.swizzle_address(128 * line + 16 * column + 5, swizzle)
            assert stored_at // 128 == line
            assert stored_at % 16 == 5
            assert rows[line % len(rows)][stored_at // 16 % 8] == str(column)
    addresses = np.arange(4096)
    np.testing.assert_array_equal(tm.swizzle_address(tm.swizzle_address(addresses, swizzle), swizzle), addresses)


def test_the_flip_swizzle_is_refused() -> None:
    tensor_map = make(DataType.FLOAT16, (64, 64), (64, 8), Swizzle.BYTES_128_ATOM_32_FLIP_8)
    assert TensorMap.decode(tensor_map.encode()) == tensor_map
    with pytest.raises(EmulatorError, match="flip"):
        tensor_map.shared_granules(0)


# --- tiles ------------------------------------------------------------------------------------------------------------


def reference_load(tensor_map: TensorMap, coordinates: tuple[int, ...], memory: np.ndarray, fill: bytes) -> np.ndarray:
    """Shared memory of one tile at address 0, element by element."""
    size = BYTES[tensor_map.dtype]
    counts = [tensor_map.box[0], *(-(-b // e) for b, e in zip(tensor_map.box[1:], tensor_map.element_strides[1:], strict=True))]
    shared = np.zeros(int(np.prod(counts)) * size, np.uint8)
    strides = (size, *tensor_map.strides)
    for linear, index in enumerate(itertools.product(*(range(n) for n in reversed(counts)))):
        position = [
            c + i * (e if d else 1)
            for d, (c, i, e) in enumerate(zip(coordinates, reversed(index), tensor_map.element_strides, strict=True))
        ]
        if all(0 <= p < n for p, n in zip(position, tensor_map.sizes, strict=True)):
            start = sum(p * s for p, s in zip(position, strides, strict=True))
            value = memory[start : start + size]
        else:
            value = np.frombuffer(fill, np.uint8)
        for byte in range(size):
            shared[tm.swizzle_address(linear * size + byte, tensor_map.swizzle)] = value[byte]
    return shared


CASES = [
    (DataType.UINT8, (40, 9), (16, 4), Swizzle.NONE, (1, 1)),
    (DataType.UINT8, (300, 20), (128, 8), Swizzle.BYTES_128, (1, 1)),
    (DataType.FLOAT16, (40, 9), (32, 4), Swizzle.BYTES_64, (1, 1)),
    (DataType.BFLOAT16, (40, 9, 3), (16, 4, 2), Swizzle.BYTES_32, (1, 1, 1)),
    (DataType.FLOAT32, (24, 9, 3), (32, 4, 2), Swizzle.BYTES_128_ATOM_32, (1, 1, 1)),
    (DataType.UINT64, (24,), (16,), Swizzle.NONE, (1,)),
    (DataType.UINT16, (24, 5, 4, 3, 2), (8, 2, 2, 2, 2), Swizzle.NONE, (1, 1, 1, 1, 1)),
    (DataType.UINT16, (24, 17, 9), (8, 8, 7), Swizzle.NONE, (5, 2, 3)),
    (DataType.FLOAT64, (10, 9), (8, 4), Swizzle.BYTES_64, (1, 3)),
]


@pytest.mark.parametrize(("dtype", "sizes", "box", "swizzle", "element_strides"), CASES)
@pytest.mark.parametrize("nan_fill", [False, True])
def test_loads_equal_an_element_loop(
    dtype: DataType, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: Swizzle, element_strides: tuple[int, ...], nan_fill: bool
) -> None:
    kind = tm.KINDS[dtype]
    if nan_fill and kind.nan is None:
        nan_fill = False
    strides = tuple(-(-s // 16) * 16 + 16 * i for i, s in enumerate(packed_strides(dtype, sizes), start=1))
    total = sum((n - 1) * s for n, s in zip(sizes, (BYTES[dtype], *strides), strict=True)) + BYTES[dtype]
    rng = np.random.default_rng(total)
    memory = rng.integers(0, 64, total).astype(np.uint8)
    tensor_map = make(
        dtype, sizes, box, swizzle, strides=strides, element_strides=element_strides, oob_fill=OobFill.NAN if nan_fill else OobFill.ZERO
    )
    fill = (kind.nan or 0).to_bytes(BYTES[dtype], "little") if nan_fill else bytes(BYTES[dtype])
    for _ in range(25):
        coordinates = tuple(int(rng.integers(-b - 1, n + 2)) for n, b in zip(sizes, box, strict=True))
        tile = Tile(tensor_map, coordinates)
        shared = np.full(tensor_map.tile_bytes + 2048, 0xEE, np.uint8)
        tile.load_shared(memory, BASE, shared, 1024)
        np.testing.assert_array_equal(shared[1024 : 1024 + tensor_map.tile_bytes], reference_load(tensor_map, coordinates, memory, fill))
        assert (shared[:1024] == 0xEE).all()
        assert (shared[1024 + tensor_map.tile_bytes :] == 0xEE).all()
        np.testing.assert_array_equal(tile.gather(shared, 1024), tile.load(memory, BASE))


@pytest.mark.parametrize(("dtype", "sizes", "box", "swizzle", "element_strides"), CASES)
def test_stores_write_exactly_the_elements_inside(
    dtype: DataType, sizes: tuple[int, ...], box: tuple[int, ...], swizzle: Swizzle, element_strides: tuple[int, ...]
) -> None:
    strides = tuple(-(-s // 16) * 16 for s in packed_strides(dtype, sizes))
    total = sum((n - 1) * s for n, s in zip(sizes, (BYTES[dtype], *strides), strict=True)) + BYTES[dtype]
    tensor_map = make(dtype, sizes, box, swizzle, strides=strides, element_strides=element_strides)
    rng = np.random.default_rng(total)
    for _ in range(10):
        coordinates = tuple(int(rng.integers(-b - 1, n + 2)) for n, b in zip(sizes, box, strict=True))
        tile = Tile(tensor_map, coordinates)
        memory = np.full(total, 0xEE, np.uint8)
        data = rng.integers(0, 128, tensor_map.tile_shape).astype(np.uint8)
        tile.store(memory, BASE, data)
        back = tile.load(memory, BASE)
        touched = np.zeros(total, np.bool_)
        starts, width = tile.rows()
        for start in starts:
            assert not touched[start : start + width].any()
            touched[start : start + width] = True
        np.testing.assert_array_equal(memory != 0xEE, touched)
        low, high = tile.extent
        assert (low, high) == ((int(np.argmax(touched)), total - int(np.argmax(touched[::-1]))) if touched.any() else (0, 0))
        kept = data[tuple(slice(a, b) for a, b in tile.inside)]
        np.testing.assert_array_equal(back[tuple(slice(a, b) for a, b in tile.inside)], kept)
        assert tile.empty == (not touched.any())
        assert tile.complete == (int(touched.sum()) == tensor_map.tile_bytes)


def test_offsets_beyond_four_gibibytes() -> None:
    tensor_map = make(DataType.UINT8, (128, 2**31), (128, 2), strides=(4096,))
    tile = Tile(tensor_map, (0, 2**31 - 3))
    assert tile.extent == ((2**31 - 3) * 4096, (2**31 - 2) * 4096 + 128)
    assert tile.rows()[0].tolist() == [(2**31 - 3) * 4096, (2**31 - 2) * 4096]


@pytest.mark.parametrize("line", range(8))
def test_a_swizzle_follows_the_absolute_shared_address(line: int) -> None:
    tensor_map = make(DataType.UINT8, (128, 64), (128, 8), Swizzle.BYTES_128, strides=(128,))
    memory = np.arange(8 * 128, dtype=np.uint32).astype(np.uint8)
    memory = np.concatenate([memory, np.zeros(56 * 128, np.uint8)])
    shared = np.zeros(4096, np.uint8)
    start = 1024 + 128 * line
    Tile(tensor_map, (0, 0)).load_shared(memory, BASE, shared, start)
    for address in range(start, start + 1024):
        assert shared[tm.swizzle_address(address, Swizzle.BYTES_128)] == memory[address - start]
    with pytest.raises(EmulatorError, match="multiple of 128"):
        tensor_map.shared_granules(start + 16)


def test_packed_fp4_counts_elements() -> None:
    tensor_map = make(DataType.U4X16_ALIGN8B, (96, 6), (64, 4), strides=(48,))
    memory = np.arange(6 * 48, dtype=np.uint8)
    assert tensor_map.tile_shape == (4, 32)
    data = Tile(tensor_map, (64, 3)).load(memory, BASE)
    expected = np.zeros((4, 32), np.uint8)
    expected[:3, :16] = memory.reshape(6, 48)[3:, 32:]
    np.testing.assert_array_equal(data, expected)
    with pytest.raises(EmulatorError, match="multiple of 2"):
        Tile(tensor_map, (1, 0))


@pytest.mark.parametrize(("dtype", "packed"), [(DataType.U4X16_ALIGN16B, 8), (DataType.U6X16_ALIGN16B, 12)])
def test_unpacking_types_leave_gaps(dtype: DataType, packed: int) -> None:
    address = BASE & ~31
    width = 256 // 16 * packed
    tensor_map = make(dtype, (256, 6), (128, 4), Swizzle.BYTES_128, strides=(width,), address=address)
    memory = np.random.default_rng(1).integers(1, 256, 6 * width).astype(np.uint8)
    data = Tile(tensor_map, (128, 4)).load(memory, address)
    assert data.shape == (4, 128)
    chunks = data.reshape(4, 8, 16)
    np.testing.assert_array_equal(chunks[:2, :, :packed], memory.reshape(6, 16, packed)[4:, 8:])
    assert not chunks[2:].any()
    assert not chunks[..., packed:].any()
    with pytest.raises(EmulatorError, match="stores"):
        Tile(tensor_map, (0, 0)).store(memory, address, data)


def test_out_of_a_buffer_is_an_error_that_names_the_addresses() -> None:
    tensor_map = make(DataType.UINT8, (128, 64), (128, 8))
    memory = np.zeros(128 * 60, np.uint8)
    Tile(tensor_map, (0, 52)).load(memory, BASE)
    Tile(tensor_map, (0, 64)).load(memory, BASE)  # empty
    with pytest.raises(EmulatorError, match="outside of its buffer"):
        Tile(tensor_map, (0, 53)).load(memory, BASE)
    with pytest.raises(EmulatorError, match="leaves shared memory"):
        Tile(tensor_map, (0, 0)).load_shared(memory, BASE, np.zeros(1000, np.uint8), 0)
    with pytest.raises(EmulatorError, match="rank 2"):
        Tile(tensor_map, (0,))


def test_conversions_that_are_not_modelled_are_errors_not_guesses() -> None:
    values = np.ones(4 * 32, np.float32)
    tensor_map = make(DataType.TFLOAT32, (32, 4), (32, 4), Swizzle.BYTES_128)
    memory = values.view(np.uint8)
    np.testing.assert_array_equal(Tile(tensor_map, (0, 0)).load(memory, BASE).view(np.float32), 1.0)
    values[5] = np.float32(1 + 2.0**-20)
    with pytest.raises(EmulatorError, match="TFLOAT32"):
        Tile(tensor_map, (0, 0)).load(memory, BASE)
    flush = make(DataType.FLOAT32_FTZ, (32, 4), (32, 4), Swizzle.BYTES_128)
    Tile(flush, (0, 0)).load(memory, BASE)
    values[5] = np.float32(1e-40)
    with pytest.raises(EmulatorError, match="flush"):
        Tile(flush, (0, 0)).load(memory, BASE)


# --- reductions -------------------------------------------------------------------------------------------------------

NUMPY = {"u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64, "b32": np.uint32, "b64": np.uint64}


@pytest.mark.parametrize("name", sorted(NUMPY))
@pytest.mark.parametrize("operation", ["add", "min", "max", "inc", "dec", "and", "or", "xor"])
def test_integer_reductions(name: str, operation: str) -> None:
    rng = np.random.default_rng(7)
    kind = NUMPY[name]
    info = np.iinfo(kind)
    a, b = (rng.integers(info.min, info.max, 50, dtype=kind, endpoint=True) for _ in range(2))
    a[:3], b[:3] = (0, 5, 5), (9, 5, 4)
    bits = info.bits
    functions = {
        "add": lambda x, y: x + y,
        "min": min,
        "max": max,
        "inc": lambda x, y: 0 if x >= y else x + 1,
        "dec": lambda x, y: y if x == 0 or x > y else x - 1,
        "and": lambda x, y: x & y,
        "or": lambda x, y: x | y,
        "xor": lambda x, y: x ^ y,
    }
    exists = not (operation in ("inc", "dec") and name != "u32") and not (name[0] == "b" and operation in ("add", "min", "max"))
    if not exists:
        with pytest.raises(EmulatorError, match=rf"\.{operation}\.{name}"):
            reduce_elements(operation, name, a, b)
        return
    result = reduce_elements(operation, name, a, b)
    expected = [functions[operation](int(x), int(y)) % 2**bits for x, y in zip(a, b, strict=True)]
    assert [int(r) % 2**bits for r in result] == expected


@pytest.mark.parametrize(("name", "kind"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16), ("f32", np.float32), ("f64", np.float64)])
def test_float_reductions_round_once(name: str, kind: type) -> None:
    rng = np.random.default_rng(3)
    a, b = (np.ldexp(rng.normal(size=500), rng.integers(-12, 12, 500)).astype(kind) for _ in range(2))
    bits = np.dtype(f"u{np.dtype(kind).itemsize}")
    result = reduce_elements("add", name, a.view(bits), b.view(bits)).view(kind)
    np.testing.assert_array_equal(result, a + b)
    if name in ("f16", "bf16"):
        result = reduce_elements("max", name, a.view(bits), b.view(bits)).view(kind)
        np.testing.assert_array_equal(result, np.where(a > b, a, b))
    else:
        with pytest.raises(EmulatorError, match="min"):
            reduce_elements("min", name, a.view(bits), b.view(bits))


def test_f32_addition_flushes_subnormals() -> None:
    tiny = np.array([1e-40, -1e-40], np.float32)
    np.testing.assert_array_equal(reduce_elements("add", "f32", tiny, np.zeros(2, np.float32)).view(np.uint32), [0, 0])


@pytest.mark.parametrize("dtype", [DataType.FLOAT32, DataType.BFLOAT16, DataType.UINT32])
def test_tile_reductions_are_clipped(dtype: DataType) -> None:
    kind = {DataType.FLOAT32: np.float32, DataType.BFLOAT16: ml_dtypes.bfloat16, DataType.UINT32: np.uint32}[dtype]
    values = np.arange(20 * 16).reshape(20, 16).astype(kind)
    memory = values.copy()
    tensor_map = make(dtype, (16, 20), (16, 8), strides=(16 * BYTES[dtype],))
    tile = Tile(tensor_map, (4, 15))
    data = np.ones((8, 16), kind)
    tile.reduce(memory.view(np.uint8).reshape(-1), BASE, data.view(np.uint8), "add")
    values[15:, 4:] = (values[15:, 4:].astype(np.float64) + 1).astype(kind)
    np.testing.assert_array_equal(memory, values)
    halves = Tile(make(DataType.UINT16, (16, 20), (16, 8), strides=(32,)), (0, 0))
    with pytest.raises(EmulatorError, match="UINT16"):
        halves.reduce(memory.view(np.uint8).reshape(-1), BASE, np.zeros((8, 32), np.uint8), "add")
