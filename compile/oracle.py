"""The launch oracle: a recipe against the compiler's own host code, in every byte that the kernel reads.

CuTe DSL compiles the ``@cute.jit`` host function too, and exports it as an object file. Linked with a shim that stands in for the CUDA runtime, its
entry runs on any CPU; the shim receives what the host code would have launched: grid, block, cluster, dynamic shared memory, attributes and every
parameter. What our packer computes from the recipe must be equal. The mask of compared bytes is derived from the cubin's parameter ABI (offset and
size of each parameter) and is part of the report; it covers every byte of every parameter.

Tensor maps are encoded by the driver, which is not here: the shim's ``cuTensorMapEncodeTiled`` writes down what it is given (address, type,
sizes, strides, box, element strides, interleave, swizzle, L2 promotion, fill) as the 128 bytes of the map, and our packer does the same with what
the recipe says. So the comparison is of the arguments, in every kernel's parameters.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from densemoe.compile import kernels
from densemoe.runtime.errors import AuditError, ToolchainError
from densemoe.runtime.plan import OPTIONAL_ROLES, PackedLaunch, pack
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.variant import DETERMINISTIC, GROUPED_OPS, ROUTES, Variant

__all__ = [
    "Comparison",
    "HostCode",
    "Observed",
    "addresses",
    "compare",
    "differences",
    "host_code",
    "observe",
    "pack",
    "recorded_tensor_map",
    "shapes",
]

LARGEST_PARAMETERS: Final = 64
LARGEST_PARAMETER: Final = 128

_SHIM: Final = r"""
#include <stddef.h>
#include <stdint.h>
#include <string.h>
typedef struct { unsigned x, y, z; } dim3_;
typedef struct { int id; char pad[4]; char value[64]; } attribute_;
typedef struct { dim3_ grid, block; size_t smem; void *stream; attribute_ *attributes; unsigned count; } config_;
typedef struct { int launches, device_attribute; unsigned grid[3], block[3], cluster[3]; uint64_t smem; int programmatic;
                 unsigned char parameters[64][128]; } observed_;
static observed_ seen;
static int expected_count, expected_size[64];
observed_ *oracle_begin(int count, const int *sizes, int device_attribute) {
  memset(&seen, 0, sizeof seen); seen.device_attribute = device_attribute;
  expected_count = count; memcpy(expected_size, sizes, sizeof(int) * (size_t)count); return &seen; }
int _cudaLaunchKernelEx(const config_ *c, const void *function, void **arguments) {
  (void)function; seen.launches++;
  memcpy(seen.grid, &c->grid, 12); memcpy(seen.block, &c->block, 12); seen.smem = c->smem;
  seen.cluster[0] = seen.cluster[1] = seen.cluster[2] = 1;
  for (unsigned i = 0; i < c->count; i++) {
    if (c->attributes[i].id == 4) memcpy(seen.cluster, c->attributes[i].value, 12);
    if (c->attributes[i].id == 6) memcpy(&seen.programmatic, c->attributes[i].value, 4); }
  for (int i = 0; i < expected_count; i++) memcpy(seen.parameters[i], arguments[i], (size_t)expected_size[i]);
  return 0; }
int _cudaFuncSetAttribute(const void *f, int attribute, int value) { (void)f; (void)attribute; (void)value; return 0; }
int _cudaKernelSetAttributeForDevice(void *k, int attribute, int value, int device) {
  (void)k; (void)device; (void)attribute; (void)value; return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) { (void)attribute; (void)device; *value = seen.device_attribute; return 0; }
int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int _cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) { (void)attribute; (void)kernel; (void)device; *value = 0; return 0; }
static int one;
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) { (void)library; (void)name; *kernel = &one; return 0; }
int _cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned f) {
  (void)code; (void)a; (void)b; (void)c; (void)d; (void)e; (void)f; *library = &one; return 0; }
