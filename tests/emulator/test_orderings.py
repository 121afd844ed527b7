"""What orders what: relaxed arrivals and waits, the end of a CTA, launches before, and CTAs that meet in global memory."""

from __future__ import annotations

import struct
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from snippets import kernel, launch

from densemoe.compile.emulator import GlobalMemory, Launch, run
from densemoe.runtime.errors import EmulatorError

POINTERS = "ld.param.u64 %x0, [input]; ld.param.u64 %x1, [output]; mov.u32 %t0, %tid.x; shr.u32 %t1, %t0, 5; mov.u32 %t2, %ctaid.x;\n"
#: An mbarrier at window + 512, made by thread 0.
MBARRIER = """
    setp.ne.u32 %p0, %t0, 0;
    mov.u32 %r0, window;
    @%p0 bra MADE;
    mbarrier.init.shared.b64 [%r0+512], COUNT;
    fence.mbarrier_init.release.cluster;
MADE:
    bar.sync 0;
"""


def refused(race: bool, message: str) -> AbstractContextManager[object]:
    """Expects an error with this message where there is a race, and none where there is not."""
    return pytest.raises(EmulatorError, match=message) if race else nullcontext()


def handed_over(arrive: str, wait: str, between: tuple[str, str] = ("", "")) -> str:
    """Warp 0 writes shared memory and arrives, warp 1 waits and reads."""
    return kernel(
        POINTERS
        + MBARRIER.replace("COUNT", "32")
        + f"""
    setp.ne.u32 %p1, %t1, 0;
    and.b32 %r1, %t0, 31;
    shl.b32 %r1, %r1, 2;
    add.u32 %r1, %r1, %r0;
    @%p1 bra READ;
    st.shared.u32 [%r1], %t0;
    {between[0]}
    {arrive} [%r0+512];
    bra.uni DONE;
READ:
    {wait} %p2, [%r0+512], 0;
    @!%p2 bra READ;
    {between[1]}
    ld.shared.u32 %r2, [%r1];
DONE:
""",
        shared=1024,
    )


ARRIVE, WAIT = "mbarrier.arrive{}.shared::cta.b64 _,", "mbarrier.test_wait.parity{}.shared::cta.b64"
FENCE = "fence.acq_rel.cta;"


@pytest.mark.parametrize("wait", [WAIT, WAIT.replace("test", "try")])
@pytest.mark.parametrize(
    ("relaxed", "between", "race"),
    [
        ((False, False), ("", ""), False),
        ((True, False), ("", ""), True),
        ((False, True), ("", ""), True),
        ((True, True), (FENCE, FENCE), False),
        ((True, True), (FENCE, ""), True),
        ((True, True), ("", FENCE), True),
    ],
)
def test_relaxed_arrivals_and_waits_order_only_with_fences(wait: str, relaxed: tuple[bool, bool], between: tuple[str, str], race: bool) -> None:
    text = handed_over(ARRIVE.format(".relaxed.cta" if relaxed[0] else ""), wait.format(".relaxed.cta" if relaxed[1] else ""), between)
    for schedule in ("eager", "lazy", "random:1", "pct:1:3"):
        with refused(race, r"race: .* shared memory"):
            launch(text, {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}, threads=64, schedule=schedule)


@pytest.mark.parametrize("synced", [True, False])
def test_lanes_use_an_mbarrier_that_another_lane_made_after_a_warp_barrier(synced: bool) -> None:
    text = kernel(POINTERS + MBARRIER.replace("COUNT", "32").replace("bar.sync 0;", "bar.warp.sync -1;" if synced else "")
                  + f"{ARRIVE.format('')} [%r0+512];", shared=1024)  # fmt: skip
    buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}
    if synced:
        launch(text, buffers)
        return
    with pytest.raises(EmulatorError, match="without waiting for its initialisation"):
        launch(text, buffers)


COPY = """
    @%p0 bra DONE;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r0+512], 128;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r0], [%x0], 128, [%r0+512];
{wait}
DONE:
"""
WAITS = "AGAIN:\n mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r0+512], 0;\n @!%p2 bra AGAIN;"


@pytest.mark.parametrize("waits", [True, False])
def test_a_cta_may_not_end_before_its_copies(waits: bool) -> None:
    text = kernel(POINTERS + MBARRIER.replace("COUNT", "1") + COPY.format(wait=WAITS if waits else ""), shared=1024)
    buffers = {"input": np.zeros(32, np.uint32), "output": np.zeros(1, np.uint32)}
    if waits:
        launch(text, buffers, schedule="lazy")
        return
    with pytest.raises(EmulatorError, match="ended before the bulk copy of 128 bytes"):
        launch(text, buffers, schedule="lazy")


