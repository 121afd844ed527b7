"""wgmma, tcgen05 and tensor copies as a kernel uses them, on every schedule, and the faults that the emulator must find in them."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from snippets import kernel

from densemoe.compile.emulator import GlobalMemory, Launch, Report, run
from densemoe.compile.emulator.smem_descriptor import SmemDescriptor
from densemoe.compile.emulator.tcgen05 import InstructionDescriptor
from densemoe.compile.emulator.tensor_map import DataType, Swizzle, TensorMap
from densemoe.runtime.errors import EmulatorError

SCHEDULES = ["eager", "lazy", "random:1", "random:2", "pct:1:3"]
WINDOW = 1024  # shared address of the snippets' window
LEADING, STRIDE = 128, 256  # core matrices of 8 rows and 16 bytes, two along K


def arranged(matrix: NDArray[np.float16]) -> NDArray[np.uint8]:
    """Rows of 32 bytes as K-major core matrices without swizzle: byte (r, b) at (r / 8)·256 + (r % 8)·16 + (b / 16)·128 + b % 16."""
    rows = matrix.view(np.uint8).reshape(-1, 8, 2, 16)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3)).reshape(-1)


def execute(text: str, buffers: dict[str, NDArray[Any]], threads: int, schedule: str) -> Report:
    memory = GlobalMemory()
    pointers = [memory.add(name, array) for name, array in buffers.items()]
    return run(text, Launch("", (1, 1, 1), (threads, 1, 1), parameters=struct.pack("<QQ", *pointers)), memory, schedule)


# --- wgmma

WGMMA = """
    ld.param.u64 %x0, [input]; ld.param.u64 %x1, [output]; mov.u32 %t0, %tid.x; mul.wide.u32 %x2, %t0, 4; add.s64 %x3, %x0, %x2;
    mov.u32 %r1, window; shl.b32 %r2, %t0, 2; add.u32 %r3, %r1, %r2;
    setp.ge.u32 %p1, %t0, 64; @%p1 bra STORED; ld.global.b32 %r4, [%x3]; st.shared.b32 [%r3], %r4; STORED:
    {fence} {barrier}
    mov.b32 %r5, 0x3C003C00; mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, {{%r5, %r5, %r5, %r5}}, {descriptor}, 1, 1, 1, 0;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%r10, %r11, %r12, %r13}}, {{%r5, %r5, %r5, %r5}}, {descriptor}, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {wait}
    {after}
    shl.b32 %r6, %t0, 4; cvt.u64.u32 %x5, %r6; add.s64 %x5, %x5, %x1; st.global.v4.b32 [%x5], {{%r10, %r11, %r12, %r13}};