int _cudaLibraryUnload(void *library) { (void)library; return 0; }
/* the order and widths of recorded_tensor_map */
int _cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                            const uint32_t *element_strides, int interleave, int swizzle, int promotion, int fill) {
  struct { uint64_t address, sizes[5], strides[4]; uint32_t box[5]; uint8_t element_strides[5], type, rank, interleave, swizzle, promotion, fill;
           uint8_t rest[17]; } record;
  memset(&record, 0, sizeof record);
  if (rank > 5) return 1;
  record.address = (uint64_t)address; record.type = (uint8_t)type; record.rank = (uint8_t)rank;
  for (uint32_t i = 0; i < rank; i++) {
    record.sizes[i] = sizes[i]; record.box[i] = box[i]; record.element_strides[i] = (uint8_t)element_strides[i];
    if (i) record.strides[i - 1] = strides[i - 1]; }
  record.interleave = (uint8_t)interleave; record.swizzle = (uint8_t)swizzle; record.promotion = (uint8_t)promotion; record.fill = (uint8_t)fill;
  memcpy(map, &record, 128);
  return 0; }
void cuda_dialect_assert_success(int status) { (void)status; }
"""

#: As the driver numbers them: CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion.
_TYPES: Final = {"u8": 0, "u16": 1, "u32": 2, "f16": 6, "f32": 7, "bf16": 9}
_SWIZZLES: Final = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
_PROMOTIONS: Final = {"none": 0, "64B": 1, "128B": 2, "256B": 3}
_RECORD: Final = struct.Struct("<10Q5I11B17x")


def recorded_tensor_map(
    address: int, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: str, l2_promotion: str
) -> bytes:
    """128 bytes that hold the arguments of ``cuTensorMapEncodeTiled``, as the shim writes them: an encoder for ``pack``."""

    def padded(values: tuple[int, ...], count: int) -> tuple[int, ...]:
        return (*values, *(0,) * (count - len(values)))

    rank = len(sizes)
    numbers = (_TYPES[dtype], rank, 0, _SWIZZLES[swizzle], _PROMOTIONS[l2_promotion], 0)
    return _RECORD.pack(address, *padded(sizes, 5), *padded(strides, 4), *padded(box, 5), *padded((1,) * rank, 5), *numbers)


class _Seen(ctypes.Structure):
    """The shim's record."""

    _fields_ = (
        ("launches", ctypes.c_int),
        ("device_attribute", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint64),
        ("programmatic", ctypes.c_int),
        ("parameters", ctypes.c_ubyte * LARGEST_PARAMETER * LARGEST_PARAMETERS),
    )


@dataclass(frozen=True)
class Observed:
    """What the compiler's host code launched; ``parameters`` are each parameter's bytes."""

    grid: tuple[int, ...]
    block: tuple[int, ...]
    cluster: tuple[int, ...]
    dynamic_smem: int
    programmatic: bool
    parameters: tuple[bytes, ...]


@dataclass
class Comparison:
    """Result for one variant and shape.

    Attributes:
        problem: what was launched.
        mask: (offset, compared bytes) of each parameter.
        differences: in words; empty where everything is equal.
    """

    key: str
    problem: Problem
    mask: tuple[tuple[int, int], ...]
    differences: list[str] = field(default_factory=list)


@contextmanager
def observe(variant: Variant, kernel: str, options: str = "") -> Iterator[Any]:
    """Compiles a variant with its host code; gives a function (host arguments, recipe, sm_count) → Observed.

    Raises:
        ToolchainError: there is no C compiler to link the host code with.
    """
    host, arguments = kernels.load(kernel).compile_arguments(variant)
    with host_code(host, arguments, variant.arch, options) as code:

        def run(values: Sequence[int], recipe: Recipe, device_attribute: int) -> Observed:
            return code.run([ctypes.c_int64(value) for value in values], [size for _, size in recipe.offsets()], device_attribute)

        yield run


@dataclass(frozen=True)
class HostCode:
    """A host function of the DSL, compiled and linked with the shim.

    Attributes:
        compiled: what the compiler gave; ``__ptx__`` and ``__cubin__`` are its kernel's.
    """

    compiled: Any
    library: Any
    entry: str

    def run(self, values: Sequence[Any], sizes: Sequence[int], device_attribute: int) -> Observed:
        """What one call launches.

        Args:
            values: the arguments as ctypes objects, without the stream.
            sizes: bytes of each parameter of the kernel.
            device_attribute: what every query of a device attribute answers.

        Raises:
            AuditError: the host code launched no kernel, or several, or returned an error.
        """
        return _run(self.library, self.entry, values, sizes, device_attribute)