# --- programmatic launches


def programmatic(body: str, *, early: bool = False) -> None:
    memory = GlobalMemory()
    parameters = struct.pack("<QQ", memory.add("input", np.zeros(32, np.uint32), early=early), memory.add("output", np.zeros(32, np.uint32)))
    text = kernel(POINTERS + body, shared=1024)
    run(text, Launch("", (2, 1, 1), (64, 1, 1), parameters=parameters, programmatic=True), memory, "random:3")


def test_a_programmatic_launch_waits_before_it_touches_what_others_may_use() -> None:
    load, store, wait = "ld.global.u32 %r2, [%x0];", "st.global.u32 [%x1], %t2;", "griddepcontrol.wait;"
    programmatic(wait + load + store)
    programmatic(load + wait + store, early=True)
    with pytest.raises(EmulatorError, match=r"reads input without griddepcontrol\.wait"):
        programmatic(load + wait)
    with pytest.raises(EmulatorError, match=r"writes output without griddepcontrol\.wait"):
        programmatic(store + wait)
    with pytest.raises(EmulatorError, match=r"writes output without griddepcontrol\.wait"):
        programmatic("red.relaxed.gpu.global.add.u32 [%x1], 1;" + wait)


def test_one_warp_waits_for_the_launches_before_and_tells_the_others() -> None:
    only = "setp.ne.u32 %p1, %t1, 0; @%p1 bra ON; griddepcontrol.wait;\nON:\n"
    programmatic(only + "bar.sync 0; ld.global.u32 %r2, [%x0];")
    with pytest.raises(EmulatorError, match=r"reads input without griddepcontrol\.wait"):
        programmatic(only + "ld.global.u32 %r2, [%x0];")


def test_a_copy_of_a_programmatic_launch_waits_too() -> None:
    copy = MBARRIER.replace("COUNT", "1") + COPY.format(wait=WAITS)
    programmatic("griddepcontrol.wait;" + copy)
    programmatic(copy, early=True)
    with pytest.raises(EmulatorError, match=r"reads input without griddepcontrol\.wait"):
        programmatic(copy)


# --- CTAs that meet in global memory


def last_one(before: str, atom: str, after: str, part: str = "st.global.v2.u32 [%x3], {%t0, %t2};") -> str:
    """Every CTA writes its part; the one that counts last reads all of them."""
    return kernel(
        POINTERS
        + f"""
    shl.b32 %r3, %t2, 6;
    add.u32 %r3, %r3, %t0;
    mul.wide.u32 %x3, %r3, 8;
    add.s64 %x3, %x3, %x0;
    {part}
    {before}
    setp.ne.u32 %p0, %t0, 0;
    mov.u32 %r0, window;
    @%p0 bra COUNTED;
    {atom} %r4, [%x1], 1;
    st.shared.u32 [%r0], %r4;
COUNTED:
    bar.sync 0;
    ld.shared.u32 %r4, [%r0];
    setp.ne.u32 %p1, %r4, 2;
    @%p1 bra DONE;
    {after}
    mul.wide.u32 %x4, %t0, 8;
    add.s64 %x4, %x4, %x0;
    ld.relaxed.gpu.global.v2.u32 {{%r5, %r6}}, [%x4];
    ld.relaxed.gpu.global.v2.u32 {{%r5, %r6}}, [%x4+512];
    ld.relaxed.gpu.global.v2.u32 {{%r5, %r6}}, [%x4+1024];
DONE:
""",
        shared=1024,
    )


