"""Memory, barriers, asynchronous copies and what the emulator refuses, on small kernels."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))

from snippets import kernel, lanes, launch

from densemoe.compile.emulator import GlobalMemory, Launch, run
from densemoe.compile.emulator.accesses import POLLS_A_TURN
from densemoe.runtime.errors import EmulatorError

SCHEDULES = ["eager", "lazy", "random:1", "random:2", "pct:1:3"]
POINTER = "ld.param.u64 %x0, [input]; ld.param.u64 %x1, [output]; mov.u32 %t0, %tid.x; mul.wide.u32 %x2, %t0, 4;"


def one(
    body: str,
    given: NDArray[Any],
    size: int = 32,
    *,
    threads: int = 32,
    grid: int = 1,
    cluster: int = 1,
    schedule: str = "eager",
    shared: int = 0,
) -> NDArray[np.uint32]:
    """Runs a body with `input` and a uint32 `output` of `size` elements; %x3 and %x4 are their addresses at this thread."""
    out = np.zeros(size, np.uint32)
    text = kernel(POINTER + "add.s64 %x3, %x0, %x2; add.s64 %x4, %x1, %x2;\n" + body, shared=shared)
    launch(text, {"input": given, "output": out}, threads=threads, grid=grid, cluster=cluster, schedule=schedule)
    return out


# --- what is refused before anything runs


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("max.NaN.ftz.xorsign.f32 %r1, %r2, %r3;", "not modelled"),
        ("fma.rn.f32x4 %r1, %r2, %r3, %r4;", "not modelled"),
        ("add.s32 %r1, %r2;", "2 operands, 3 needed"),
        ("tcgen05.mma.cta_group::3.kind::f16 [%r1], %d1, %d2, %r2, %p1;", "not modelled"),
        ("mov.b32 %r1, %unknown;", "neither a declared register nor"),
        ("bra NOWHERE;", "does not exist"),
        ("ld.global.b32 %r1, [nothing];", "not declared"),
    ],
)
def test_unknown_instructions_are_errors_with_their_line(instruction: str, reason: str) -> None:
    with pytest.raises(EmulatorError, match=rf"(?s)PTX line \d+.*{reason}"):
        one("trap;\n" + instruction, np.zeros(4, np.uint32))


def test_an_unknown_directive_is_an_error_with_its_line() -> None:
    with pytest.raises(EmulatorError, match=r"PTX line \d+.*\.surprise"):
        one(".surprise 3;", np.zeros(4, np.uint32))


# --- memory


def test_accesses_beyond_a_buffer_name_it_and_the_line() -> None:
    with pytest.raises(EmulatorError, match=r"PTX line \d+ \(ld.global.b32\), CTA .* out of bounds.*behind input"):
        one("ld.global.b32 %r1, [%x3];", np.zeros(31, np.uint32))
    with pytest.raises(EmulatorError, match=r"out of bounds.*behind output"):
        one("st.global.b32 [%x4+4], %t0;", np.zeros(32, np.uint32))
    with pytest.raises(EmulatorError, match="misaligned"):
        one("ld.global.b32 %r1, [%x3+2];", np.zeros(64, np.uint32))
    with pytest.raises(EmulatorError, match="in no buffer"):
        one("mov.b64 %x5, 0; ld.global.b32 %r1, [%x5];", np.zeros(32, np.uint32))


def test_reads_of_what_was_never_written_are_errors() -> None:
    with pytest.raises(EmulatorError, match=r"register %r77 is read before it was written"):
        one("add.u32 %r1, %r77, 1;", np.zeros(32, np.uint32))
    with pytest.raises(EmulatorError, match=r"register %r1 is read by lane 4, in which it was never written"):
        one("setp.lt.u32 %p1, %t0, 4; @%p1 mov.b32 %r1, 3; add.u32 %r2, %r1, 1;", np.zeros(32, np.uint32))
    with pytest.raises(EmulatorError, match="shared memory at 0x400 is read before it was written"):
        one("mov.u32 %r1, window; ld.shared.b32 %r2, [%r1];", np.zeros(32, np.uint32), shared=1024)
    memory = GlobalMemory()
    where = memory.add("fresh", np.zeros(32, np.uint32), written=False)
    given = Launch("", (1, 1, 1), (32, 1, 1), parameters=struct.pack("<QQ", where, 0))
    with pytest.raises(EmulatorError, match=r"fresh\[byte 0\] is read before it was written"):
        run(kernel("ld.param.u64 %x0, [input]; ld.global.b32 %r1, [%x0];"), given, memory)


def test_outputs_may_be_written_once() -> None:
    memory = GlobalMemory()
    where = memory.add("c", np.zeros(32, np.uint32), once=True)
    text = kernel(
        "ld.param.u64 %x0, [input]; mov.u32 %t0, %tid.x; mul.wide.u32 %x2, %t0, 4; add.s64 %x0, %x0, %x2; "
        "and.b32 %t0, %t0, 31; st.global.b32 [%x0], %t0; bar.sync 0; st.global.b32 [%x0], %t0;")
    with pytest.raises(EmulatorError, match=r"c\[byte 0\] is written twice"):
        run(text, Launch("", (1, 1, 1), (32, 1, 1), parameters=struct.pack("<QQ", where, 0)), memory)
    memory = GlobalMemory()
    where = memory.add("a", np.zeros(32, np.uint32), writable=False)
    with pytest.raises(EmulatorError, match="read-only"):
        run(text, Launch("", (1, 1, 1), (32, 1, 1), parameters=struct.pack("<QQ", where, 0)), memory)


def test_vectors_narrow_types_and_generic_addresses() -> None:
    data = np.arange(128, dtype=np.uint32)
    out = one(
        "shl.b32 %r9, %t0, 4; cvt.u64.u32 %x5, %r9; add.s64 %x5, %x5, %x0; "
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%x5]; add.u32 %r5, %r1, %r4; st.b32 [%x4], %r5;", data)
    np.testing.assert_array_equal(out, data[::4] + data[3::4])
    out = one("ld.global.s8 %r1, [%x3+1]; st.global.b32 [%x4], %r1;", np.full(32, 0x00008000, np.uint32))
    np.testing.assert_array_equal(out, 0xFFFFFF80)
    body = """mov.u32 %r1, window; shl.b32 %r2, %t0, 2; add.u32 %r1, %r1, %r2; st.shared.b32 [%r1], %t0; bar.warp.sync -1;
        xor.b32 %r3, %r2, 4; mov.u32 %r4, window; add.u32 %r4, %r4, %r3; cvt.u64.u32 %x5, %r4; cvta.shared.u64 %x5, %x5;
        ld.b32 %r5, [%x5]; st.global.b32 [%x4], %r5;"""
    np.testing.assert_array_equal(one(body, data, shared=1024), np.arange(32) ^ 1)


def test_local_memory_belongs_to_a_lane() -> None:
    text = kernel(POINTER +
        "add.s64 %x4, %x1, %x2; mov.u64 %x5, slots; st.local.b32 [%x5+4], %t0; ld.local.b32 %r1, [%x5+4]; "
        "st.global.b32 [%x4], %r1;", extra=".local .align 8 .b8 slots[16];")
    out = np.zeros(64, np.uint32)
    launch(text, {"input": np.zeros(4, np.uint32), "output": out}, threads=64)
    np.testing.assert_array_equal(out, np.arange(64))


# --- lanes of a warp


def test_shuffles_votes_and_reductions() -> None:
    a = np.random.default_rng(1).integers(0, 1000, 64).astype(np.uint32)
    rows = a.reshape(2, 32)
    np.testing.assert_array_equal(lanes("shfl.sync.bfly.b32 %r20, %r0, 5, 31, -1;", [a], [32])[0], rows[:, np.arange(32) ^ 5].ravel())
    np.testing.assert_array_equal(lanes("shfl.sync.idx.b32 %r20, %r0, 7, 31, -1;", [a], [32])[0], rows[:, 7].repeat(32))
    up = rows[:, np.maximum(np.arange(32) - 3, 0)].copy()
    up[:, :3] = rows[:, :3]
    np.testing.assert_array_equal(lanes("shfl.sync.up.b32 %r20, %r0, 3, 0, -1;", [a], [32])[0], up.ravel())
    down = rows.copy()
    down[:, :30] = rows[:, 2:]
    np.testing.assert_array_equal(lanes("shfl.sync.down.b32 %r20|%p1, %r0, 2, 31, -1;", [a], [32])[0], down.ravel())
    ballot = lanes("setp.lt.u32 %p1, %r0, 500; vote.sync.ballot.b32 %r20, %p1, -1;", [a], [32])[0]
    want = [sum(int(x < 500) << i for i, x in enumerate(row)) for row in rows]
    np.testing.assert_array_equal(ballot, np.repeat(np.array(want, np.uint32), 32))
    np.testing.assert_array_equal(lanes("redux.sync.add.u32 %r20, %r0, -1;", [a], [32])[0], rows.sum(axis=1).repeat(32))
    np.testing.assert_array_equal(lanes("redux.sync.max.s32 %r20, %r0, -1;", [a], [32])[0], rows.max(axis=1).repeat(32))
    b = (a % 3).astype(np.uint32)
    same = [[sum(int(x == y) << i for i, y in enumerate(row)) for x in row] for row in b.reshape(2, 32)]
    np.testing.assert_array_equal(lanes("match.any.sync.b32 %r20, %r0, -1;", [b], [32])[0], np.array(same, np.uint32).ravel())
    elected = lanes("elect.sync %r1|%p1, -1; selp.b32 %r20, 1, 0, %p1;", [a], [32])[0]
    np.testing.assert_array_equal(elected.reshape(2, 32).sum(axis=1), 1)


def test_a_shuffle_from_an_inactive_lane_is_an_error() -> None:
    with pytest.raises(EmulatorError, match="in the member mask and inactive"):
        one("setp.lt.u32 %p1, %t0, 16; @!%p1 bra OUT; shfl.sync.idx.b32 %r1, %t0, 20, 31, -1; OUT:", np.zeros(32, np.uint32))


def test_atomics_and_vector_reductions() -> None:
    out = one("atom.global.add.u32 %r1, [%x1], 2; bar.sync 0;", np.zeros(4, np.uint32), threads=64)
    assert out[0] == 128
    out = one(
        "atom.global.max.s32 %r1, [%x1+4], %t0; atom.global.cas.b32 %r2, [%x1+8], 0, 9; "
        "atom.global.inc.u32 %r3, [%x1+12], 4;", np.zeros(4, np.uint32))
    assert out[1] == 31
    assert out[2] == 9
    assert out[3] == 32 % 5
    body = "mov.b32 %r1, 0f3F800000; mov.b32 %r2, 0f40000000; red.relaxed.gpu.global.add.v4.f32 [%x1], {%r1, %r2, %r1, %r2};"
    np.testing.assert_array_equal(one(body, np.zeros(4, np.uint32))[:4].view(np.float32), [32, 64, 32, 64])
    shared = (
        "mov.u32 %r1, window; setp.eq.u32 %p1, %t0, 0; @%p1 st.shared.b32 [%r1], 0; bar.sync 0; "
        "atom.shared.add.u32 %r2, [%r1], 1; bar.sync 0; ld.shared.b32 %r3, [%r1]; st.global.b32 [%x4], %r3;"
    )
    np.testing.assert_array_equal(one(shared, np.zeros(4, np.uint32), shared=1024), 32)


def test_lanes_that_meet_in_an_atomic_come_in_any_order() -> None:
    """What each reads is its place, another under each random schedule, in the order of lanes where nothing is random; what is left is the same."""
    body = "mov.u32 %r1, window; setp.eq.u32 %p1, %t0, 0; @%p1 st.shared.b32 [%r1], 0; bar.sync 0; atom.shared.add.u32 %r20, [%r1], 1;"
    places = {schedule: lanes(body, [np.zeros(32, np.uint32)], [32], threads=32, shared=1024, schedule=schedule)[0].tolist()
              for schedule in ("eager", "lazy", "random:1", "random:2", "pct:1:3")}  # fmt: skip
    assert places["eager"] == places["lazy"] == list(range(32))
    assert all(sorted(each) == list(range(32)) for each in places.values())
    assert len({tuple(each) for each in places.values()}) > 2
    assert places["random:1"] != places["eager"]


# --- barriers

EXCHANGE = """mov.u32 %r1, window; shl.b32 %r2, %t0, 2; add.u32 %r3, %r1, %r2; st.shared.b32 [%r3], %t0;
    {} xor.b32 %r4, %r2, 252; add.u32 %r4, %r1, %r4; ld.shared.b32 %r5, [%r4]; st.global.b32 [%x4], %r5;"""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_cta_barrier_orders_shared_memory(schedule: str) -> None:
    out = one(EXCHANGE.format("bar.sync 0;"), np.zeros(4, np.uint32), 64, threads=64, schedule=schedule, shared=1024)
    np.testing.assert_array_equal(out, np.arange(64) ^ 63)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_barrier_is_a_race_or_a_read_before_a_write(schedule: str) -> None:
    with pytest.raises(EmulatorError, match=r"race|before it was written"):
        one(EXCHANGE.format(""), np.zeros(4, np.uint32), 64, threads=64, schedule=schedule, shared=1024)


def test_a_deadlock_names_warp_barrier_and_line() -> None:
    body = "setp.lt.u32 %p1, %t0, 32; @%p1 bra OUT;\n bar.sync 3, 64;\n OUT:"
    with pytest.raises(EmulatorError, match=r"(?s)deadlock.*CTA \(0, 0, 0\) warp 1 at PTX line \d+ \(bar.sync\) waits for barrier 3 .*32 of 64"):
        one(body, np.zeros(4, np.uint32), 64, threads=64)
    body = (
        "mov.u32 %r1, window; setp.eq.u32 %p1, %t0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 2; bar.sync 0; "
        "W: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra W;"
    )
    with pytest.raises(EmulatorError, match=r"(?s)deadlock.*waits for mbarrier at shared address 0x400.*phase 0 \(2 arrivals and 0 bytes"):
        one(body, np.zeros(4, np.uint32), shared=1024)


def test_named_barriers_count_arrivals_without_waiting() -> None:
    body = """mov.u32 %r1, window; setp.lt.u32 %p1, %t0, 32; @%p1 bra FIRST; bar.sync 1, 64; ld.shared.b32 %r2, [%r1];
        st.global.b32 [%x4], %r2; bra OUT;
    FIRST: setp.eq.u32 %p2, %t0, 0; @%p2 st.shared.b32 [%r1], 77; bar.arrive 1, 64; OUT:"""
    for schedule in SCHEDULES:
        np.testing.assert_array_equal(one(body, np.zeros(4, np.uint32), 64, threads=64, schedule=schedule, shared=1024)[32:], 77)


def test_barrier_reductions() -> None:
    body = (
        "setp.lt.u32 %p1, %t0, 40; bar.red.popc.u32 %r1, 0, %p1; bar.red.or.pred %p2, 0, %p1; "
        "selp.b32 %r2, 100, 0, %p2; add.u32 %r1, %r1, %r2; st.global.b32 [%x4], %r1;"
    )
    for schedule in SCHEDULES:
        np.testing.assert_array_equal(one(body, np.zeros(4, np.uint32), 64, threads=64, schedule=schedule), 140)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_polling_sees_what_others_do(schedule: str) -> None:
    """A warp that tests an mbarrier in a loop, and one that reads a flag in global memory, do not keep others from running."""
    data = np.arange(32, dtype=np.uint32)
    test = "W: mbarrier.test_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra W;"
    np.testing.assert_array_equal(one(bulk(wait=test, fence="fence.proxy.async;"), data, schedule=schedule, shared=1024), data + 5)
    flag = """mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 bra FLAG;
        SPIN: ld.acquire.gpu.global.b32 %r2, [%x1]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN; bra.uni OUT;
        FLAG: st.release.gpu.global.b32 [%x1], 7; OUT:"""
    assert one(flag, np.zeros(4, np.uint32), grid=2, schedule=schedule)[0] == 7


def test_polling_ends_the_turn_of_a_warp() -> None:
    """The other CTA sets the flag after more steps than its first turn has: a warp that polls has one step meanwhile, or as many as it takes to
    notice that its strong loads come to the same word."""

    def polls(sleep: str) -> int:
        body = f"""mov.u32 %r1, %ctaid.x; mov.u32 %r3, 0; setp.eq.u32 %p1, %r1, 1; @%p1 bra WORK;
            SPIN: add.u32 %r3, %r3, 1; {sleep} ld.acquire.gpu.global.b32 %r2, [%x1]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
            st.global.b32 [%x1+128], %r3; bra.uni OUT;
            WORK: add.u32 %r3, %r3, 1; setp.lt.u32 %p2, %r3, 5000; @%p2 bra WORK;
            st.release.gpu.global.b32 [%x1], 7; OUT:"""
        return int(one(body, np.zeros(4, np.uint32), 64, threads=32, grid=2)[32])

    assert polls("nanosleep.u32 20;") < 10 < POLLS_A_TURN <= polls("") < 10 * POLLS_A_TURN


def test_a_loop_without_an_end_is_an_error() -> None:
    with pytest.raises(EmulatorError, match=r"livelock.*PTX line \d+"):
        one("SPIN: ld.volatile.global.b32 %r2, [%x1]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;", np.zeros(4, np.uint32))


def test_mbarrier_misuse_is_an_error() -> None:
    begin = "mov.u32 %r1, window; setp.eq.u32 %p1, %t0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; bar.sync 0;"
    with pytest.raises(EmulatorError, match="initialised twice"):
        one(begin + "@%p1 mbarrier.init.shared.b64 [%r1], 1;", np.zeros(4, np.uint32), shared=1024)
    with pytest.raises(EmulatorError, match="more arrivals than its count"):
        one(
            "mov.u32 %r1, window; setp.eq.u32 %p1, %t0, 0; @%p1 mbarrier.init.shared.b64 [%r1], 1; bar.sync 0; "
            "@%p1 mbarrier.expect_tx.shared.b64 [%r1], 16; mbarrier.arrive.shared.b64 %d1, [%r1];", np.zeros(4, np.uint32), shared=1024)
    with pytest.raises(EmulatorError, match="was not initialised"):
        one("mov.u32 %r1, window; mbarrier.arrive.shared.b64 %d1, [%r1];", np.zeros(4, np.uint32), shared=1024)


# --- asynchronous copies

BULK = """mov.u32 %r1, window; add.u32 %r2, %r1, 128; setp.eq.u32 %p1, %t0, 0;
    @%p1 mbarrier.init.shared.b64 [%r1], 1; {made} bar.sync 0;
    @!%p1 bra WAIT; mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%x0], 128, [%r1];
    WAIT: {wait}
    shl.b32 %r3, %t0, 2; add.u32 %r3, %r3, %r2; ld.shared.b32 %r4, [%r3]; add.u32 %r4, %r4, 5; st.shared.b32 [%r3], %r4;
        {fence} bar.sync 0;
    @!%p1 bra OUT; cp.async.bulk.global.shared::cta.bulk_group [%x1], [%r2], 128; cp.async.bulk.commit_group;
        cp.async.bulk.wait_group 0; OUT:"""
INIT_FENCE = "fence.mbarrier_init.release.cluster;"


def bulk(wait: str, fence: str, made: str = INIT_FENCE) -> str:
    return BULK.format(wait=wait, fence=fence, made=made)


TRY = "W: mbarrier.try_wait.parity.shared.b64 %p2, [%r1], 0; @!%p2 bra W;"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bulk_copies_complete_on_mbarriers_and_groups(schedule: str) -> None:
    data = np.arange(32, dtype=np.uint32)
    np.testing.assert_array_equal(one(bulk(wait=TRY, fence="fence.proxy.async;"), data, schedule=schedule, shared=1024), data + 5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_missing_proxy_fence_or_wait_is_found(schedule: str) -> None:
    data = np.arange(32, dtype=np.uint32)
    with pytest.raises(EmulatorError, match=r"race.*without fence\.proxy\.async"):
        one(bulk(wait=TRY, fence=""), data, schedule=schedule, shared=1024)
    with pytest.raises(EmulatorError, match=r"race|before it was written"):
        one(bulk(wait="", fence="fence.proxy.async;"), data, schedule=schedule, shared=1024)
    with pytest.raises(EmulatorError, match=r"without fence\.mbarrier_init"):
        one(bulk(wait=TRY, fence="fence.proxy.async;", made=""), data, schedule=schedule, shared=1024)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cp_async_groups_and_zero_fill(schedule: str) -> None:
    data = np.arange(128, dtype=np.uint32) + 1
    body = """mov.u32 %r1, window; shl.b32 %r2, %t0, 4; add.u32 %r1, %r1, %r2; cvt.u64.u32 %x5, %r2; add.s64 %x5, %x5, %x0;
        cp.async.cg.shared.global [%r1], [%x5], 16, 8; cp.async.commit_group; cp.async.wait_group 0;
        ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r1]; add.u32 %r3, %r3, %r4; add.u32 %r3, %r3, %r5; add.u32 %r3, %r3, %r6;
        st.global.b32 [%x4], %r3;"""
    np.testing.assert_array_equal(one(body, data, schedule=schedule, shared=1024), data.reshape(32, 4)[:, :2].sum(axis=1))


# --- clusters


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_distributed_shared_memory_and_cluster_barriers(schedule: str) -> None:
    body = """mov.u32 %r1, window; shl.b32 %r2, %t0, 2; add.u32 %r3, %r1, %r2; mov.u32 %r9, %cluster_ctarank;
        mad.lo.u32 %r4, %r9, 1000, %t0;
        st.shared.b32 [%r3], %r4; barrier.cluster.arrive; barrier.cluster.wait;
        xor.b32 %r5, %r9, 1; mapa.shared::cluster.u32 %r6, %r3, %r5; ld.shared::cluster.b32 %r7, [%r6];
        mov.u32 %r8, %ctaid.x; shl.b32 %r8, %r8, 7; cvt.u64.u32 %x5, %r8; add.s64 %x5, %x5, %x4; st.global.b32 [%x5], %r7;
        barrier.cluster.arrive; barrier.cluster.wait;"""
    out = one(body, np.zeros(4, np.uint32), 128, grid=4, cluster=2, schedule=schedule, shared=1024)
    want = [1000 * (cta % 2 ^ 1) + lane for cta in range(4) for lane in range(32)]
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_asynchronous_stores_to_another_cta(schedule: str) -> None:
    body = """mov.u32 %r1, window; mov.u32 %r9, %cluster_ctarank; xor.b32 %r5, %r9, 1; setp.eq.u32 %p1, %t0, 0;
        @%p1 mbarrier.init.shared.b64 [%r1], 1; fence.mbarrier_init.release.cluster;
        @%p1 mbarrier.arrive.expect_tx.shared.b64 %d1, [%r1], 128; barrier.cluster.arrive; barrier.cluster.wait;
        shl.b32 %r2, %t0, 2; add.u32 %r3, %r1, %r2; mapa.shared::cluster.u32 %r6, %r3, %r5; mapa.shared::cluster.u32 %r7, %r1, %r5;
        mad.lo.u32 %r4, %r9, 1000, %t0;
        st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r6+128], %r4, [%r7];
        W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r1], 0; @!%p2 bra W;
        ld.shared.b32 %r8, [%r3+128]; shl.b32 %r9, %r9, 7; cvt.u64.u32 %x5, %r9; add.s64 %x5, %x5, %x4; st.global.b32 [%x5], %r8;
        barrier.cluster.arrive; barrier.cluster.wait;"""
    out = one(body, np.zeros(4, np.uint32), 64, grid=2, cluster=2, schedule=schedule, shared=1024)
    np.testing.assert_array_equal(out, [1000 * (1 - cta) + lane for cta in range(2) for lane in range(32)])


def test_many_ctas_and_partial_warps() -> None:
    body = (
        "mov.u32 %r1, %ctaid.x; mul.lo.u32 %r2, %r1, 40; add.u32 %r2, %r2, %t0; mul.wide.u32 %x5, %r2, 4; "
        "add.s64 %x5, %x5, %x1; st.global.b32 [%x5], %r2;"
    )
    for schedule in SCHEDULES:
        np.testing.assert_array_equal(one(body, np.zeros(4, np.uint32), 400, threads=40, grid=10, schedule=schedule), np.arange(400))


# --- matrices


def test_ldmatrix_mma_and_stmatrix_multiply() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.integers(-3, 4, (16, 16)).astype(np.float16), rng.integers(-3, 4, (8, 16)).astype(np.float16)
    data = np.concatenate([a.view(np.uint32).ravel(), b.view(np.uint32).ravel()])
    body = """mov.u32 %r1, window; shl.b32 %r2, %t0, 2; add.u32 %r3, %r1, %r2;
        ld.global.b32 %r4, [%x3]; st.shared.b32 [%r3], %r4; ld.global.b32 %r4, [%x3+128]; st.shared.b32 [%r3+128], %r4;
        ld.global.b32 %r4, [%x3+256]; st.shared.b32 [%r3+256], %r4; ld.global.b32 %r4, [%x3+384]; st.shared.b32 [%r3+384], %r4;
        ld.global.b32 %r4, [%x3+512]; st.shared.b32 [%r3+512], %r4; ld.global.b32 %r4, [%x3+640];
        st.shared.b32 [%r3+640], %r4; bar.warp.sync -1;
        and.b32 %r5, %t0, 15; shr.u32 %r6, %t0, 4; shl.b32 %r5, %r5, 5; shl.b32 %r6, %r6, 4; add.u32 %r5, %r5, %r6; add.u32 %r5, %r5, %r1;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r5];
        and.b32 %r7, %t0, 7; shl.b32 %r7, %r7, 5; shr.u32 %r8, %t0, 3; and.b32 %r8, %r8, 1; shl.b32 %r8, %r8, 4;
        add.u32 %r7, %r7, %r8; add.u32 %r7, %r7, %r1; add.u32 %r7, %r7, 512;
        ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r14, %r15}, [%r7];
        mov.b32 %r16, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r16, %r16, %r16, %r16};
        shl.b32 %r9, %t0, 4; cvt.u64.u32 %x5, %r9; add.s64 %x5, %x5, %x1; st.global.v4.b32 [%x5], {%r20, %r21, %r22, %r23};"""
    out = one(body, data, 128, shared=1024).view(np.float32).reshape(8, 4, 2, 2)
    got = out.transpose(2, 0, 1, 3).reshape(16, 8)
    np.testing.assert_array_equal(got, a.astype(np.float32) @ b.T.astype(np.float32))


def test_the_report_counts() -> None:
    out = np.zeros(64, np.uint32)
    text = kernel(POINTER + "add.s64 %x4, %x1, %x2; st.global.b32 [%x4], %t0; bar.sync 0;")
    report = launch(text, {"input": out.copy(), "output": out}, threads=64)
    assert report.instructions["st"] == 2
    assert report.bytes["global stores"] == 256
    assert report.waits["bar.sync"] == 2
    assert report.digest