@contextmanager
def host_code(host: Any, arguments: Sequence[Any], arch: str, options: str = "") -> Iterator[HostCode]:
    """Compiles a host function of the DSL, whoever wrote it, for ``arch``.

    Raises:
        ToolchainError: there is no C compiler to link the host code with, or it does not link.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ToolchainError("the launch oracle links the compiler's host code: install a C compiler (cc), or set CC")
    import cutlass.cute as cute

    with tempfile.TemporaryDirectory(prefix="densemoe-oracle-") as name, _exportable(arch):
        folder = Path(name)
        flags = f"--gpu-arch={arch} --keep-cubin --keep-ptx --dump-dir={folder} {options}".rstrip()
        compiled = cute.compile(host, *arguments, options=flags)
        compiled.export_to_c(str(folder), "oracle")
        (folder / "shim.c").write_text(_SHIM)
        library = folder / "oracle.so"
        command = [compiler, "-shared", "-fPIC", "-Wl,-Bsymbolic", "-o", str(library), str(folder / "oracle.o"), str(folder / "shim.c")]
        linked = subprocess.run(command, capture_output=True, text=True, check=False)
        if linked.returncode:
            raise ToolchainError(f"the host code does not link: {linked.stderr.strip()}")
        yield HostCode(compiled, ctypes.CDLL(str(library)), _entry_name((folder / "oracle.h").read_text()))


@contextmanager
def _exportable(arch: str) -> Iterator[None]:
    """Tells the DSL that this machine is an ``arch``: it exports the host code of no other, though the host code is the same everywhere."""
    from cutlass.cutlass_dsl import CuTeDSL

    environment = CuTeDSL._get_dsl().envar
    before = environment.arch
    environment.arch = arch
    try:
        yield
    finally:
        environment.arch = before


def _entry_name(header: str) -> str:
    match = re.search(r"void (_mlir_oracle__mlir_ciface_\w+)\(void \*\*args", header)
    if match is None:
        raise ToolchainError("the compiler's exported header has no entry that the oracle knows: its version differs from the pinned one")
    return match[1]


def _run(library: ctypes.CDLL, entry: str, values: Sequence[Any], sizes: Sequence[int], device_attribute: int) -> Observed:
    if len(sizes) > LARGEST_PARAMETERS or max(sizes, default=0) > LARGEST_PARAMETER:
        raise AuditError(f"{len(sizes)} parameters of up to {max(sizes)} bytes: the shim takes {LARGEST_PARAMETERS} of {LARGEST_PARAMETER}")
    library.oracle_begin.restype = ctypes.POINTER(_Seen)
    seen = library.oracle_begin(len(sizes), (ctypes.c_int * len(sizes))(*sizes), device_attribute).contents
    # host arguments, a stream of 0, and the status that the entry returns
    cells = [*values, ctypes.c_int64(0), ctypes.c_int64(0)]
    pointers = (ctypes.c_void_p * len(cells))(*(ctypes.addressof(cell) for cell in cells))
    getattr(library, entry)(pointers, len(cells))
    if seen.launches != 1 or cells[-1].value:
        raise AuditError(f"the compiler's host code launched {seen.launches} kernels and returned {cells[-1].value}: one launch is expected")
    return Observed(
        tuple(seen.grid),
        tuple(seen.block),
        tuple(seen.cluster),
        int(seen.smem),
        bool(seen.programmatic),
        tuple(bytes(seen.parameters[i])[:size] for i, size in enumerate(sizes)),
    )


def shapes(variant: Variant) -> tuple[Problem, ...]:
    """Problems that exercise a variant's recipe: one token, a ragged middle, many tiles; both states of its run-time switches."""

    def make(m: int, experts: int, hidden: int, intermediate: int, switch: bool, x_dtype: str) -> Problem:
        if variant.op == "prepare":
            return Problem("prepare", m, experts, 0, 0, variant.a_dtype, variant.c_dtype, top_k=min(experts, 8), first_expert=m, elsewhere=switch)
        if variant.op == "route":
            chosen = min(experts, 8)
            return Problem(
                "route", m, experts, hidden if x_dtype else 0, 0, variant.a_dtype, variant.c_dtype,
                top_k=chosen, first_expert=m, elsewhere=switch, group_tile=16, x_dtype=x_dtype, deterministic=switch,
            )  # fmt: skip
        if variant.op in GROUPED_OPS and variant.option(ROUTES):
            return Problem(
                variant.op, min(m, 16), experts, hidden, intermediate, variant.a_dtype, variant.c_dtype,
                top_k=min(experts, 2), group_tile=variant.tile_m, first_expert=m, elsewhere=switch, routes=True, id_dtype="i64" if switch else "i32",
            )  # fmt: skip
        if variant.op in GROUPED_OPS:
            return Problem(
                variant.op, m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype,
                top_k=min(experts, 8), group_tile=variant.tile_m, deterministic=bool(variant.option(DETERMINISTIC)),
            )  # fmt: skip
        if variant.op == "quantize":
            return Problem("quantize", m, 0, hidden, 0, variant.a_dtype, variant.c_dtype)
        post, scalar, listed = switch and variant.op == "fc1", switch and variant.op == "fc2", switch
        return Problem(variant.op, m, experts, hidden, intermediate, variant.a_dtype, variant.c_dtype, post, scalar, listed)

    return (make(1, 1, 256, 256, False, ""), make(37, 5, 320, 768, True, "bf16"), make(511, 128, 2048, 768, False, "nvfp4"))


