"""The tcgen05 kernels' launch: tensor maps as the host encodes them and as the recipe says them, and what the audit counts.

The two spellings of a tensor map are independent on purpose: ``compile/oracle.py`` runs the one against the other.
"""

from __future__ import annotations

from typing import Any, Final

import cutlass.experimental.cuda as cuda_types
from cutlass import BFloat16, Float16, Float32, Int64, Uint8, Uint16

from densemoe.compile.kernels import sm100_common as common
from densemoe.compile.kernels import sm100_device as device
from densemoe.runtime.recipe import Parameter, TensorMapSpec

#: Roles of the operands in the order of the kernels' tensor maps with their scales, as the host functions take them.
OPERANDS: Final = ("a.codes", "a.scales", "b.codes", "b.scales")
#: K tiles that the L2 prefetch runs ahead of the copies; the first is the default.
PREFETCH_DISTANCES: Final = (0, 3)
REGISTERS: Final = 65536
LARGEST_REGISTERS: Final = 255
#: Three groups of four warps hold 65,536 registers, 168 a thread; the issuing group gives to the two of the epilogue: 2·208 + 88 = 3·168.
EPILOGUE_REGISTERS: Final = 208
ISSUE_REGISTERS: Final = 88
#: A TMA store of outputs: the rows of a warp, and a row of the 128-byte swizzle.
STORE_ROWS: Final = common.WARP
STORE_ROW_BYTES: Final = 128
TENSOR_STORE: Final = "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"
#: Weights are streamed along K: the next K tile of a row lies in the same 256 bytes.
WEIGHT_L2_PROMOTION: Final = "256B"