"""


def wgmma(schedule: str, **changes: str) -> tuple[NDArray[np.float32], NDArray[np.float16]]:
    b = np.random.default_rng(1).integers(-4, 5, (8, 16)).astype(np.float16)
    descriptor = SmemDescriptor(WINDOW, LEADING, STRIDE).encode_sm90()
    parts = {"fence": "fence.proxy.async;", "barrier": "bar.sync 0;", "wait": "wgmma.wait_group.sync.aligned 0;", "after": ""} | changes
    out = np.zeros(512, np.float32)
    body = WGMMA.format(descriptor=descriptor, **parts)
    execute(kernel(body, shared=1024), {"input": arranged(b).view(np.uint32), "output": out}, 128, schedule)
    return out, b


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_wgmma_multiplies_shared_memory(schedule: str) -> None:
    out, b = wgmma(schedule)
    sums = 2 * b.astype(np.float32).sum(axis=1)  # A is 1 everywhere, twice accumulated
    lane = np.arange(128) % 4
    want = np.stack([sums[2 * lane], sums[2 * lane + 1], sums[2 * lane], sums[2 * lane + 1]], axis=1)
    np.testing.assert_array_equal(out.reshape(128, 4), want)


def test_wgmma_needs_the_proxy_fence_and_the_barrier() -> None:
    with pytest.raises(EmulatorError, match=r"race.*without fence\.proxy\.async"):
        wgmma("eager", fence="")
    with pytest.raises(EmulatorError, match=r"race|before it was written"):
        wgmma("random:3", barrier="")


def test_overwriting_what_a_wgmma_may_still_read_is_an_error() -> None:
    overwrite = "bar.sync 0; st.shared.b32 [%r3], %t0; wgmma.wait_group.sync.aligned 0;"
    for schedule in ("eager", "lazy"):
        with pytest.raises(EmulatorError, match=r"race|overwritten while a wgmma"):
            wgmma(schedule, wait="", after=overwrite)


#: Warp 0 stores a part by a bulk copy and waits for it; the others go on.
STORES_ALONE = """bar.sync 0;
    setp.gt.u32 %p2, %t0, 31; @%p2 bra JOINED;
    setp.ne.u32 %p3, %t0, 0; @%p3 bra COPIED;
    cp.async.bulk.global.shared::cta.bulk_group [%x1], [%r1], 16; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    COPIED: bar.warp.sync -1; JOINED:"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warps_of_a_warpgroup_that_parted_meet_at_the_fence(schedule: str) -> None:
    out, _ = wgmma(schedule, barrier=STORES_ALONE)
    np.testing.assert_array_equal(out, wgmma(schedule)[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warpgroup_without_one_of_its_warps_is_a_deadlock(schedule: str) -> None:
    with pytest.raises(EmulatorError, match=r"warp 0 at PTX line \d+ \(wgmma\.fence.*\) waits for the other warps of its warpgroup"):
        wgmma(schedule, barrier="bar.sync 0; setp.gt.u32 %p2, %t0, 95; @%p2 ret;")


# --- tcgen05

TCGEN05 = """
    ld.param.u64 %x0, [input]; ld.param.u64 %x1, [output]; mov.u32 %t0, %tid.x; shr.u32 %t1, %t0, 5;
    shfl.sync.idx.b32 %t1, %t1, 0, 31, -1; mov.u32 %r1, window;
    setp.ne.u32 %p1, %t1, 0; @%p1 bra READY;
    tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1+32], 32;
    elect.sync %r2|%p2, -1; @!%p2 bra READY;
    mbarrier.init.shared.b64 [%r1], 1; mbarrier.init.shared.b64 [%r1+8], 1; fence.mbarrier_init.release.cluster;
    READY: tcgen05.fence::before_thread_sync; bar.sync 0; tcgen05.fence::after_thread_sync;
    ld.shared.b32 %r3, [%r1+32];
    @%p1 bra EPILOGUE; elect.sync %r2|%p2, -1; @!%p2 bra EPILOGUE;
    mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], 4608; add.u32 %r4, %r1, 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r4], [%x0], 4608, [%r1];
    {loaded}
    mov.b32 %r5, {idesc}; setp.ne.u32 %p4, 0, 0; setp.eq.u32 %p5, 0, 0;
    tcgen05.mma.cta_group::1.kind::f16 [%r3], {a}, {b}, %r5, %p4;
    tcgen05.mma.cta_group::1.kind::f16 [%r3], {a}, {b}, %r5, %p5;
    {commit}
    EPILOGUE: {computed} {after}
    shl.b32 %r6, %t1, 21; add.u32 %r6, %r6, %r3;
    tcgen05.ld.sync.aligned.32x32b.x16.b32 {{%r40, %r41, %r42, %r43, %r44, %r45, %r46, %r47, %r48, %r49, %r50, %r51, %r52, %r53, %r54, %r55}}, [%r6];
    tcgen05.wait::ld.sync.aligned;
    {store}
    mul.wide.u32 %x5, %t0, 64; add.s64 %x5, %x5, %x1;
    st.global.v4.b32 [%x5], {{%r40, %r41, %r42, %r43}}; st.global.v4.b32 [%x5+16], {{%r44, %r45, %r46, %r47}};
    st.global.v4.b32 [%x5+32], {{%r48, %r49, %r50, %r51}}; st.global.v4.b32 [%x5+48], {{%r52, %r53, %r54, %r55}};
    tcgen05.fence::before_thread_sync; bar.sync 0; tcgen05.fence::after_thread_sync;
    {free}
"""
PARTS = {
    "loaded": "L: mbarrier.try_wait.parity.shared.b64 %p3, [%r1], 0; @!%p3 bra L;",
    "commit": "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r1+8];",
    "computed": "C: mbarrier.try_wait.parity.shared.b64 %p3, [%r1+8], 0; @!%p3 bra C;",
    "after": "tcgen05.fence::after_thread_sync;",
    "free": "@!%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;",
    "store": "",
}


def tcgen05(schedule: str, **changes: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(2)
    a, b = rng.integers(-3, 4, (128, 16)).astype(np.float16), rng.integers(-3, 4, (16, 16)).astype(np.float16)
    start = WINDOW + 1024
    instruction = InstructionDescriptor("f16", 128, 16, 16, 1, False, "f16", "f16", "f32").encode()
    descriptors = [SmemDescriptor(start + offset, LEADING, STRIDE).encode_sm100() for offset in (0, 4096)]
    body = TCGEN05.format(idesc=instruction, a=descriptors[0], b=descriptors[1], **(PARTS | changes))
    out = np.zeros((128, 16), np.float32)
    given = np.concatenate([arranged(a), arranged(b)])
    execute(kernel(body, shared=8192), {"input": given, "output": out}, 128, schedule)
    return out, 2 * (a.astype(np.float32) @ b.astype(np.float32).T)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tcgen05_allocates_multiplies_commits_and_loads(schedule: str) -> None:
    got, want = tcgen05(schedule)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tcgen05_stores_come_back(schedule: str) -> None:
    registers = "{" + ", ".join(f"%r{i}" for i in range(55, 39, -1)) + "}"
    again = "{" + ", ".join(f"%r{i}" for i in range(40, 56)) + "}"
    store = (
        f"tcgen05.st.sync.aligned.32x32b.x16.b32 [%r6+16], {registers}; tcgen05.wait::st.sync.aligned;"
        f" tcgen05.ld.sync.aligned.32x32b.x16.b32 {again}, [%r6+16]; tcgen05.wait::ld.sync.aligned;"
    )
    got, want = tcgen05(schedule, store=store)
    np.testing.assert_array_equal(got, want[:, ::-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loaded": ""}, r"race.*without synchronisation|before it was written"),
        ({"computed": ""}, r"race|before it was written"),
        ({"after": ""}, r"race.*without tcgen05\.fence"),
        ({"commit": ""}, r"(?s)deadlock.*mbarrier at shared address 0x408"),
        ({"free": ""}, r"columns of tensor memory allocated"),
        ({"free": "@!%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 64;"}, r"tcgen05\.dealloc of 64 columns"),
        ({"store": "add.u32 %r7, %r6, 32; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r8}, [%r7];"}, r"columns 32 to 32 .* not allocated"),
    ],
)
def test_faults_around_tensor_memory_are_found(changes: dict[str, str], message: str) -> None:
    for schedule in ("eager", "lazy", "random:5"):
        with pytest.raises(EmulatorError, match=message):
            tcgen05(schedule, **changes)


# --- tensor copies

COPY = """
.version 9.0
.target sm_100a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry copy(.param .align 64 .b8 of[128], .param .align 64 .b8 to[128])
{
    .reg .pred %p<5>; .reg .b32 %r<10>; .reg .b64 %rd<10>;
    mov.b64 %rd1, of; mov.b64 %rd2, to; cvta.param.u64 %rd1, %rd1; cvta.param.u64 %rd2, %rd2;
    mov.b32 %r1, memory; add.u32 %r2, %r1, 1024; elect.sync %r3|%p1, -1; @!%p1 bra DONE;
    mbarrier.init.shared.b64 [%r1], 1; fence.proxy.async;
    mbarrier.arrive.expect_tx.shared.b64 %rd3, [%r1], 2048;
    cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd1, {-8, 4}], [%r1];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra WAIT;
    REDUCE.global.shared::cta.KIND.bulk_group [%rd2, {0, 2}], [%r2];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
DONE: ret;
}
"""


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduce", [False, True])
def test_tensor_copies_fill_clip_and_reduce(schedule: str, reduce: bool) -> None:
    source = np.arange(16 * 64, dtype=np.uint32).reshape(16, 64)
    target = np.full((16, 64), 1000, np.uint32)
    memory = GlobalMemory()
    maps = [
        TensorMap(memory.add(name, array), DataType.UINT32, (64, 16), (256,), (32, 16), (1, 1), swizzle=Swizzle.BYTES_128).encode()
        for name, array in (("of", source), ("to", target))
    ]
    name = "cp.reduce.async.bulk.tensor.2d" if reduce else "cp.async.bulk.tensor.2d"
    text = COPY.replace("REDUCE", name).replace("KIND", "add.tile" if reduce else "tile")
    report = run(text, Launch("copy", (1, 1, 1), (32, 1, 1), dynamic_smem=4096, parameters=b"".join(maps)), memory, schedule)
    tile = np.zeros((16, 32), np.uint32)
    tile[:12, 8:] = source[4:16, :24]
    want = np.full((16, 64), 1000, np.uint32)
    want[2:, :32] = tile[:14] + (1000 if reduce else 0)
    np.testing.assert_array_equal(target, want)
    assert report.bytes["tensor global to shared"] == 2048


def test_lints_name_loads_that_are_not_waited_for_and_products_that_ptxas_may_contract() -> None:
    text = kernel("mov.b32 %r1, 0f3F800000; mul.f32 %r2, %r1, %r1; add.f32 %r3, %r2, %r1; mul.rn.f32 %r4, %r1, %r1; add.rn.f32 %r5, %r4, %r1;")
    memory = GlobalMemory()
    report = run(text, Launch("", (1, 1, 1), (32, 1, 1), parameters=bytes(16)), memory)
    assert len(report.lints) == 1
    assert "may be contracted" in report.lints[0]
    late = {"store": "add.u32 %r7, %r6, 0; tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r8}, [%r7]; add.u32 %r8, %r8, 1; tcgen05.wait::ld.sync.aligned;"}
    body = TCGEN05.format(idesc=0, a=0, b=0, **(PARTS | late))
    from densemoe.compile.emulator.translation import load_program

    lints = load_program(kernel(body, shared=8192), "", (128, 1, 1), False).lints
    assert any("%r8 is read before tcgen05.wait::ld" in each for each in lints)


def test_bank_conflicts_are_counted() -> None:
    body = """mov.u32 %t0, %tid.x; mov.u32 %r1, window; shl.b32 %r2, %t0, {shift}; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1], %t0;"""
    for shift, cycles in ((2, 0), (3, 1), (7, 31)):
        report = execute(kernel(body.format(shift=shift), shared=8192), {"input": np.zeros(4), "output": np.zeros(4)}, 32, "eager")
        assert report.bank_conflicts == cycles