STRONG, RELAXED, GPU = "atom.acq_rel.gpu.global.add.u32", "atom.relaxed.gpu.global.add.u32", "fence.acq_rel.gpu;"


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:1", "random:2", "pct:1:3"])
@pytest.mark.parametrize(
    ("before", "atom", "after", "race"),
    [
        ("bar.sync 0;", STRONG, "", False),  # the release of one thread speaks for all that it knows of
        (f"{GPU} bar.sync 0;", STRONG, GPU, False),
        (f"bar.sync 0; {GPU}", RELAXED, GPU, True),  # the fence after is not that of the thread that saw the count
        (f"{GPU} bar.sync 0;", RELAXED, GPU, True),
        ("", STRONG, "", True),
        ("bar.sync 0;", "atom.acq_rel.cta.global.add.u32", "", True),  # the scope does not hold the other CTAs
        ("bar.sync 0;", "atom.acq_rel.sys.global.add.u32", "", False),
        ("bar.sync 0; fence.acq_rel.gpu;", RELAXED, "", True),
        ("bar.sync 0;", RELAXED, "", True),  # nothing in the kernel orders, and yet it is watched
        ("bar.sync 0;", "atom.acquire.gpu.global.add.u32", "", True),
        ("bar.sync 0;", "atom.release.gpu.global.add.u32", "", True),
    ],
)
def test_parts_of_other_ctas_are_read_after_release_and_acquire(before: str, atom: str, after: str, race: bool, schedule: str) -> None:
    text = last_one(before, atom, after)
    buffers = {"input": np.zeros(3 * 64 * 2, np.uint32), "output": np.zeros(1, np.uint32)}
    with refused(race, r"race: reads input.* without release and acquire"):
        launch(text, buffers, threads=64, grid=3, schedule=schedule)
        assert buffers["output"][0] == 3


def last_warp(stored: str, ticket: str, fence: str, fencer: int, met: str, load: str = "ld.relaxed.gpu.global.u32") -> str:
    """Every CTA's warp writes its part, its first lane counts it; the warp that counts last reads all parts. One lane fences for the warp."""
    return kernel(
        POINTERS
        + f"""
    shl.b32 %r3, %t2, 5;
    add.u32 %r3, %r3, %t0;
    mul.wide.u32 %x3, %r3, 4;
    add.s64 %x3, %x3, %x0;
    st.global.u32 [%x3], %t0;
    {stored}
    setp.ne.u32 %p0, %t0, 0;
    mov.u32 %r4, 0;
    @%p0 bra COUNTED;
    {ticket} %r4, [%x1], 1;
COUNTED:
    shfl.sync.idx.b32 %r4, %r4, 0, 0x1f, -1;
    setp.ne.u32 %p1, %r4, 2;
    @%p1 bra DONE;
    setp.ne.u32 %p0, %t0, {fencer};
    @%p0 bra FENCED;
    {fence}
FENCED:
    {met}
    mul.wide.u32 %x4, %t0, 4;
    add.s64 %x4, %x4, %x0;
    {load} %r5, [%x4];
    {load} %r5, [%x4+128];
    {load} %r5, [%x4+256];
DONE:
""",
        shared=1024,
    )


RELEASE, MET = "atom.release.gpu.global.add.u32", "bar.warp.sync -1;"


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:1", "pct:1:3"])
@pytest.mark.parametrize("load", ["ld.relaxed.gpu.global.u32", "ld.global.u32"])
@pytest.mark.parametrize(
    ("stored", "ticket", "fence", "fencer", "met", "race"),
    [
        (MET, RELEASE, GPU, 0, MET, False),
        (MET, STRONG, "", 0, MET, False),
        ("", RELEASE, GPU, 0, MET, True),  # the first lane's release says nothing of the others' stores
        (MET, RELEASE, GPU, 0, "", True),  # the others have acquired nothing
        (MET, STRONG, "", 0, "", True),
        (MET, RELEASE, "", 0, MET, True),
        (MET, RELEASE, GPU, 1, MET, True),  # another lane saw the count
        (MET, RELAXED, GPU, 0, MET, True),
        (f"{MET} {GPU}", RELAXED, GPU, 0, MET, False),
        (GPU, RELAXED, GPU, 0, MET, False),  # every lane's own fence; the first one's count follows it
    ],
)
def test_one_lane_releases_and_acquires_for_its_warp(
    stored: str, ticket: str, fence: str, fencer: int, met: str, race: bool, load: str, schedule: str
) -> None:
    text = last_warp(stored, ticket, fence, fencer, met, load)
    buffers = {"input": np.zeros(3 * 32, np.uint32), "output": np.zeros(1, np.uint32)}
    with refused(race, r"race: reads input.* without release and acquire"):
        launch(text, buffers, threads=32, grid=3, schedule=schedule)
        assert buffers["output"][0] == 3


def test_a_lane_alone_needs_no_warp_barrier() -> None:
    text = last_warp("", RELEASE, GPU, 0, "setp.ne.u32 %p0, %t0, 0; @%p0 bra DONE;")
    buffers = {"input": np.zeros(3 * 32, np.uint32), "output": np.zeros(1, np.uint32)}
    launch(text, buffers, threads=32, grid=3, schedule="random:1")


