"""A fused MoE with NVFP4 weights and bf16 activations in Triton, to compare with: what one writes in a day without leaving Python.

    blocks of rows of one expert ─┐
    16 × N bytes of codes, scales ┴─ decoded in registers to bf16 ─► tl.dot, weights on the left ─► SwiGLU inside FC1; the router's weight inside FC2

Codes are repacked offline: byte j of 16 holds values j and j + 16 of 32, so that both nibbles of a row of bytes are whole scale groups. A code
becomes the bits of a number 2**126 too small, a scale one 2**118 too large; their product is exact in bf16, the 2**8 that is left goes into alpha.
Multiplied in float32, or in bf16, two at once. A small set of block sizes, warps, stages and both products is searched at every shape and M. Its
host code needs torch.
"""

# types of device code are the tracer's
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import triton
import triton.language as tl

from densemoe.runtime.bench_nvfp4 import Nvfp4Competitor, Plain, Rotation, aligned
from densemoe.runtime.tune_cases import Shape

__all__ = ["Configuration", "Packed", "TritonMoe", "fc1", "fc2", "repack"]

HALF: Final = 16  # values of a scale group, bytes of 32 values


@dataclass(frozen=True)
class Configuration:
    """Block sizes in rows, output columns and values of K; warps and stages of a CTA; whether codes and scales are multiplied in bf16."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    packed: bool = False


ROWS: Final = (16, 32, 64, 128)
#: n, k, warps, stages, packed
REST: Final = (
    (64, 128, 4, 4, True), (64, 128, 4, 4, False), (64, 256, 4, 3, True), (128, 64, 4, 4, True), (128, 128, 4, 3, True), (128, 128, 8, 3, True),
    (128, 128, 8, 3, False), (64, 64, 4, 5, True), (64, 64, 4, 5, False),
)  # fmt: skip


@triton.jit
def _half(bits, scale, BLOCK_N: tl.constexpr, HALVES: tl.constexpr, PACKED: tl.constexpr):
    """bf16 ``[BLOCK_N, 16 * HALVES]`` of codes as the bits of a bf16, times e4m3 bytes, one for 16 of them; 2**8 too small."""
    small = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True)  # 2**120 too small
    factor = (small * 1329227995784915872903807060280344576.0) * 332306998946228968225951765070086144.0  # 2**120, 2**118
    if PACKED:
        codes = tl.reshape(bits.to(tl.int16).to(tl.bfloat16, bitcast=True), (BLOCK_N, HALVES, 16))
        values = codes * factor.to(tl.bfloat16)[:, :, None]
    else:
        codes = tl.reshape((bits << 16).to(tl.float32, bitcast=True), (BLOCK_N, HALVES, 16))
        values = (codes * factor[:, :, None]).to(tl.bfloat16)
    return tl.reshape(values, (BLOCK_N, HALVES * 16))


@triton.jit
def _decoded(codes, scales, groups, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr):
    """Both halves of ``[BLOCK_N, BLOCK_K]`` values, from pointers to a block's codes and scales; a row has ``groups`` of 32."""
    HALVES: tl.constexpr = BLOCK_K // 32
    n = tl.arange(0, BLOCK_N)[:, None]
    both = tl.load(codes + n * (groups * 16) + tl.arange(0, BLOCK_K // 2)[None, :]).to(tl.int32)
    pairs = scales + n * (groups * 2) + 2 * tl.arange(0, HALVES)[None, :]
    low = _half(((both & 7) << 6) | ((both & 8) << 12), tl.load(pairs), BLOCK_N, HALVES, PACKED)
    high = _half(((both & 0x70) << 2) | ((both & 0x80) << 8), tl.load(pairs + 1), BLOCK_N, HALVES, PACKED)
    return low, high


@triton.jit
def _fc1_kernel(x, codes, scales, alpha, ids, experts, out, pairs, hidden, intermediate, top_k,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    blocks_n = intermediate // BLOCK_N
    block_m = tl.program_id(0) // blocks_n
    first = (tl.program_id(0) % blocks_n) * BLOCK_N
    expert = tl.load(experts + block_m).to(tl.int64)
    row = tl.load(ids + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = row < pairs
    token = tl.where(valid, row // top_k, 0).to(tl.int64)
    groups = hidden // 32
    gate_at = (expert * 2 * intermediate + first) * groups
    up_at = gate_at + intermediate.to(tl.int64) * groups
    j = tl.arange(0, BLOCK_K // 2)[:, None]
    activations = x + token[None, :] * hidden + (j // 16) * 32 + j % 16
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(hidden // BLOCK_K):
        at = k * (BLOCK_K // 32)
        a_low = tl.load(activations + k * BLOCK_K, mask=valid[None, :], other=0.0)
        a_high = tl.load(activations + k * BLOCK_K + 16, mask=valid[None, :], other=0.0)
        low, high = _decoded(codes + (gate_at + at) * 16, scales + (gate_at + at) * 2, groups, BLOCK_N, BLOCK_K, PACKED)
        gate = tl.dot(low, a_low, gate)
        gate = tl.dot(high, a_high, gate)
        low, high = _decoded(codes + (up_at + at) * 16, scales + (up_at + at) * 2, groups, BLOCK_N, BLOCK_K, PACKED)
        up = tl.dot(low, a_low, up)
        up = tl.dot(high, a_high, up)
    factor = tl.load(alpha + expert) * 256.0
    gate *= factor
    y = up * factor * gate / (1.0 + tl.exp(-gate))
    n = first + tl.arange(0, BLOCK_N)
    tl.store(out + row.to(tl.int64)[None, :] * intermediate + n[:, None], y.to(tl.bfloat16), mask=valid[None, :])


@triton.jit
def _fc2_kernel(x, codes, scales, alpha, router, ids, experts, out, pairs, hidden, intermediate,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    blocks_n = hidden // BLOCK_N
    block_m = tl.program_id(0) // blocks_n
    first = (tl.program_id(0) % blocks_n) * BLOCK_N
    expert = tl.load(experts + block_m).to(tl.int64)
    row = tl.load(ids + block_m * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = row < pairs
    pair = tl.where(valid, row, 0).to(tl.int64)
    groups = intermediate // 32
    start = (expert * hidden + first) * groups
    j = tl.arange(0, BLOCK_K // 2)[:, None]
    activations = x + pair[None, :] * intermediate + (j // 16) * 32 + j % 16
    c = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(intermediate // BLOCK_K):
        at = start + k * (BLOCK_K // 32)
        a_low = tl.load(activations + k * BLOCK_K, mask=valid[None, :], other=0.0)
        a_high = tl.load(activations + k * BLOCK_K + 16, mask=valid[None, :], other=0.0)
        low, high = _decoded(codes + at * 16, scales + at * 2, groups, BLOCK_N, BLOCK_K, PACKED)
        c = tl.dot(low, a_low, c)
        c = tl.dot(high, a_high, c)
    factor = tl.load(alpha + expert) * 256.0 * tl.load(router + pair)
    n = first + tl.arange(0, BLOCK_N)
    tl.store(out + pair[None, :] * hidden + n[:, None], (c * factor[None, :]).to(tl.bfloat16), mask=valid[None, :])


@dataclass
class Packed:
    """Weights as the kernels read them, torch tensors: repacked codes ``[E, N, K/2]``, scales ``[E, N, K/16]``, alpha ``[E]``."""

    codes: Any
    scales: Any
    alpha: Any


def repack(plain: Plain) -> Packed:
    """Byte j of 16: values j (low nibble) and j + 16 (high) of 32."""
    codes = plain.codes
    experts, n, half = codes.shape
    made = codes.new_empty(codes.shape)
    for expert in range(experts):  # bounded memory
        pairs = codes[expert].reshape(n, half // HALF, HALF)
        values = codes.new_empty((n, half // HALF, 2 * HALF))
        values[:, :, 0::2], values[:, :, 1::2] = pairs & 15, pairs >> 4
        made[expert] = (values[:, :, :HALF] | (values[:, :, HALF:] << 4)).reshape(n, half)
    return Packed(made, plain.scales.contiguous(), plain.alpha)


def fc1(x: Any, own: Packed, ids: Any, experts: Any, out: Any, top_k: int, configuration: Configuration) -> Any:
    """FC1 with SwiGLU.

    Args:
        x: bf16 ``[M, H]``.
        ids, experts: int32, as ``Aligned``, on the device.
        out: bf16 ``[M·k, I]``, written.
    """
    pairs, intermediate = out.shape
    grid = (experts.numel() * (intermediate // configuration.n),)
    _fc1_kernel[grid](
        x, own.codes, own.scales, own.alpha, ids, experts, out, pairs, x.shape[1], intermediate, top_k,
        BLOCK_M=configuration.m, BLOCK_N=configuration.n, BLOCK_K=configuration.k, PACKED=configuration.packed,
        num_warps=configuration.warps, num_stages=configuration.stages,
    )  # fmt: skip
    return out


def fc2(x: Any, own: Packed, router: Any, ids: Any, experts: Any, rows: Any, configuration: Configuration) -> Any:
    """FC2 of every pair times its router's weight, then the sum over a token's experts: bf16 ``[M, H]``.

    Args:
        x: bf16 ``[M·k, I]``.
        router: float32 ``[M, k]``.
        rows: bf16 ``[M·k, H]``, written.
    """
    pairs, hidden = rows.shape
    grid = (experts.numel() * (hidden // configuration.n),)
    _fc2_kernel[grid](
        x, own.codes, own.scales, own.alpha, router, ids, experts, rows, pairs, hidden, x.shape[1],
        BLOCK_M=configuration.m, BLOCK_N=configuration.n, BLOCK_K=configuration.k, PACKED=configuration.packed,
        num_warps=configuration.warps, num_stages=configuration.stages,
    )  # fmt: skip
    return rows.view(*router.shape, hidden).sum(1)


class TritonMoe(Nvfp4Competitor):
    """The kernels above as a competitor."""

    name = "Triton NVFP4"

    def configurations(self, op: str, shape: Shape, m: int) -> Sequence[Hashable]:
        """Blocks that divide the shape, of rows around what an expert has."""
        n, k = (shape.intermediate, shape.hidden) if op == "fc1" else (shape.hidden, shape.intermediate)
        share = m * shape.top_k / shape.experts
        rows = [each for each in ROWS if each == ROWS[0] or share > each / 4]
        rest = [each for each in REST if n % each[0] == 0 and k % each[1] == 0]
        return [Configuration(each, *others) for each in rows for others in rest]

    def convert(self, op: str, shape: Shape, plain: Plain) -> Packed:
        """Repacked codes."""
        return repack(plain)

    def copied(self, own: Packed) -> Packed:
        """The same in other memory."""
        return Packed(own.codes.clone(), own.scales.clone(), own.alpha)

    def bind(self, op: str, shape: Shape, own: Packed, rotation: Rotation, configuration: Configuration) -> Callable[[Any], Any]:
        """The op on one rotation."""
        torch = self.torch
        sorted_pairs = aligned(rotation.routing, shape.experts, configuration.m)
        ids, experts = (torch.from_numpy(each).to(self.device) for each in (sorted_pairs.ids, sorted_pairs.experts))
        pairs = len(rotation.routing) * shape.top_k
        out = torch.empty(pairs, shape.intermediate if op == "fc1" else shape.hidden, dtype=torch.bfloat16, device=self.device)
        if op == "fc1":
            return lambda x: fc1(x, own, ids, experts, out, shape.top_k, configuration)
        return lambda x: fc2(x, own, rotation.router, ids, experts, out, configuration)