def compare(variant: Variant, kernel: str, sm_count: int = 132, options: str = "") -> list[Comparison]:
    """Runs the compiler's host code and our packer on ``shapes(variant)``, and compares.

    Raises:
        ToolchainError, AuditError: the host code could not be run.
    """
    module = kernels.load(kernel)
    recipe = module.recipe(variant)
    results = []
    with observe(variant, kernel, options) as run:
        for position, problem in enumerate(shapes(variant)):
            settings = {name: allowed[position % len(allowed)] for name, allowed in recipe.settings}
            names = {**problem.names(), "sm_count": sm_count, **settings}
            where = addresses(recipe, problem)
            observed: Observed = run(module.oracle_arguments(variant, names, where), recipe, sm_count)
            packed = pack(recipe, names, where, recorded_tensor_map)
            results.append(Comparison(variant.key, problem, packed.offsets, differences(recipe, packed, observed)))
    return results


def addresses(recipe: Recipe, problem: Problem) -> Mapping[str, int]:
    """Distinct made-up addresses, with bits in every byte, for each role; 0 for an optional tensor that the problem lacks."""
    roles = sorted({each.value for each in recipe.parameters if each.kind in ("pointer", "tensor_map")})
    found = {role: 0x7F1122334400 + (index << 32) for index, role in enumerate(roles)}
    present = problem.tensors()
    found.update({role: 0 for role in OPTIONAL_ROLES if role in found and role not in present})
    return found


def differences(recipe: Recipe, packed: PackedLaunch, observed: Observed) -> list[str]:
    """What differs between our packer's launch and the compiler's, in words."""
    found = []
    for name, ours, theirs in (
        ("grid", packed.grid, observed.grid),
        ("block", packed.block, observed.block),
        ("cluster", packed.cluster, observed.cluster),
        ("dynamic shared memory", packed.dynamic_smem, observed.dynamic_smem),
        ("programmatic launch", recipe.programmatic_launch, observed.programmatic),
    ):
        if ours != theirs:
            found.append(f"{name}: recipe {ours}, compiler {theirs}")
    for parameter, (offset, size), theirs_bytes in zip(recipe.parameters, packed.offsets, observed.parameters, strict=True):
        ours_bytes = bytes(packed.parameters[offset : offset + size])
        if ours_bytes != theirs_bytes:
            found.append(f"parameter {parameter.name}: recipe {ours_bytes.hex()}, compiler {theirs_bytes.hex()}")
    return found
