"""Host functions that give NVIDIA's example classes their tensors as pointers and sizes; everything else is the classes' own host code."""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr

CLUSTERS = 4  # what the examples ask the device for: clusters at once

# The compiler reads annotations, so they are no strings below.


def _pointer(name: str, alignment: int = 16) -> Any:
    return make_ptr(getattr(cutlass, name), 0, cute.AddressSpace.gmem, assumed_align=alignment)


@cute.jit
def _operand(pointer, rows, k, batch, k_major: cutlass.Constexpr):  # type: ignore[no-untyped-def]
    if cutlass.const_expr(k_major):
        return cute.make_tensor(pointer, cute.make_ordered_layout((rows, cute.assume(k, 32), batch), order=(1, 0, 2)))
    return cute.make_tensor(pointer, cute.make_ordered_layout((cute.assume(rows, 32), k, batch), order=(0, 1, 2)))


@cute.jit
def _dense(  # type: ignore[no-untyped-def]
    kernel: cutlass.Constexpr,
    a: cute.Pointer,
    b: cute.Pointer,
    c: cute.Pointer,
    m: cutlass.Int32,
    n: cutlass.Int32,
    k: cutlass.Int32,
    batch: cutlass.Int32,
    majors: cutlass.Constexpr,
    clusters: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    tensor_a = _operand(a, m, k, batch, majors[0])
    tensor_b = _operand(b, n, k, batch, majors[1])
    tensor_c = _operand(c, m, n, batch, majors[2])
    if cutlass.const_expr(clusters is None):
        kernel(tensor_a, tensor_b, tensor_c, stream)
    else:
        kernel(tensor_a, tensor_b, tensor_c, clusters, stream)


def dense(kernel: Any, ab: str, c: str, majors: tuple[bool, bool, bool], persistent: bool) -> tuple[Any, list[Any]]:
    """(host function, arguments) of a dense GEMM; majors: whether K (of C: N) is contiguous."""
    sizes = [cutlass.Int32(0)] * 4
    clusters = CLUSTERS if persistent else None
    return _dense, [kernel, _pointer(ab), _pointer(ab), _pointer(c), *sizes, majors, clusters, cuda.CUstream(0)]


def block_scaled(kernel: Any, a: str, b: str, scale: str, c: str) -> tuple[Any, list[Any]]:
    """The same of a block-scaled GEMM, whose class takes pointers itself."""
    from cutlass.cute.nvgpu import OperandMajorMode

    layouts = (OperandMajorMode.K, OperandMajorMode.K, _layout_enum().ROW_MAJOR)
    pointers = [_pointer(a), _pointer(b), _pointer(scale, 32), _pointer(scale, 32), _pointer(c)]
    return kernel, [*pointers, layouts, tuple(cutlass.Int32(0) for _ in range(4)), CLUSTERS, cuda.CUstream(0)]


def _layout_enum() -> Any:
    try:
        from cutlass.tensor_utils import LayoutEnum
    except ImportError:  # older DSL
        from cutlass.utils import LayoutEnum
    return LayoutEnum


@cute.jit
def _grouped(  # type: ignore[no-untyped-def]
    kernel: cutlass.Constexpr,
    a: cute.Pointer,
    b: cute.Pointer,
    c: cute.Pointer,
    sizes: cute.Pointer,
    strides: cute.Pointer,
    addresses: cute.Pointer,
    maps: cute.Pointer,
    extent: cutlass.Int32,
    groups: cutlass.Constexpr,
    buffers: cutlass.Constexpr,
    total_clusters: cutlass.Constexpr,
    clusters: cutlass.Constexpr,
    stream: cuda.CUstream,
):
    # they only say dtype and majorness; of an extent that the compiler does not know
    tensor_a = _operand(a, extent, extent, extent, True)
    tensor_b = _operand(b, extent, extent, extent, True)
    tensor_c = _operand(c, extent, extent, extent, True)
    kernel(
        tensor_a,
        tensor_b,
        tensor_c,
        groups,
        cute.make_tensor(sizes, cute.make_ordered_layout((groups, 4), order=(1, 0))),
        cute.make_tensor(strides, cute.make_ordered_layout((groups, 3, 2), order=(2, 1, 0))),
        cute.make_tensor(addresses, cute.make_ordered_layout((groups, 3), order=(1, 0))),
        total_clusters,
        cute.make_tensor(maps, cute.make_ordered_layout((buffers, kernel.num_tensormaps, 16), order=(2, 1, 0))),
        clusters,
        stream,
    )


def grouped(kernel: Any, ab: str, c: str, groups: int, buffers: int, total_clusters: int) -> tuple[Any, list[Any]]:
    """The same of a grouped GEMM: sizes, strides and addresses of each group lie in memory, tensor maps are made by the kernel."""
    tables = [_pointer("Int32"), _pointer("Int32"), _pointer("Int64"), _pointer("Int64", 128)]
    counts = [groups, buffers, total_clusters, CLUSTERS]
    return _grouped, [kernel, _pointer(ab), _pointer(ab), _pointer(c), *tables, cutlass.Int32(0), *counts, cuda.CUstream(0)]