def test_a_lane_that_polls_races_with_ordinary_stores_alone() -> None:
    body = """
    setp.ne.u32 %p0, %t0, 0;
    @%p0 bra DONE;
    setp.ne.u32 %p1, %t2, 0;
    @%p1 bra POLL;
    {store} [%x0], 1;
    bra.uni DONE;
POLL:
    ld.acquire.gpu.global.u32 %r5, [%x0];
    setp.eq.u32 %p2, %r5, 0;
    @%p2 bra POLL;
DONE:
"""
    for store, race in (("st.release.gpu.global.u32", False), ("st.relaxed.gpu.global.u32", False), ("st.global.u32", True)):
        buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}
        text = kernel(POINTERS + body.replace("{store}", store), shared=1024)
        with refused(race, r"race: (reads|writes) input"):
            launch(text, buffers, threads=32, grid=2, schedule="eager")


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:2"])
@pytest.mark.parametrize(
    ("store", "race"),
    [
        ("st.relaxed.gpu.global.v4.u32 [%x0], {1, 1, 1, 1};", False),  # words that are their own flags
        ("st.global.v4.u32 [%x0], {1, 1, 1, 1};", True),
        ("red.relaxed.gpu.global.add.u32 [%x0], 1; st.relaxed.gpu.global.u32 [%x0+4], 1;", True),  # a sum that more may be added to
    ],
)
def test_vectors_of_words_that_are_their_own_flags_are_polled(store: str, race: bool, schedule: str) -> None:
    """A strong vector load is as many strong scalar ones. The atomic beside is what makes CTAs watched."""
    body = """
    setp.ne.u32 %p0, %t0, 0;
    @%p0 bra DONE;
    atom.release.gpu.global.add.u32 %r6, [%x1], 1;
    setp.ne.u32 %p1, %t2, 0;
    @%p1 bra POLL;
    {store}
    bra.uni DONE;
POLL:
    ld.relaxed.gpu.global.v4.u32 {%r1, %r2, %r3, %r4}, [%x0];
    mul.lo.u32 %r5, %r1, %r2;
    setp.eq.u32 %p2, %r5, 0;
    @%p2 bra POLL;
DONE:
"""
    buffers = {"input": np.zeros(4, np.uint32), "output": np.zeros(1, np.uint32)}
    with refused(race, r"race: (reads|writes|changes) input"):
        launch(kernel(POINTERS + body.replace("{store}", store), shared=1024), buffers, threads=32, grid=2, schedule=schedule)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("ld.global.u32 %r1, [%x0];", "", ""),
        ("", "ld.global.u32 %r1, [%x0+124];", "input.*is read before it was written"),
        ("", "st.global.u32 [%x0+124], 1; ld.global.u32 %r1, [%x0+124];", ""),
        ("", "ld.global.u32 %r1, [%x0+128];", ""),
        ("add.s64 %x0, %x0, 4;", "", "misaligned"),
        ("mov.u64 %x0, %x2;", "", "no buffer|red zone|out of bounds|null"),
    ],
)
def test_what_is_discarded_is_gone(before: str, after: str, message: str) -> None:
    """128 bytes from a multiple of 128 on."""
    body = f"""
    setp.ne.u32 %p0, %t0, 0;
    @%p0 bra DONE;
    mov.u64 %x2, 0;
    {before}
    discard.global.L2 [%x0], 128;
    {after}
DONE:
"""
    buffers = {"input": np.zeros(64, np.uint32), "output": np.zeros(1, np.uint32)}
    with refused(bool(message), message):
        launch(kernel(POINTERS + body, shared=1024), buffers, threads=32, grid=1)


FLAG = """
    and.b32 %r0, %t0, 31;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra DONE;
    setp.ne.u32 %p1, {reader}, 0;
    @%p1 bra READ;
    st.global.u32 [%x0], 7;
    {write};
    bra.uni DONE;
READ:
    {read};
    setp.eq.u32 %p2, %r1, 0;
    @%p2 bra READ;
    {after}
    ld.global.u32 %r2, [%x0];
DONE:
"""
WARP, CTA = "%t1", "%t2"


