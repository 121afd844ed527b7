"""Known-good kernels: NVIDIA's CuTe DSL examples, sources and host code of theirs, give exactly what float64 gives, with every check of the emulator
on but that their kernels leave ``tcgen05.fence`` out, which is a remark here.

Needs a checkout of their repository: ``DENSEMOE_CUTLASS_EXAMPLES`` or ``--cutlass-examples``. ``--full`` runs 40 random problems a configuration.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import nvidia_examples as nvidia
import pytest
from nvidia_examples import BLACKWELL, FORMATS, HOPPER, GlobalMemory, Program

pytest.importorskip("torch")  # their modules import it

DENSE = f"{BLACKWELL}/dense_gemm/dense_gemm.py"
PERSISTENT = f"{BLACKWELL}/dense_gemm/dense_gemm_persistent.py"
SCALED = f"{BLACKWELL}/blockscaled_gemm/dense_blockscaled_gemm_persistent.py"
GROUPED = f"{BLACKWELL}/grouped_gemm/grouped_gemm.py"
HOPPER_DENSE = f"{HOPPER}/dense_gemm/dense_gemm.py"
HOPPER_PERSISTENT = f"{HOPPER}/dense_gemm/dense_gemm_persistent.py"
K_MAJOR, MN_MAJOR = (True, True, True), (False, False, False)
CASES, FULL_CASES = 3, 40
SCHEDULES = ("random", "eager", "lazy")


@dataclass(frozen=True)
class Configuration:
    """One compiled kernel.

    Attributes:
        formats: of A, B and C.
        scale: DSL type and size of the blocks of scale factors.
        majors: whether K, K and N are contiguous.
        ragged: M and N need not fill tiles.
        two: MMAs of two CTAs.
    """

    name: str
    file: str
    formats: tuple[str, str, str]
    tile: tuple[int, int]
    cluster: tuple[int, int] = (1, 1)
    two: bool = False
    scale: tuple[str, int] | None = None
    majors: tuple[bool, bool, bool] = K_MAJOR
    ragged: bool = True
    update: str = ""

    @property
    def arch(self) -> str:
        return "sm_90a" if self.file.startswith(HOPPER) else "sm_100a"


NVFP4, MXFP = ("Float8E4M3FN", 16), ("Float8E8M0FNU", 32)
FP4 = ("e2m1", "e2m1")
CONFIGURATIONS = [
    Configuration("dense f16", DENSE, ("f16", "f16", "f32"), (128, 128)),
    Configuration("dense f16, 2 CTAs", DENSE, ("f16", "f16", "f32"), (256, 128), (2, 1), two=True),
    Configuration("dense f16, direct stores", DENSE, ("f16", "f16", "f16"), (128, 64), ragged=False),
    Configuration("dense persistent f16", PERSISTENT, ("f16", "f16", "f32"), (128, 128)),
    Configuration("dense persistent e4m3, M- and N-major", PERSISTENT, ("e4m3", "e4m3", "f32"), (256, 64), (2, 2), two=True, majors=MN_MAJOR),
    Configuration("dense persistent bf16, 16 CTAs", PERSISTENT, ("bf16", "bf16", "bf16"), (256, 256), (4, 4), two=True),
    Configuration("NVFP4", SCALED, (*FP4, "f32"), (128, 128), scale=NVFP4),
    Configuration("NVFP4, N 64", SCALED, (*FP4, "f32"), (128, 64), (1, 2), scale=NVFP4),
    Configuration("NVFP4, N 192", SCALED, (*FP4, "bf16"), (128, 192), (2, 1), scale=NVFP4),
    Configuration("NVFP4, 2 CTAs", SCALED, (*FP4, "f16"), (256, 128), (2, 1), scale=NVFP4),
    Configuration("MXFP4, N 256", SCALED, (*FP4, "f32"), (128, 256), (1, 4), scale=MXFP),
    Configuration("MXFP4, 2 CTAs, 16 in a cluster", SCALED, (*FP4, "f32"), (256, 256), (4, 4), scale=MXFP),
    Configuration("MXFP8", SCALED, ("e4m3", "e4m3", "f32"), (128, 128), scale=MXFP),
    Configuration("MXFP8 e5m2, 2 CTAs", SCALED, ("e5m2", "e4m3", "bf16"), (256, 128), (2, 1), scale=MXFP),
    Configuration("MXFP8 with MXFP4", SCALED, ("e4m3", "e2m1", "f32"), (128, 128), scale=MXFP),
    Configuration("grouped f16, maps in shared memory", GROUPED, ("f16", "f16", "f32"), (128, 128), update="SMEM"),
    Configuration("grouped bf16, 2 CTAs", GROUPED, ("bf16", "bf16", "f32"), (256, 128), (2, 2), two=True, update="SMEM"),
    Configuration("grouped f16, maps in global memory", GROUPED, ("f16", "f16", "f16"), (128, 64), update="GMEM"),
    Configuration("Hopper dense f16", HOPPER_DENSE, ("f16", "f16", "f32"), (128, 128)),
    Configuration("Hopper dense bf16, 2 CTAs", HOPPER_DENSE, ("bf16", "bf16", "bf16"), (128, 256), (2, 1)),
    Configuration("Hopper dense f16, M- and N-major", HOPPER_DENSE, ("f16", "f16", "f16"), (64, 64), (1, 2), majors=MN_MAJOR),
    Configuration("Hopper dense persistent f16", HOPPER_PERSISTENT, ("f16", "f16", "f32"), (128, 128), (2, 1)),
]
GROUPS = 3  # of the grouped GEMM: a constant of the kernel


@pytest.fixture(scope="session")
def examples(request: pytest.FixtureRequest) -> Path:
    folder = nvidia.root(request.config.getoption("--cutlass-examples"))
    if folder is None:
        pytest.skip(nvidia.ABSENT)
    return folder


def kernel_of(examples: Path, configuration: Configuration) -> Any:
    """An object of the example's class."""
    import cutlass
    from cutlass import utils

    module = nvidia.load(examples, configuration.file)
    tile, cluster, two, single = configuration.tile, configuration.cluster, configuration.two, cutlass.Float32
    if configuration.file == SCALED:
        assert configuration.scale is not None
        return module.Sm100BlockScaledPersistentDenseGemmKernel(configuration.scale[1], tile, cluster)
    if configuration.file == GROUPED:
        return module.GroupedGemmKernel(single, two, tile, cluster, utils.TensorMapUpdateMode[configuration.update])
    if configuration.file == HOPPER_DENSE:
        return module.HopperWgmmaGemmKernel(single, tile, cluster)
    if configuration.file == HOPPER_PERSISTENT:
        return module.HopperWgmmaGemmPersistentKernel(single, tile, cluster, 1, True)
    kind = module.DenseGemmKernel if configuration.file == DENSE else module.PersistentDenseGemmKernel
    return kind(single, two, tile, cluster, configuration.ragged)  # tensor stores clip, others do not


