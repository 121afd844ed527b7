"""The sm_90a weight layout: packed bytes against a model of the kernel's decoding, round trips, memory, refusals.

The model follows docs/weight_layouts.md and shares nothing with the packer: it applies a kernel's bit operations to what each lane loads.
"""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densemoe.runtime import packing
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import deinterleave_up_gate, interleave_up_gate, tile_scales, untile_scales
from densemoe.runtime.nvfp4 import E2M1_VALUES, E4M3_VALUES, pack_codes, unpack_codes

SUPERBLOCK = 4608
CHUNK = 512


def bf16x2(word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) halves of uint32 words as bf16 values."""
    low = (word << np.uint32(16)).view(np.float32)
    high = (word & np.uint32(0xFFFF0000)).view(np.float32)
    return low.astype(np.float64), high.astype(np.float64)


def rotated(word: np.ndarray, count: int) -> np.ndarray:
    """uint32 words rotated left."""
    return (word << np.uint32(count)) | (word >> np.uint32(32 - count))


def decode(first: np.ndarray, second: np.ndarray) -> list[list[np.ndarray]]:
    """The four bf16x2 words of each of two code words, times 2**-126: (row g, k 0/1), (row g + 8, k 0/1), (row g, k 2/3), (row g + 8, k 2/3)."""
    mask, left_over = np.uint32(0x81C081C0), np.uint32(0x06030603)
    joined = (first & left_over) | ((second << np.uint32(2)) & ~left_over)
    return [
        [first & mask, (first << np.uint32(4)) & mask, rotated(first, 10) & mask, (joined << np.uint32(6)) & mask],
        [second & mask, (second << np.uint32(4)) & mask, rotated(second, 10) & mask, rotated(joined, 12) & mask],
    ]


def expand_scale(byte: np.ndarray) -> np.ndarray:
    """A scale byte as bf16x2 in both halves, times 2**118."""
    return byte.astype(np.uint32) * np.uint32(0x00100010) + np.uint32(0x75807580)


def lane_words(superblock: np.ndarray, chunk: int) -> np.ndarray:
    """What the 32 lanes load of a chunk, sixteen bytes each: uint32 ``[8 (g), 4 (t), 4]``."""
    return superblock[CHUNK * chunk : CHUNK * (chunk + 1)].copy().view("<u4").reshape(8, 4, 4)


def superblock_operand(superblock: np.ndarray) -> np.ndarray:
    """The A operand as the tensor core sees it, undone of the factor 2**-8: float64 ``[physical row 64, logical k 128]``.

    Every product is checked to be exact in bf16.
    """
    operand = np.full((64, 128), np.nan)
    scales = lane_words(superblock, 8)  # [g, t, m16 block]
    g, t = np.arange(8)[:, None], np.arange(4)[None, :]
    for chunk in range(8):
        block, half = divmod(chunk, 2)
        codes = lane_words(superblock, chunk)
        pair = scales[:, :, block] >> np.uint32(16 * half)
        factors = [expand_scale(pair & np.uint32(0xFF)), expand_scale((pair >> np.uint32(8)) & np.uint32(0xFF))]
        decoded = [words for pair in range(0, 4, 2) for words in decode(codes[:, :, pair], codes[:, :, pair + 1])]
        for step in range(4):
            for index, word in enumerate(decoded[step]):
                row = 16 * block + g + 8 * (index % 2)
                for odd, (value, factor) in enumerate(zip(bf16x2(word), bf16x2(factors[index % 2]), strict=True)):
                    product = value * factor
                    bits = product.astype(np.float32).view(np.uint32)
                    assert not (bits & 0xFFFF).any(), "the product needs more than bf16's bits"
                    assert (product.astype(np.float32) == product).all()
                    k = 64 * half + 16 * t + 4 * step + 2 * (index // 2) + odd
                    operand[row, k] = product * 2.0**8
    assert not np.isnan(operand).any(), "every element of the superblock is reached"
    return operand


def expert_operand(packed: np.ndarray, rows: int, k: int) -> np.ndarray:
    """All superblocks of one expert, rows in physical order: float64 ``[rows, ⌈k/128⌉·128]``."""
    k_blocks = -(-k // 128)
    blocks = packed.reshape(rows // 64, k_blocks, SUPERBLOCK)
    return np.block([[superblock_operand(blocks[i, j]) for j in range(k_blocks)] for i in range(rows // 64)])


def fc2_outputs(operand: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``x · Wᵀ`` of one expert, each lane's results where an FC2 kernel stores them: eight outputs of superblock s from 64s + 8g on."""
    result = np.empty((x.shape[0], operand.shape[0]))
    accumulators = (x @ operand.T).reshape(x.shape[0], -1, 4, 2, 8)  # token, superblock, m16 block, c0/c2, g
    for superblock in range(accumulators.shape[1]):
        for g in range(8):
            lane = [accumulators[:, superblock, block, row, g] for block in range(4) for row in range(2)]
            result[:, 64 * superblock + 8 * g : 64 * superblock + 8 * g + 8] = np.stack(lane, axis=1)
    return result