@pytest.mark.parametrize("fences", [False, True])
@pytest.mark.parametrize(
    ("reader", "cluster", "scope", "race"),
    [
        (WARP, 1, "cta", False),
        (WARP, 1, "gpu", False),
        (CTA, 2, "cta", True),
        (CTA, 2, "cluster", False),
        (CTA, 1, "cluster", True),
        (CTA, 1, "gpu", False),
        (CTA, 1, "sys", False),
    ],
)
def test_a_scope_must_hold_both_sides(reader: str, cluster: int, scope: str, race: bool, fences: bool) -> None:
    """A flag is added to and polled, in another warp of the CTA, another CTA of the cluster, or another cluster."""
    parts = {"write": f"red.release.{scope}.global.add.u32 [%x1], 1", "read": f"ld.acquire.{scope}.global.u32 %r1, [%x1]", "after": ""}
    if fences:  # the accesses are wide enough, their fences have the scope
        fence = f"fence.acq_rel.{scope}"
        parts = {"write": f"{fence}; red.relaxed.sys.global.add.u32 [%x1], 1", "read": "ld.relaxed.sys.global.u32 %r1, [%x1]", "after": f"{fence};"}
    text = kernel(POINTERS + FLAG.format(reader=reader, **parts))
    buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}
    threads, grid = (64, 1) if reader == WARP else (32, 2)
    for schedule in ("eager", "random:1"):
        with refused(race, r"race: (reads|writes) input.* without release and acquire"):
            launch(text, buffers, threads=threads, grid=grid, cluster=cluster, schedule=schedule)


COPY_OUT = "cp.async.bulk.global.shared::cta.bulk_group [%x1], [%r0], {}; cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;"


def copied_out(store: str, between: str, copy: str) -> str:
    """A warp writes shared memory, and its lane 0 copies from there."""
    return kernel(
        POINTERS
        + f"""
    mov.u32 %r0, window;
    shl.b32 %r1, %t0, 2;
    add.u32 %r1, %r1, %r0;
    setp.ne.u32 %p0, %t0, 0;
    {store}
    fence.proxy.async.shared::cta;
    {between}
    @%p0 bra DONE;
    {copy}
DONE:
""",
        shared=1024,
    )


STORE, OWN = "st.shared.u32 [%r1], %t0;", "@!%p0 st.shared.v4.u32 [%r0], {%t0, %t0, %t0, %t0};"


@pytest.mark.parametrize("schedule", ["eager", "lazy", "random:1"])
@pytest.mark.parametrize(
    ("store", "between", "nbytes", "race"),
    [
        (STORE, "bar.warp.sync -1;", 128, False),
        (STORE, "", 128, True),
        (STORE, "vote.sync.any.pred %p1, %p0, -1;", 128, True),  # the lanes meet, their memory is not ordered
        (STORE, f"bar.warp.sync -1; {STORE} fence.proxy.async.shared::cta;", 128, True),
        (OWN, "", 16, False),  # a lane needs nobody for what it wrote itself
    ],
)
def test_a_lane_copies_what_others_wrote_after_a_warp_barrier(store: str, between: str, nbytes: int, race: bool, schedule: str) -> None:
    text = copied_out(store, between, COPY_OUT.format(nbytes))
    buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(32, np.uint32)}
    with refused(race, r"race: reads shared memory .* that lane \d+ of the warp wrote .* without bar\.warp\.sync"):
        launch(text, buffers, threads=32, schedule=schedule)
        np.testing.assert_array_equal(buffers["output"], np.arange(32) if nbytes == 128 else np.zeros(32))


def test_two_ctas_write_the_same_word_unordered() -> None:
    text = last_one("bar.sync 0;", STRONG, "", "st.global.u32 [%x0], %t2;")
    with pytest.raises(EmulatorError, match="race: writes input"):
        launch(text, {"input": np.zeros(3 * 64 * 2, np.uint32), "output": np.zeros(1, np.uint32)}, threads=64, grid=3, schedule="random:1")


@pytest.mark.parametrize("touch", ["st.shared.u32 [%r0+516], %t0;", "cp"])
def test_only_mbarrier_operations_touch_an_mbarrier(touch: str) -> None:
    if touch == "cp":
        touch = COPY.format(wait=WAITS).replace("[%r0], [%x0]", "[%r0+448], [%x0]")
    buffers = {"input": np.zeros(32, np.uint32), "output": np.zeros(1, np.uint32)}
    made = POINTERS + MBARRIER.replace("COUNT", "1")
    with pytest.raises(EmulatorError, match="is an mbarrier: mbarrier operations alone"):
        launch(kernel(made + touch, shared=1024), buffers)
    gone = "@%p0 bra DONE; mbarrier.inval.shared.b64 [%r0+512]; st.shared.u32 [%r0+512], %t0;\nDONE:\n"
    launch(kernel(made + gone, shared=1024), buffers)
