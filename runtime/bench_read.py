"""A kernel that only reads: the floor that every kernel is compared with, over the same bytes in the same number of launches of the same run.

It is the one piece of PTX that densemoe hands to a driver: a benchmark's yardstick, the same text on every architecture, no part of an artifact set
and never on a path that serves. Every thread has up to eight loads of 16 bytes in flight; launches are programmatic and may overlap their neighbours,
as those of the kernels that are measured.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.bench_timing import Launch, Timer, rotations
from densemoe.runtime.errors import ProblemError

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver

__all__ = ["ReadKernel", "bandwidth"]

THREADS: Final = 256
CTAS_PER_SM: Final = 8  # all 2048 threads of an SM: 64 KiB in flight with two loads each, more than Little's law asks for at 5 TB/s and 1 µs
WORD: Final = 16
BATCH: Final = 8
SYMBOL: Final = "densemoe_read"
OFFSETS: Final = ((0, 8), (8, 8), (16, 8))
BANDWIDTH_BYTES: Final = 512 << 20
BANDWIDTH_ROUNDS: Final = 9


def _batch() -> str:
    """Eight loads under their own predicates, then their sum modulo 2 into the accumulator."""
    lines = []
    for index in range(BATCH):
        lines.append(f"    setp.lt.u64 %p{index}, %at, %words;")
        lines.append("    shl.b64 %address, %at, 4;\n    add.s64 %address, %address, %base;")
        registers = ", ".join(f"%v{4 * index + part}" for part in range(4))
        lines += [f"    mov.b32 %v{4 * index + part}, 0;" for part in range(4)]
        lines.append(f"    @%p{index} ld.global.nc.L1::no_allocate.L2::128B.v4.b32 {{{registers}}}, [%address];")
        lines.append("    add.s64 %at, %at, %stride;")
    lines += [f"    xor.b32 %sum, %sum, %v{index};" for index in range(4 * BATCH)]
    return "\n".join(lines)


PTX: Final = f""".version 8.0
.target sm_90
.address_size 64
.visible .entry {SYMBOL}(.param .u64 base, .param .u64 words, .param .u64 out)
{{
    .reg .pred %p<{BATCH}>, %more, %never; .reg .b32 %v<{4 * BATCH}>, %sum, %cta, %ctas, %thread, %threads;
    .reg .b64 %base, %words, %out, %at, %stride, %address, %wide;
    griddepcontrol.launch_dependents;
    ld.param.u64 %base, [base];
    ld.param.u64 %words, [words];
    ld.param.u64 %out, [out];
    mov.u32 %cta, %ctaid.x;
    mov.u32 %ctas, %nctaid.x;
    mov.u32 %thread, %tid.x;
    mov.u32 %threads, %ntid.x;
    mul.wide.u32 %at, %cta, %threads;
    cvt.u64.u32 %wide, %thread;
    add.s64 %at, %at, %wide;
    mul.wide.u32 %stride, %ctas, %threads;
    mov.b32 %sum, 0;
LOOP:
    setp.ge.u64 %more, %at, %words;
    @%more bra DONE;
{_batch()}
    bra LOOP;
DONE:
    griddepcontrol.wait;
    setp.eq.u32 %never, %sum, 0x5A17B01D;
    @%never st.global.b32 [%out], %sum;
    ret;
}}
"""


class ReadKernel:
    """The kernel on one device.

    Args:
        driver: its context is current on this thread.
    """

    def __init__(self, driver: Driver, ordinal: int, arch: str) -> None:
        self.driver = driver
        self._library = driver.load(PTX.encode() + b"\0", file="the read-only kernel (PTX)", arch=arch, ordinal=ordinal)
        self._kernel = driver.kernel(self._library, SYMBOL)
        self._grid = driver.sm_count(ordinal) * CTAS_PER_SM
        self._out = driver.allocate(WORD)

    def launch(self, pointer: int, nbytes: int) -> Launch:
        """A launch that reads ``nbytes`` at ``pointer``, both multiples of 16, once.

        Raises:
            ProblemError: they are not.
        """
        if pointer % WORD or nbytes % WORD or nbytes <= 0:
            raise ProblemError(f"{nbytes} bytes at {pointer:#x}: the read-only kernel reads multiples of {WORD} bytes at aligned addresses")
        block = bytearray(struct.pack("<QQQ", pointer, nbytes // WORD, self._out))
        grid = min(self._grid, -(-nbytes // (WORD * THREADS)))
        prepared: Any = self.driver.launch_config(self._kernel, (grid, 1, 1), (THREADS, 1, 1), (1, 1, 1), 0, block, OFFSETS, True)
        return self.driver.launcher(prepared)

    def close(self) -> None:
        """Frees it."""
        self.driver.free(self._out)
        self.driver.unload(self._library)


def bandwidth(timer: Timer, kernel: ReadKernel, l2: int) -> float:
    """Bytes per second that the device reads from memory: median over replays of launches of 512 MiB each, cold."""
    count = rotations(BANDWIDTH_BYTES, l2)
    pointers = [timer.driver.allocate(BANDWIDTH_BYTES) for _ in range(count)]
    try:
        launches = [kernel.launch(pointer, BANDWIDTH_BYTES) for pointer in pointers]
        graph = timer.graph(launches)
        try:
            sample = timer.interleave({"read": graph}, BANDWIDTH_ROUNDS)["read"]
        finally:
            graph.close()
        return BANDWIDTH_BYTES / sample.microseconds * 1e6
    finally:
        for pointer in pointers:
            timer.driver.free(pointer)