def fc1_outputs(operand: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(up, gate) of one expert, ``[tokens, I]``: lane g's four output columns of superblock s start at 32s + 4g, c0 is up and c2 gate."""
    up, gate = np.empty((2, x.shape[0], operand.shape[0] // 2))
    accumulators = (x @ operand.T).reshape(x.shape[0], -1, 4, 2, 8)
    for superblock in range(accumulators.shape[1]):
        for g in range(8):
            for block in range(4):
                column = 32 * superblock + 4 * g + block
                up[:, column] = accumulators[:, superblock, block, 0, g]
                gate[:, column] = accumulators[:, superblock, block, 1, g]
    return up, gate


# ---- the packer


def random_weights(rng: np.random.Generator, rows: int, k: int, zeros: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes and row-major scales, some of them zero."""
    codes = rng.integers(0, 256, (rows, k // 2), dtype=np.uint8)
    scales = rng.integers(0, 0x7F, (rows, k // 16), dtype=np.uint8)
    scales[rng.random(scales.shape) < zeros] = 0
    return codes, scales


def values_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return E2M1_VALUES[unpack_codes(codes)] * np.repeat(E4M3_VALUES[scales], 16, axis=1)


def zeroed(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Packed codes with those of zero-scale groups zeroed."""
    return codes * np.repeat(scales != 0, 8, axis=1).astype(np.uint8)


def test_a_superblock_is_nine_chunks_of_512_bytes() -> None:
    assert packing.SUPERBLOCK_BYTES == SUPERBLOCK == 9 * CHUNK
    assert packing.expert_bytes(64, 128) == 4608
    assert packing.expert_bytes(64, 192) == 2 * 4608
    assert packing.packed_bytes("fc1", 8, 512, 192) == 8 * (384 // 64) * (512 // 128) * 4608
    assert packing.packed_bytes("fc2", 8, 512, 192) == 8 * (512 // 64) * 2 * 4608
    assert packing.packed_bytes("fc2", 8, 512, 192) == 8 * packing.expert_stride("fc2", 512, 192)


def test_decoding_gives_every_code_times_every_scale() -> None:
    """All 16 codes under all 127 scales, as the kernel's bit operations see them."""
    k = 128 * 16  # 128 scale groups a row
    scales = np.tile(np.minimum(np.arange(128, dtype=np.uint8), 0x7E), (64, 1))
    codes = ((np.arange(k)[None, :] + np.arange(k)[None, :] // 16 + np.arange(64)[:, None]) % 16).astype(np.uint8)
    packed = packing.pack_expert("fc2", pack_codes(codes), scales)
    operand = expert_operand(packed, 64, k)
    physical = values_of(pack_codes(codes), scales)[packing.row_order("fc2")]
    np.testing.assert_array_equal(operand, physical)
    seen = {(int(code), int(scale)) for code, scale in zip(codes.reshape(-1), np.repeat(scales, 16, axis=1).reshape(-1), strict=True)}
    assert len(seen) == 16 * 127


def test_every_code_reaches_every_bit_position_of_a_pair_of_words() -> None:
    for code in range(16):
        for place in range(16):  # row g or g + 8, k 0…7
            codes = np.zeros((64, 128), dtype=np.uint8)
            row = packing.row_order("fc2")[8 * (place % 2)]
            codes[row, place // 2] = code
            packed = packing.pack_expert("fc2", pack_codes(codes), np.full((64, 8), 0x38, dtype=np.uint8))
            assert not packed[8:4096].any(), "only the first two words of the first lane change"
            words = packed[:8].view("<u4").reshape(2, 1)
            decoded = [half for pair in decode(words[0], words[1]) for word in pair for half in bf16x2(word)]
            expected = [0.0] * 16
            k = place // 2
            expected[8 * (k // 4) + 4 * (k // 2 % 2) + 2 * (place % 2) + k % 2] = E2M1_VALUES[code]
            assert [float(v[0]) * 2.0**126 for v in decoded] == expected


@pytest.mark.parametrize(("rows", "k"), [(64, 64), (64, 128), (128, 192), (192, 320)])
def test_fc2_outputs_come_in_order(rows: int, k: int) -> None:
    rng = np.random.default_rng(rows + k)
    codes, scales = random_weights(rng, rows, k)
    operand = expert_operand(packing.pack_expert("fc2", codes, scales), rows, k)
    assert not operand[:, k:].any(), "K is padded with zeros"
    x = rng.integers(-4, 5, (3, operand.shape[1])).astype(np.float64)
    np.testing.assert_array_equal(fc2_outputs(operand, x), x[:, :k] @ values_of(codes, scales).T)


@pytest.mark.parametrize(("rows", "k"), [(128, 64), (128, 128), (384, 192)])
def test_fc1_gives_up_and_gate_of_a_column_in_one_lane(rows: int, k: int) -> None:
    rng = np.random.default_rng(rows + k)
    codes, scales = random_weights(rng, rows, k)
    operand = expert_operand(packing.pack_expert("fc1", codes, scales), rows, k)
    x = rng.integers(-4, 5, (3, operand.shape[1])).astype(np.float64)
    up, gate = fc1_outputs(operand, x)
    up_weights, gate_weights = deinterleave_up_gate(values_of(codes, scales))
    np.testing.assert_array_equal(up, x[:, :k] @ up_weights.T)
    np.testing.assert_array_equal(gate, x[:, :k] @ gate_weights.T)


@given(st.sampled_from(["fc1", "fc2"]), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_unpacking_gives_back_what_was_packed(op: str, row_blocks: int, k64: int, seed: int) -> None:
    rows, k = row_blocks * (128 if op == "fc1" else 64), 64 * k64
    codes, scales = random_weights(np.random.default_rng(seed), rows, k)
    back_codes, back_scales = packing.unpack_expert(op, packing.pack_expert(op, codes, scales), rows, k)
    np.testing.assert_array_equal(back_codes, zeroed(codes, scales))
    np.testing.assert_array_equal(back_scales, scales)


def test_fc1_experts_lie_one_after_another() -> None:
    rng = np.random.default_rng(3)
    experts, intermediate, hidden = 3, 64, 192
    parts = [random_weights(rng, 2 * intermediate, hidden) for _ in range(experts)]
    codes, plain = np.stack([c for c, _ in parts]), np.concatenate([s for _, s in parts])
    packed = packing.pack_fc1(codes, tile_scales(plain))
    stride = packing.expert_stride("fc1", hidden, intermediate)
    for expert, (c, s) in enumerate(parts):
        np.testing.assert_array_equal(packed[expert * stride : (expert + 1) * stride], packing.pack_expert("fc1", c, s))
    back_codes, back_scales = packing.unpack_fc1(packed, experts, hidden, intermediate)
    np.testing.assert_array_equal(back_scales, np.stack([s for _, s in parts]))
    np.testing.assert_array_equal(back_codes, np.stack([zeroed(c, s) for c, s in parts]))


@pytest.mark.parametrize("hidden", [64, 192, 256])
def test_fc2_experts_lie_one_after_another(hidden: int) -> None:
    rng = np.random.default_rng(hidden)
    experts, intermediate = 3, 192
    codes, plain = random_weights(rng, hidden, experts * intermediate)
    packed = packing.pack_fc2(codes, tile_scales(plain), experts)
    stride = packing.expert_stride("fc2", hidden, intermediate)
    for expert in range(experts):
        c = codes[:, expert * intermediate // 2 : (expert + 1) * intermediate // 2]
        s = plain[:, expert * intermediate // 16 : (expert + 1) * intermediate // 16]
        np.testing.assert_array_equal(packed[expert * stride : (expert + 1) * stride], packing.pack_expert("fc2", c, s))
    back_codes, back_scales = packing.unpack_fc2(packed, experts, hidden, intermediate)
    np.testing.assert_array_equal(back_scales, plain)
    np.testing.assert_array_equal(back_codes, zeroed(codes, plain))


def test_one_expert_can_be_packed_from_separate_up_and_gate_weights() -> None:
    rng = np.random.default_rng(4)
    (up, up_scales), (gate, gate_scales) = random_weights(rng, 128, 128), random_weights(rng, 128, 128)
    codes, scales = interleave_up_gate(up, gate), interleave_up_gate(up_scales, gate_scales)
    packed = packing.pack_fc1(codes[None], tile_scales(scales))
    np.testing.assert_array_equal(packed, packing.pack_expert("fc1", codes, scales))
    np.testing.assert_array_equal(untile_scales(tile_scales(scales), 256), scales)


def test_the_number_of_blocks_packed_at_once_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = random_weights(np.random.default_rng(5), 512, 256)
    whole = {op: packing.pack_expert(op, codes, scales) for op in ("fc1", "fc2")}
    monkeypatch.setattr(packing, "_ROWS_AT_ONCE_BYTES", 3 * 64 * 128)
    for op, expected in whole.items():
        np.testing.assert_array_equal(packing.pack_expert(op, codes, scales), expected)


def test_scales_are_re_encoded_exactly_and_in_order() -> None:
    spelled = packing._SCALES[: packing.FIRST_REFUSED_SCALE]
    exponent, mantissa = spelled[1:] >> 3, spelled[1:] & 7
    np.testing.assert_array_equal(2.0 ** (exponent.astype(np.float64) - 10) * (1 + mantissa / 8), E4M3_VALUES[1:127])
    assert spelled[0] == 0
    assert (np.diff(spelled.astype(int)) > 0).all()


def test_packing_into_a_buffer_takes_little_extra_memory() -> None:
    experts, hidden, intermediate = 4, 2048, 512
    rng = np.random.default_rng(6)
    codes, scales = random_weights(rng, experts * 2 * intermediate, hidden)
    codes, scales = codes.reshape(experts, 2 * intermediate, -1), tile_scales(scales)
    out = np.zeros(packing.packed_bytes("fc1", experts, hidden, intermediate), dtype=np.uint8)
    one_expert = packing.expert_stride("fc1", hidden, intermediate)
    tracemalloc.start()
    try:
        assert packing.pack_fc1(codes, scales, out) is out
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # a fixed working set (about fifteen times the codes packed at once) and one expert's scales; never all experts
    assert peak < 15 * packing._ROWS_AT_ONCE_BYTES + one_expert // 4
    np.testing.assert_array_equal(out, packing.pack_fc1(codes, scales))


CODES, SCALES = np.zeros((128, 64), np.uint8), np.ones((128, 8), np.uint8)


def with_byte(byte: int) -> np.ndarray:
    scales = SCALES.copy()
    scales[77, 5] = byte
    return scales


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.pack_expert("fc1", CODES, with_byte(0x7F)), "0x7F at row 77, K group 5 is NaN or negative"),
        (lambda: packing.pack_expert("fc2", CODES, with_byte(0xFF)), "0xFF at row 77"),
        (lambda: packing.pack_expert("fc2", CODES, with_byte(0x80)), "0x80 at row 77"),
        (lambda: packing.pack_expert("fc2", CODES, with_byte(0x9C)), "0x9C at row 77"),
        (lambda: packing.pack_expert("fc3", CODES, SCALES), "use fc1 or fc2"),
        (lambda: packing.pack_expert("fc1", CODES[:64], SCALES[:64]), "multiple of 128"),
        (lambda: packing.pack_expert("fc2", CODES[:96], SCALES[:96]), "multiples of 64"),
        (lambda: packing.pack_expert("fc2", CODES[:, :48], SCALES[:, :6]), "multiples of 64"),
        (lambda: packing.pack_expert("fc2", CODES.astype(np.int8), SCALES), "int8"),
        (lambda: packing.pack_expert("fc2", CODES, SCALES.astype(np.float32)), "float32"),
        (lambda: packing.pack_expert("fc2", CODES, SCALES[:, :4]), r"use \[128, 8\]"),
        (lambda: packing.pack_expert("fc2", np.asfortranarray(CODES), SCALES), "contiguous"),
        (lambda: packing.pack_expert("fc2", [1, 2], SCALES), "list"),  # type: ignore[arg-type]
        (lambda: packing.pack_expert("fc2", CODES, SCALES, np.zeros(4608, np.uint8)), r"use \[9216\]"),
        (lambda: packing.pack_expert("fc2", CODES, SCALES, np.frombuffer(bytes(9216), np.uint8)), "read-only"),
        (lambda: packing.pack_expert("fc2", CODES, SCALES, np.zeros(2 * 9216, np.uint8)[::2]), "contiguous"),
        (lambda: packing.pack_fc1(CODES, SCALES), r"\[any, any, any\]"),
        (lambda: packing.pack_fc1(CODES.reshape(2, 64, 64), SCALES), "I % 64"),
        (lambda: packing.pack_fc1(CODES[None], SCALES[:64]), r"use \[128, 8\]"),
        (lambda: packing.pack_fc2(CODES, SCALES, 3), "I % 64"),
        (lambda: packing.pack_fc2(CODES, SCALES, 0), "0 experts"),
        (lambda: packing.pack_fc2(CODES[:64], SCALES[:64], 1), r"use \[128, 8\]"),
        (lambda: packing.pack_fc2(CODES, np.asfortranarray(SCALES), 1), "contiguous"),
        (lambda: packing.packed_bytes("fc1", 1, 96, 64), "hidden=96"),
        (lambda: packing.packed_bytes("fc1", 1, 64, 0), "intermediate=0"),
        (lambda: packing.packed_bytes("fc2", 0, 64, 64), "experts=0"),
        (lambda: packing.unpack_expert("fc2", np.zeros(4608, np.uint8), 64, 256), r"use \[9216\]"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(call: object, message: str) -> None:
    with pytest.raises(ProblemError, match=message):
        call()  # type: ignore[operator]


def test_nothing_is_written_when_an_expert_is_refused() -> None:
    out = np.full(9216, 0xA5, dtype=np.uint8)
    with pytest.raises(ProblemError):
        packing.pack_expert("fc2", CODES, with_byte(0x7F), out)
    assert (out == 0xA5).all()