def clusters_of(configuration: Configuration, groups: Sequence[tuple[int, int, int]]) -> int:
    """Clusters that a grouped GEMM needs."""
    m = configuration.tile[0] // (2 if configuration.two else 1) * configuration.cluster[0]
    n = configuration.tile[1] * configuration.cluster[1]
    return sum(-(-group[0] // m) * -(-group[1] // n) for group in groups)


# ---- problems


def _sizes(rng: np.random.Generator, configuration: Configuration) -> tuple[int, int, int, int]:
    """(M, N, K, batch): multiples of what 16 bytes hold, as the examples ask for; of 128 where 4-bit elements fill bytes, as drivers do."""
    first, second, _ = configuration.formats
    spread = "e2m1" in (first, second) and first != second
    unit = 128 if spread else 64 if configuration.scale else 32
    tile_m, tile_n = configuration.tile
    if not configuration.ragged:
        return tile_m * int(rng.integers(1, 3)), tile_n * int(rng.integers(1, 4)), 32 * int(rng.integers(1, 9)), int(rng.integers(1, 3))
    return 32 * int(rng.integers(1, 17)), 32 * int(rng.integers(1, 33)), unit * int(rng.integers(1, 513 // unit)), int(rng.integers(1, 3))


def _stored(rng: np.random.Generator, form: str, batch: int, rows: int, k: int, k_major: bool) -> tuple[np.ndarray, np.ndarray]:
    """(float64 values ``[batch, rows, K]``, bytes)."""
    values, codes = nvidia.operand(rng, form, (batch, rows, k))
    if k_major:
        return values, codes
    return values, np.ascontiguousarray(values.astype(FORMATS[form].dtype).transpose(0, 2, 1)).view(np.uint8)


def run_dense(program: Program, configuration: Configuration, rng: np.random.Generator, schedule: str) -> dict[str, int]:
    """One random problem of a dense or block-scaled GEMM; the products that were made."""
    m, n, k, batch = _sizes(rng, configuration)
    forms = configuration.formats
    (a, a_bytes), (b, b_bytes) = (
        _stored(rng, form, batch, rows, k, major) for form, rows, major in zip(forms, (m, n), configuration.majors, strict=False)
    )
    memory = GlobalMemory()
    addresses = [memory.add(name, data, writable=False) for name, data in (("a", a_bytes), ("b", b_bytes))]
    if configuration.scale:
        for name, rows in (("sfa", m), ("sfb", n)):
            factors, tiled = nvidia.scale_factors(rng, batch, rows, k, configuration.scale[1], configuration.scale == MXFP)
            addresses.append(memory.add(name, tiled, writable=False))
            if name == "sfa":
                a = a * factors
            else:
                b = b * factors
    row_major = configuration.majors[2]
    c = nvidia.output(forms[2], (batch, m, n) if row_major else (batch, n, m))
    addresses.append(memory.add("c", c, written=False, once=True))
    report = program.launch([*map(ctypes.c_int64, addresses), *map(ctypes.c_int32, (m, n, k, batch))], memory, schedule)
    exact = np.einsum("lmk,lnk->lmn", a, b, optimize=True).astype(c.dtype)
    np.testing.assert_array_equal(c if row_major else c.transpose(0, 2, 1), exact)
    return report.products


def run_grouped(program: Program, configuration: Configuration, groups: Sequence[tuple[int, int, int]], seed: int, schedule: str) -> dict[str, int]:
    """A grouped GEMM of sizes (M, N, K)."""
    import nvidia_hosts as hosts

    rng, memory = np.random.default_rng(seed), GlobalMemory()
    ab, c_form = configuration.formats[0], configuration.formats[2]
    addresses, expected = [], []
    for number, (m, n, k) in enumerate(groups):
        (a, a_bytes), (b, b_bytes) = (_stored(rng, ab, 1, rows, k, True) for rows in (m, n))
        c = nvidia.output(c_form, (m, n))
        read = [memory.add(f"{name}{number}", data, writable=False) for name, data in (("a", a_bytes), ("b", b_bytes))]
        addresses.append([*read, memory.add(f"c{number}", c, written=False, once=True)])
        expected.append((c, (a[0] @ b[0].T).astype(c.dtype)))
    tables = {
        "sizes": np.array([(*group, 1) for group in groups], np.int32),
        "strides": np.array([[(k, 1), (k, 1), (n, 1)] for _, n, k in groups], np.int32),
        "addresses": np.array(addresses, np.int64),
    }
    unused = memory.add("unused", np.zeros(256, np.uint8), writable=False)
    given = [unused] * 3 + [memory.add(name, table, writable=False) for name, table in tables.items()]
    ctas = hosts.CLUSTERS * configuration.cluster[0] * configuration.cluster[1]
    given.append(memory.add("maps", np.zeros((ctas, 3, 16), np.int64), written=False))
    report = program.launch([*map(ctypes.c_int64, given), ctypes.c_int32(32)], memory, schedule)
    for c, exact in expected:
        np.testing.assert_array_equal(c, exact)
    return report.products


def runs_of(examples: Path, configuration: Configuration, count: int) -> Iterator[tuple[Any, Callable[[Program], dict[str, int]]]]:
    """((host function, arguments), what to do with the compiled program); a grouped GEMM is compiled for its number of clusters."""
    import nvidia_hosts as hosts

    kernel = kernel_of(examples, configuration)
    names = [FORMATS[form].name for form in configuration.formats]
    schedules = [f"random:{i}" if name == "random" else name for i, name in zip(range(count), SCHEDULES * count, strict=False)]
    if configuration.file == GROUPED:
        rng = np.random.default_rng(7)
        groups = [(32 * int(rng.integers(1, 9)), 32 * int(rng.integers(1, 9)), 32 * int(rng.integers(1, 9))) for _ in range(GROUPS)]
        ctas = hosts.CLUSTERS * configuration.cluster[0] * configuration.cluster[1]
        made = hosts.grouped(kernel, names[0], names[2], GROUPS, ctas, clusters_of(configuration, groups))
        yield made, lambda program: [run_grouped(program, configuration, groups, i, schedule) for i, schedule in enumerate(schedules)][-1]
        return
    if configuration.scale:
        made = hosts.block_scaled(kernel, names[0], names[1], configuration.scale[0], names[2])
    else:
        made = hosts.dense(kernel, names[0], names[2], configuration.majors, configuration.file in (PERSISTENT, HOPPER_PERSISTENT))
    yield made, lambda program: [
        run_dense(program, configuration, np.random.default_rng([i, len(configuration.name)]), schedule) for i, schedule in enumerate(schedules)
    ][-1]


def check(examples: Path, configuration: Configuration, count: int) -> None:
    for (host, arguments), run in runs_of(examples, configuration, count):
        with nvidia.compiled(host, arguments, configuration.arch) as program:
            products = run(program)
            kind = "wgmma" if configuration.arch == "sm_90a" else "tcgen05.mma."
            assert sum(number for name, number in products.items() if name.startswith(kind)) > 0


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.name)
def test_an_example_is_exact(examples: Path, configuration: Configuration) -> None:
    check(examples, configuration, CASES)


@pytest.mark.full
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda each: each.name)
def test_an_example_is_exact_on_many_problems(examples: Path, configuration: Configuration) -> None:
    check(examples, configuration, FULL_CASES)


def test_a_folder_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of a checkout of"):
        nvidia.root(str(tmp_path))
