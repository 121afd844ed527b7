"""Lanes of one warp that meet in shared memory: what orders them, and what does not."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from snippets import kernel, launch

from densemoe.runtime.errors import EmulatorError

#: %r0: the lane's word of the window, %r1: its neighbour's, %r2: the window
PLACES = """
    mov.u32 %t0, %tid.x; mov.u32 %r2, window; shl.b32 %r3, %t0, 2; add.u32 %r0, %r2, %r3; xor.b32 %r3, %r3, 4; add.u32 %r1, %r2, %r3;
    setp.eq.u32 %p0, %t0, 5;
"""
SYNC, CTA, SHUFFLE, NOTHING = "bar.warp.sync -1;", "bar.sync 0;", "shfl.sync.idx.b32 %r9, %t0, 0, 31, -1;", ""
STORE, STORE_THEIRS, STORE_FIVE, STORE_ALL = (
    "st.shared.b32 [%r0], %t0;", "st.shared.b32 [%r1], %t0;", "@%p0 st.shared.b32 [%r2], %t0;", "st.shared.b32 [%r2], 7;",
)  # fmt: skip
LOAD, LOAD_THEIRS, LOAD_ALL, LOAD_FIVE = (
    "ld.shared.b32 %r8, [%r0];", "ld.shared.b32 %r8, [%r1];", "ld.shared.b32 %r8, [%r2];", "@%p0 ld.shared.b32 %r8, [%r2];",
)  # fmt: skip
WROTE, OVERWRITES = "race: .* that another lane of it wrote, without bar.warp.sync", "overwrites .* that another lane of it may still read"


@pytest.mark.parametrize(
    ("first", "between", "second", "message"),
    [
        (STORE, NOTHING, LOAD, None),
        (STORE, NOTHING, LOAD_THEIRS, WROTE),
        (STORE, SHUFFLE, LOAD_THEIRS, WROTE),  # waits, but orders no memory
        (STORE, SYNC, LOAD_THEIRS, None),
        (STORE, CTA, LOAD_THEIRS, None),
        (STORE, NOTHING, STORE, None),
        (STORE, NOTHING, STORE_THEIRS, WROTE),
        (STORE, SYNC, STORE_THEIRS, None),
        (STORE_FIVE, NOTHING, LOAD_FIVE, None),
        (STORE_FIVE, NOTHING, LOAD_ALL, WROTE),
        (STORE_FIVE, SYNC, LOAD_ALL, None),
        (STORE_ALL, NOTHING, LOAD_ALL, None),  # each reads what it wrote itself
        (STORE + SYNC + LOAD_THEIRS, NOTHING, STORE, OVERWRITES),
        (STORE + SYNC + LOAD_THEIRS, NOTHING, STORE_THEIRS, None),
        (STORE + SYNC + LOAD_THEIRS, SYNC, STORE, None),
        (STORE_FIVE + SYNC + LOAD_ALL, NOTHING, STORE_FIVE, OVERWRITES),
        (STORE_FIVE + SYNC + LOAD_ALL, SHUFFLE, STORE_FIVE, OVERWRITES),
        (STORE_FIVE + SYNC + LOAD_ALL, SYNC, STORE_FIVE, None),
        (STORE_FIVE + SYNC + LOAD_FIVE, NOTHING, STORE_FIVE, None),
    ],
)
def test_lanes_of_a_warp_meet_behind_a_warp_barrier(first: str, between: str, second: str, message: str | None) -> None:
    text = kernel(PLACES + first + between + second, shared=1024)
    buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}
    for schedule in ("eager", "lazy", "random:1"):
        with pytest.raises(EmulatorError, match=message) if message else nullcontext():
            launch(text, buffers, threads=32, schedule=schedule)


@pytest.mark.parametrize("synced", [True, False])
def test_vectors_and_bytes_are_watched_too(synced: bool) -> None:
    """Sixteen bytes a lane, of which its neighbour reads one."""
    body = f"""
    mov.u32 %t0, %tid.x; mov.u32 %r2, window; shl.b32 %r3, %t0, 4; add.u32 %r0, %r2, %r3; xor.b32 %r3, %r3, 16; add.u32 %r1, %r2, %r3;
    st.shared.v4.b32 [%r0], {{%t0, %t0, %t0, %t0}}; {SYNC if synced else ""} ld.shared.u8 %r8, [%r1+9];
    """
    buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}
    with nullcontext() if synced else pytest.raises(EmulatorError, match="race: lane 0 of a warp reads"):
        launch(kernel(body, shared=1024), buffers, threads=32)


def test_lanes_may_share_a_word_by_halves() -> None:
    """Each stores and loads its own half of a word, again and again; which bytes an access has is not kept."""
    body = """
    mov.u32 %t0, %tid.x; mov.u32 %r2, window; shl.b32 %r3, %t0, 1; add.u32 %r0, %r2, %r3; mov.b16 %h0, 7; and.b32 %r4, %t0, 1;
    setp.eq.u32 %p0, %r4, 0;
    st.shared.b16 [%r0], %h0; ld.shared.u16 %r8, [%r0]; @%p0 st.shared.b16 [%r0], %h0; @!%p0 st.shared.b16 [%r0], %h0; ld.shared.u16 %r8, [%r0];
    """
    launch(kernel(body, shared=1024), {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}, threads=32)


@pytest.mark.parametrize("synced", [True, False])
def test_each_of_two_warps_is_looked_at_by_itself(synced: bool) -> None:
    """Warp 1 alone lacks the barrier."""
    body = f"""
    {PLACES} mov.u32 %t1, %tid.x; shr.u32 %t1, %t1, 5; setp.ne.u32 %p1, %t1, 0;
    {STORE}
    {"" if synced else "@%p1 bra OVER;"}
    {SYNC}
    OVER: {LOAD_THEIRS}
    """
    buffers = {"input": np.zeros(1, np.uint32), "output": np.zeros(1, np.uint32)}
    with nullcontext() if synced else pytest.raises(EmulatorError, match=WROTE):
        launch(kernel(body, shared=1024), buffers, threads=64)