def _codes_map(address: Any, rows: Any, k: Any, box_rows: int, promotion: Any) -> Any:
    """uint8 ``[rows, k / 2]``, boxes of 128 bytes x ``box_rows`` under the 128-byte swizzle."""
    return cuda_types.create_tensor_map_tiled(
        address.toint(),
        Uint8,
        [k // 2, rows],
        [Int64(k // 2) // 16],
        [common.CODE_ROW_BYTES, box_rows],
        swizzle=cuda_types.TensorMapSwizzle.s128b,
        l2_promotion=promotion,
    )


def _scales_map(address: Any, rows: Any, k: Any, box_atoms: int) -> Any:
    """Scale atoms ``[⌈rows / 128⌉, k / 64, 256]`` of 16-bit words, boxes of ``box_atoms`` atoms. Atoms past the end of K are read as 0."""
    return cuda_types.create_tensor_map_tiled(
        address.toint(),
        Uint16,
        [common.SCALE_ATOM_WORDS, k // 64, (rows + (common.CTA_ROWS - 1)) // common.CTA_ROWS],
        [common.SCALE_ATOM_BYTES // 16, Int64(k // 64) * (common.SCALE_ATOM_BYTES // 16)],
        [common.SCALE_ATOM_WORDS, box_atoms, 1],
        swizzle=cuda_types.TensorMapSwizzle.none,
    )


def encode_maps(config: common.Config, a: Any, a_scales: Any, b: Any, b_scales: Any, tokens: Any, weight_rows: Any, k: Any) -> tuple[Any, ...]:
    """Host side: tensor maps of A, B, A's scales, B's scales."""
    promotion = cuda_types.TensorMapL2Promotion
    return (
        _codes_map(a, tokens, k, common.CTA_ROWS // config.cluster_n, promotion.l2_128b),
        _codes_map(b, weight_rows, k, config.b_rows // config.pairs_m, promotion.l2_256b),
        _scales_map(a_scales, tokens, k, common.SCALE_ATOMS // config.cluster_n),
        _scales_map(b_scales, weight_rows, k, common.SCALE_ATOMS // config.pairs_m),
    )


def encode_output_map(config: common.Config, c: Any, rows: Any, columns: Any) -> Any:
    """Host side: the tensor map of a plain output ``[rows, columns]``, boxes of 32 rows (a warp's) x 128 bytes under the 128-byte swizzle."""
    element = {"f32": Float32, "f16": Float16, "bf16": BFloat16}[config.c_dtype]
    size = element.width // 8
    return cuda_types.create_tensor_map_tiled(
        c.toint(),
        element,
        [columns, rows],
        [Int64(columns) * size // 16],
        [STORE_ROW_BYTES // size, STORE_ROWS],
        swizzle=cuda_types.TensorMapSwizzle.s128b,
    )


def output_map_parameter(config: common.Config) -> Parameter:
    """The recipe's tensor map of FC2's output."""
    size = 4 if config.c_dtype == "f32" else 2
    spec = TensorMapSpec(config.c_dtype, ("H", "M"), (f"H * {size}",), (STORE_ROW_BYTES // size, STORE_ROWS), "128B")
    return Parameter("map_c", "tensor_map", "c", spec)


def cluster_option(config: common.Config) -> dict[str, Any]:
    """The launch's cluster, where there is one."""
    return {"cluster": (config.cluster_size, 1, 1)} if config.cluster_size > 1 else {}


def map_parameters(config: common.Config, weight_rows: str) -> tuple[Parameter, ...]:
    """The recipe's tensor maps of A, B, A's scales, B's scales.

    Args:
        weight_rows: expression of B's rows.
    """

    def codes(rows: str, box_rows: int, promotion: str) -> TensorMapSpec:
        return TensorMapSpec("u8", ("K // 2", rows), ("K // 2",), (common.CODE_ROW_BYTES, box_rows), "128B", promotion)

    def scales(rows: str, box_atoms: int) -> TensorMapSpec:
        words, atom = common.SCALE_ATOM_WORDS, common.SCALE_ATOM_BYTES
        return TensorMapSpec(
            "u16", (words, "K // 64", f"ceil_div({rows}, {common.CTA_ROWS})"), (atom, f"K // 64 * {atom}"), (words, box_atoms, 1)
        )

    return (
        Parameter("map_a", "tensor_map", "a.codes", codes("M", common.CTA_ROWS // config.cluster_n, "128B")),
        Parameter("map_b", "tensor_map", "b.codes", codes(weight_rows, config.b_rows // config.pairs_m, WEIGHT_L2_PROMOTION)),
        Parameter("map_a_scales", "tensor_map", "a.scales", scales("M", common.SCALE_ATOMS // config.cluster_n)),
        Parameter("map_b_scales", "tensor_map", "b.scales", scales(weight_rows, common.SCALE_ATOMS // config.pairs_m)),
    )


def registers(config: common.Config) -> int:
    """Registers a thread may have: they are granted by groups of four warps."""
    groups = -(-config.warps // 4)
    return min(LARGEST_REGISTERS, REGISTERS // (groups * 128) // 8 * 8)


def design(config: common.Config) -> dict[str, int]:
    """Sizes of a CTA for the record. Weights in flight on all SMs, divided by the bandwidth, are the memory latency that the ring hides:
    ``weight_bytes_in_flight`` above ``latency_bandwidth_bytes`` means that copies are issued early enough."""
    return {
        "stages": config.stages,
        "stage_bytes": config.stage_bytes,
        "tma_bytes_in_flight": config.stages * config.stage_bytes,
        "weight_bytes_in_flight": config.stages * config.weight_stage_bytes,
        "latency_bandwidth_bytes": device.latency_bandwidth_bytes(),
        "smem_bytes": config.smem_bytes,
        "smem_limit": device.LARGEST_SMEM,
        "tmem_columns": config.tmem_columns_used,
        "tmem_limit": device.TMEM_COLUMNS,
        "accumulators": config.accumulators,
    }


def expected_counts(config: common.Config, activation_loads: int, weight_loads: int) -> dict[str, int]:
    """PTX opcodes that follow from the tile.

    Args:
        activation_loads, weight_loads: places in the kernel that load a stage's activations and weights.
    """
    group = f"cta_group::{config.pair}"
    copies: dict[str, int] = {}

    def add(rank: int, multicast: bool, count: int) -> None:
        name = f"cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        name += ".multicast::cluster" if multicast else ""
        name += f".{group}" if config.pair == 2 else ""
        copies[name] = copies.get(name, 0) + count

    for rank in (2, 3):
        add(rank, config.cluster_n > 1, activation_loads)
        add(rank, config.pairs_m > 1, weight_loads * config.halves)
    commit = f"tcgen05.commit.{group}.mbarrier::arrive::one.shared::cluster"
    releases = {commit + (".multicast::cluster" if config.cluster_size > 1 else "") + ".b64": 1}
    publishes = commit + (".multicast::cluster" if config.pair == 2 else "") + ".b64"
    releases[publishes] = releases.get(publishes, 0) + 1
    return {
        f"tcgen05.mma.{group}.kind::mxf4nvf4.block_scale.block16.collector::a::discard": common.K_STEPS * config.halves,
        f"tcgen05.cp.{group}.32x128b.warpx4": common.K_STEPS * (1 + config.halves),
        f"tcgen05.alloc.{group}.sync.aligned.shared::cta.b32": 1,
        f"tcgen05.dealloc.{group}.sync.aligned.b32": 1,
        **copies,
        **releases,
    }
