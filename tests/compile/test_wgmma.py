"""The audit of WGMMA kernels: one whose accumulators ptxas cannot keep in flight fails the build, the shipped ones do not."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest

from densemoe.compile import kernels
from densemoe.compile.audit import audit, count_opcodes, serialised
from densemoe.compile.elf import warpgroup_products_and_waits
from densemoe.compile.toolchain import compile_variant
from densemoe.runtime.variant import Variant

kernels.load("sm90_fc1")  # imports CuTe DSL as a build does

import cutlass  # noqa: E402
import cutlass.cute as cute  # noqa: E402
from cutlass import Float32, Int32, Uint8, Uint32  # noqa: E402
from cutlass.experimental import primitives as pr  # noqa: E402

from densemoe.compile.kernels import sm90_wgmma as wgmma  # noqa: E402
from densemoe.compile.kernels.host import pointer  # noqa: E402
from densemoe.compile.kernels.sm90_wgmma_config import config_of  # noqa: E402


@cute.kernel
def three_products(c: cutlass.Pointer, touches: cutlass.Constexpr):
    tid, _, _ = cute.arch.thread_idx()
    tokens = cutlass.Array(Uint8, 16384, space=cutlass.AddressSpace.smem, alignment=1024)
    low = wgmma.descriptor_low(tokens.data_ptr().toint(Int32))
    sums = [Float32(0.0) for _ in range(8)]
    a = [Uint32(tid)] * 4
    pr.wgmma_fence_aligned()
    for step in cutlass.range_constexpr(3):
        sums = wgmma.wgmma(sums, a, wgmma.descriptor(low + 2 * step))
        if cutlass.const_expr(touches):
            sums = [each + Float32(1.0) for each in sums]
    pr.wgmma_commit_group_sync_aligned()
    sums = wgmma.wait_for_products(sums)
    for i in cutlass.range_constexpr(8):
        pr.inline_ptx_hl("st.global.f32 [{$r0}], {$r1};", read_only_args=[c + tid * 32 + i * 4, sums[i]])


@cute.jit
def host(c: cute.Pointer, touches: cutlass.Constexpr):
    three_products(c.raw_ptr(), touches).launch(grid=(1, 1, 1), block=[128, 1, 1])


def compiled(touches: bool) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        made = cute.compile(host, pointer(Uint8, 16), touches, options=f"--gpu-arch=sm_90a --keep-cubin --keep-ptx --dump-dir={folder}")
        ptx = made.__ptx__
        return (ptx if isinstance(ptx, str) else ptx.decode()), made.__cubin__


def test_accumulators_that_are_touched_in_flight_are_a_fault() -> None:
    ptx, cubin = compiled(True)
    products, waits = warpgroup_products_and_waits(cubin)
    assert products == 3
    assert waits >= products
    (fault,) = serialised(count_opcodes(ptx), cubin)
    assert fault.startswith(f"{waits} waits for 3 products in the machine code, 1 for 3 in the PTX: ptxas serialised WGMMA")


def test_one_group_of_products_has_one_wait() -> None:
    ptx, cubin = compiled(False)
    assert warpgroup_products_and_waits(cubin) == (3, 1)
    assert serialised(count_opcodes(ptx), cubin) == []


@pytest.mark.parametrize("key", ["groupedfc1.sm90a.t32x256.c1x1.bf16-bf16", "groupedfc2.sm90a.t128x256.c1x1.bf16-bf16"])
def test_shipped_kernels_wait_once_a_group_and_do_not_spill(key: str) -> None:
    variant = Variant.parse(key)
    name = f"sm90_wgmma_{variant.op}"
    made = compile_variant(variant, name)
    audit(variant, kernels.load(name), made)
    products, waits = warpgroup_products_and_waits(made.cubin)
    widths = len(config_of(variant).widths)  # each has a loop
    groups = {32: 8, 128: 4}[variant.tile_m]  # of a superblock: m16 blocks of a warp x K 64 halves
    assert (products, waits) == (4 * groups * widths, (groups + 1) * widths)
    assert made.facts.stack == 0
