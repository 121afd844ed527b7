"""Small kernels around a few instructions."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator import GlobalMemory, Launch, Report, run

HEADER = ".version 9.0\n.target sm_100a\n.address_size 64\n"
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
PREFIX = {16: "%h", 32: "%r", 64: "%d"}


def kernel(body: str, parameters: str = ".param .u64 input, .param .u64 output", *, extra: str = "", shared: int = 0) -> str:
    """A module with one kernel; registers %p, %h, %r, %d, %t of 1, 16, 32, 64 and 32 bits."""
    window = f".shared .align 1024 .b8 window[{shared}];" if shared else ""
    return f"""{HEADER}
.visible .entry test({parameters})
{{
    .reg .pred %p<20>; .reg .b16 %h<40>; .reg .b32 %r<120>; .reg .b32 %t<20>; .reg .b64 %d<40>; .reg .b64 %x<20>; .reg .b32 %f<40>;
    {window}
    {extra}
    {body}
    ret;
}}
"""


def lanes(
    instructions: str,
    inputs: Sequence[NDArray[Any]],
    outputs: Sequence[int],
    *,
    uniform: bool = False,
    threads: int = 64,
    schedule: str = "eager",
    shared: int = 0,
) -> list[NDArray[Any]]:
    """Runs instructions on lanes: input i is in %r<i>, %h<i> or %d<i> by its width, output j is taken from register 20 + j of its width.

    With `uniform`, every lane loads the first element, so that the emulator keeps ints; the results are those of lane 0.
    """
    load = "mov.u32 %t0, %tid.x;\n ld.param.u64 %x0, [input]; ld.param.u64 %x1, [output];\n"
    load += "mul.wide.u32 %x2, %t0, 8; " + ("mov.b64 %x3, %x0;" if uniform else "add.s64 %x3, %x0, %x2;") + " add.s64 %x4, %x1, %x2;\n"
    stride = 8 * threads
    for i, each in enumerate(inputs):
        bits = each.dtype.itemsize * 8
        load += f"ld.global.b{bits} {PREFIX[bits]}{i}, [%x3+{i * stride}];\n"
    store = "".join(f"st.global.b{bits} [%x4+{j * stride}], {PREFIX[bits]}{20 + j};\n" for j, bits in enumerate(outputs))
    given = np.zeros((max(len(inputs), 1), threads), np.uint64)
    for i, each in enumerate(inputs):
        given[i].view(UNSIGNED[each.dtype.itemsize * 8]).reshape(threads, -1)[:, 0] = np.resize(each, threads)
    results = np.zeros((max(len(outputs), 1), threads), np.uint64)
    memory = GlobalMemory()
    parameters = struct.pack("<QQ", memory.add("input", given, writable=False), memory.add("output", results, written=False))
    run(kernel(load + instructions + store, shared=shared), Launch("", (1, 1, 1), (threads, 1, 1), parameters=parameters), memory, schedule)
    found = [results[j].view(UNSIGNED[bits]).reshape(threads, -1)[:, 0].copy() for j, bits in enumerate(outputs)]
    return [each[:1] for each in found] if uniform else found


def launch(
    ptx: str, buffers: dict[str, NDArray[Any]], *, threads: int = 32, grid: int = 1, cluster: int = 1, schedule: str = "eager", smem: int = 0
) -> Report:
    """Runs a kernel whose parameters are pointers to the buffers, in order."""
    memory = GlobalMemory()
    pointers = [memory.add(name, array) for name, array in buffers.items()]
    parameters = struct.pack(f"<{len(pointers)}Q", *pointers)
    return run(ptx, Launch("", (grid, 1, 1), (threads, 1, 1), (cluster, 1, 1), smem, parameters), memory, schedule)
