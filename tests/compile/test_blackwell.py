"""The tcgen05 kernels without a device and without the emulator: geometry, audit, launch recipes against the compiler's host code, rules."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest

from densemoe.compile import audit, kernels, matrix, oracle, toolchain
from densemoe.runtime.errors import AuditError, ProblemError, RecipeError, VariantError
from densemoe.runtime.plan import OPTIONAL_ROLES, pack
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe, TensorMapSpec, evaluate
from densemoe.runtime.rules import can_implement, check_legal
from densemoe.runtime.variant import Variant

PLANNED = [p for p in matrix.load().profile("full") if p.variant.arch == "sm_100f" and p.variant.op in ("fc1", "fc2")]
SHIPPED = {each.variant.key: each for each in PLANNED}
#: One variant of each op, tile and cluster.
GEOMETRIES = {(v.op, v.tile_m, v.tile_n, v.cluster_m, v.cluster_n): v for v in (p.variant for p in PLANNED) if v.c_dtype in ("nvfp4", "bf16")}
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="the oracle links host code with a C compiler, and there is none")


def ids(variant: Variant) -> str:
    return variant.key


def module_of(variant: Variant) -> kernels.KernelModule:
    return kernels.load(f"sm100_{variant.op}")


def test_the_contract_s_variants_are_all_there() -> None:
    """Contract section 7; alpha_post, scalar alpha, splits and prefetch are run-time parameters of each."""
    narrow = [(128, 128), (128, 256)]
    tiles = {
        "fc1": [(t, (1, n)) for t in narrow for n in (1, 2, 4)] + [((256, n), (2, 1)) for n in (128, 256)],
        "fc2": [(t, (1, n)) for t in [(128, 64), *narrow] for n in (1, 2, 4)] + [((256, 128), (2, 1))],
    }
    dtypes = {"fc1": ("nvfp4", "bf16", "f16", "f32", "e4m3", "e5m2"), "fc2": ("bf16", "f16", "f32")}
    expected = {
        (op, *tile, *cluster, dtype) for op in tiles for (tile, cluster), dtype in itertools.product(tiles[op], dtypes[op])
    }
    shipped = [(v.op, v.tile_m, v.tile_n, v.cluster_m, v.cluster_n, v.c_dtype) for v in (p.variant for p in PLANNED)]
    assert len(shipped) == len(expected) == 78
    assert set(shipped) == expected
    for planned in PLANNED:
        settings = dict(module_of(planned.variant).recipe(planned.variant).settings)
        assert settings["prefetch"] == (0, 3)
        assert settings.get("splits", (1, 2, 4)) == (1, 2, 4)


@pytest.mark.parametrize("variant", GEOMETRIES.values(), ids=ids)
def test_shared_and_tensor_memory_hold_what_the_tile_needs(variant: Variant) -> None:
    module = module_of(variant)
    config = module.config_of(variant)  # type: ignore[attr-defined]
    assert config.smem_bytes <= 232_448
    assert config.smem_bytes + config.stage_bytes > 232_448  # no stage is left out
    assert config.stages >= 4
    for size in (config.a_bytes, config.b_bytes, config.b_half_bytes, 2048, config.b_scale_bytes):
        assert size % 1024 == 0  # every stage of every operand begins on the swizzle's period
    assert config.tmem_columns_used <= 512
    # MMA and epilogue overlap: beside a tile's accumulators at least one more
    assert config.accumulators > config.halves
    # a ring of weights in flight on 148 SMs outlasts 1 microsecond of 7.7 TB/s
    assert 148 * config.stages * config.weight_stage_bytes > 7.7e12 * 1e-6


@pytest.mark.sampled(2)
@pytest.mark.parametrize("variant", GEOMETRIES.values(), ids=ids)
def test_the_compiled_kernel_passes_its_audit(variant: Variant) -> None:
    module = module_of(variant)
    compiled = toolchain.compile_variant(variant, module.__name__.rpartition(".")[2])
    numbers = audit.audit(variant, module, compiled)
    counts = audit.count_opcodes(compiled.ptx)
    config = module.config_of(variant)  # type: ignore[attr-defined]
    assert compiled.facts.stack == 0
    assert sum(n for name, n in counts.items() if name.startswith("tcgen05.mma")) == 4 * config.halves
    assert sum(n for name, n in counts.items() if name.startswith("tcgen05.cp")) == 4 * (1 + config.halves)
    multicast = sum(n for name, n in counts.items() if name.startswith("cp.async.bulk.tensor") and ".multicast" in name)
    assert multicast == (2 if variant.cluster_n > 1 else 0)
    groups = {name.split("cta_group::")[1][0] for name in counts if "cta_group" in name}
    assert groups == {str(config.pair)}  # one kernel never mixes them
    assert numbers["expected"]
    assert numbers["design"]["weight_bytes_in_flight"] == config.stages * config.weight_stage_bytes
    assert numbers["design"]["smem_bytes"] == module.recipe(variant).dynamic_smem
    # ptxas may fuse a bare multiply and a bare add: all of ours say how they round
    assert not [name for name in counts if name in ("mul.f32", "add.f32", "mul.f32x2", "add.f32x2", "fma.f32x2")]


@pytest.mark.parametrize("arch", ["sm_100a", "sm_103a"])
@pytest.mark.parametrize("key", ["fc1.sm100f.t256x256.c2x1.nvfp4-nvfp4", "fc2.sm100f.t128x256.c1x4.nvfp4-bf16"])
def test_exact_architectures_build_from_the_same_ptx(key: str, arch: str) -> None:
    texts = []
    for each in ("sm_100f", arch):
        variant = dataclasses.replace(SHIPPED[key].variant, arch=each)
        compiled = toolchain.compile_variant(variant, f"sm100_{variant.op}")
        audit.audit(variant, module_of(variant), compiled)
        lines = [line for line in compiled.ptx.splitlines() if not line.startswith((".target", "//"))]
        texts.append("\n".join(lines).replace(variant.symbol, "SYMBOL"))
    assert texts[0] == texts[1]


def test_an_audit_misses_no_instruction() -> None:
    variant = SHIPPED["fc1.sm100f.t128x128.c1x2.nvfp4-nvfp4"].variant
    module = module_of(variant)
    compiled = toolchain.compile_variant(variant, "sm100_fc1")
    for opcode in ("tcgen05.mma.cta_group::1.kind", "tcgen05.cp.cta_group::1", "cp.async.bulk.tensor.2d.shared", "tcgen05.commit"):
        fewer = dataclasses.replace(compiled, ptx=compiled.ptx.replace(opcode, f"nop.{opcode}", 1))
        with pytest.raises(AuditError, match=r"in the PTX: the tile implies"):
            audit.audit(variant, module, fewer)


# ---- recipes


def problems(variant: Variant) -> list[Problem]:
    """Problems of every kind that the variant accepts."""
    rng = np.random.default_rng(11)
    found = []
    for m, experts in itertools.product((1, 127, 128, 129, 257, 1000), (1, 3, 8)):
        unit = max(1, variant.tile_n // 128)
        intermediate = int(rng.integers(1, 4)) * (256 if variant.op == "fc2" else 64 * unit)
        hidden = 64 * int(rng.integers(1, 9))
        switch = bool(rng.integers(2))
        found.append(
            Problem(
                variant.op,
                m,
                experts,
                hidden,
                intermediate,
                "nvfp4",
                variant.c_dtype,
                alpha_post=switch and variant.op == "fc1",
                scalar_alpha=switch and variant.op == "fc2",
                active_list=bool(rng.integers(2)),
            )
        )
    return found


@pytest.mark.parametrize("variant", GEOMETRIES.values(), ids=ids)
def test_tensor_maps_cover_their_tensors_exactly(variant: Variant) -> None:
    from densemoe.runtime.layout import weight_shapes

    recipe = module_of(variant).recipe(variant)
    for problem in problems(variant):
        bound = recipe.bind({**problem.names(), "sm_count": 148})
        shapes = {role: spec.shape for role, spec in problem.tensors().items()}
        shapes.update(weight_shapes(problem.op, problem.experts, problem.hidden, problem.intermediate))
        for parameter in recipe.parameters[:4]:
            spec = parameter.tensor_map
            assert spec is not None
            sizes, strides, box = ([evaluate(e, bound) for e in part] for part in (spec.sizes, spec.strides, spec.box))
            element = {"u8": 1, "u16": 2}[spec.dtype]
            assert sizes[-1] * strides[-1] == int(np.prod(shapes[parameter.value], dtype=np.int64)), (parameter.name, problem)
            assert [s % 16 for s in strides] == [0] * len(strides)
            assert max(box) <= 256
            assert box[0] * element == (128 if spec.swizzle == "128B" else 512)


@pytest.mark.parametrize("variant", GEOMETRIES.values(), ids=ids)
def test_grids_are_whole_clusters_that_the_device_holds(variant: Variant) -> None:
    recipe = module_of(variant).recipe(variant)
    size = variant.cluster_m * variant.cluster_n
    for problem, sm_count in itertools.product(problems(variant), (148, 160, 16)):
        names = {**problem.names(), "sm_count": sm_count}
        roles = {each.value for each in recipe.parameters if each.kind in ("pointer", "tensor_map")}
        packed = pack(recipe, names, {**dict.fromkeys(roles, 4096), **dict.fromkeys(OPTIONAL_ROLES, 0)}, oracle.recorded_tensor_map)
        assert packed.cluster == (size, 1, 1)
        assert packed.grid[0] % size == 0
        assert size <= packed.grid[0] <= sm_count
        rows = -(-problem.m // (128 * variant.cluster_m))
        columns = (2 if problem.op == "fc1" else 1) * problem.n_out
        tiles = rows * -(-columns // (variant.tile_n * variant.cluster_n))
        assert packed.grid[0] // size == min(tiles, sm_count // size)


def test_a_split_needs_a_workspace_and_one_split_none() -> None:
    variant = SHIPPED["fc2.sm100f.t128x256.c1x2.nvfp4-bf16"].variant
    recipe = module_of(variant).recipe(variant)
    names = {**Problem("fc2", 129, 4, 320, 256, "nvfp4", "bf16").names(), "sm_count": 148}
    for splits in (1, 2, 4):
        bound = recipe.bind({**names, "splits": splits})
        sizes = [evaluate(each.nbytes, bound) for each in recipe.workspaces]
        # 2 row tiles x 2 column tiles of 128 x 256 float32 a split; a ticket for each half of a tile
        assert sizes == ([0, 0] if splits == 1 else [2 * 2 * 128 * 256 * 4 * splits, 2 * 2 * 2 * 4])
    assert [each.zeroed for each in recipe.workspaces] == [False, True]
    with pytest.raises(RecipeError, match=r"setting splits=3: use one of 1, 2, 4"):
        recipe.bind({**names, "splits": 3})


def test_settings_survive_the_manifest_s_spelling() -> None:
    for variant in GEOMETRIES.values():
        recipe = module_of(variant).recipe(variant)
        recipe.check()
        assert Recipe.from_json(recipe.to_json()) == recipe


def _faulty(recipe: Recipe, fault: str) -> Recipe:
    parameters = list(recipe.parameters)
    spec = parameters[1].tensor_map
    assert spec is not None
    changes: dict[str, TensorMapSpec] = {
        "box": dataclasses.replace(spec, box=(128, 64)),
        "sizes": dataclasses.replace(spec, sizes=(spec.sizes[0], "M")),
        "strides": dataclasses.replace(spec, strides=("K",)),
        "swizzle": dataclasses.replace(spec, swizzle="64B"),
        "promotion": dataclasses.replace(spec, l2_promotion="none"),
        "type": dataclasses.replace(spec, dtype="u16"),
    }
    value = "a.codes" if fault == "address" else parameters[1].value
    parameters[1] = dataclasses.replace(parameters[1], value=value, tensor_map=changes.get(fault, spec))
    return dataclasses.replace(recipe, parameters=tuple(parameters))


@needs_cc
def test_the_oracle_sees_each_fault_of_a_tensor_map() -> None:
    variant = SHIPPED["fc2.sm100f.t128x128.c1x1.nvfp4-bf16"].variant
    module = module_of(variant)
    recipe = module.recipe(variant)
    problem = oracle.shapes(variant)[1]
    names = {**problem.names(), "sm_count": 148, "splits": 2, "prefetch": 3, "early_list": 0}
    where = oracle.addresses(recipe, problem)
    with oracle.observe(variant, "sm100_fc2") as run:
        observed = run(module.oracle_arguments(variant, names, where), recipe, 148)
    assert oracle.differences(recipe, pack(recipe, names, where, oracle.recorded_tensor_map), observed) == []
    for fault in ("box", "sizes", "strides", "swizzle", "promotion", "type", "address"):
        packed = pack(_faulty(recipe, fault), names, where, oracle.recorded_tensor_map)
        found = oracle.differences(recipe, packed, observed)
        assert len(found) == 1, fault
        assert found[0].startswith("parameter map_b:"), fault


# ---- rules: contract section 8, and what of section 10 they settle

FC1 = "fc1.sm100f.t128x256.c1x4.nvfp4-nvfp4"
FC2 = "fc2.sm100f.t128x128.c1x2.nvfp4-bf16"


def fc1(**fields: object) -> Problem:
    return Problem("fc1", **{"m": 8, "experts": 2, "hidden": 512, "intermediate": 256, "a_dtype": "nvfp4", "c_dtype": "nvfp4", **fields})  # type: ignore[arg-type]


def fc2(**fields: object) -> Problem:
    return Problem("fc2", **{"m": 8, "experts": 2, "hidden": 512, "intermediate": 256, "a_dtype": "nvfp4", "c_dtype": "bf16", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "problem", "reason"),
    [
        (FC1, fc1(), ""),
        (FC1, fc1(m=0), ""),
        (FC1, fc1(hidden=64), ""),
        (FC1, fc1(intermediate=1408), ""),  # 11 tiles in clusters of 4: padded, not refused
        (FC1, fc1(alpha_post=True, active_list=True), ""),
        (FC1, fc1(intermediate=64), r"2I = 128 is not a multiple of its tile_n 256"),
        (FC1, fc1(c_dtype="bf16"), r"it writes nvfp4, the problem wants bf16"),
        (FC1, fc1(a_dtype="bf16"), r"it reads nvfp4 activations, the problem has bf16"),
        (FC1, fc2(), r"it is an fc1 kernel"),
        (FC2, fc2(), ""),
        (FC2, fc2(hidden=64, scalar_alpha=True), ""),
        (FC2, fc2(intermediate=192), r"I = 192 on this rank is not a multiple of its K tile 256"),
        (FC2, fc2(intermediate=1408), r"I = 1408 on this rank"),
    ],
)
def test_a_variant_runs_what_the_contract_says(key: str, problem: Problem, reason: str) -> None:
    accepted, why = can_implement(Variant.parse(key), problem)
    assert accepted == (not reason), why
    assert reason in why


def test_the_rank_s_own_i_is_checked_not_the_model_s() -> None:
    """I = 2048 over 16 ranks is 128 on each: a multiple of 256 in the model and not on the rank."""
    assert can_implement(Variant.parse(FC2), fc2(intermediate=2048))[0]
    assert not can_implement(Variant.parse(FC2), fc2(intermediate=2048 // 16))[0]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("fc1.sm100f.t128x64.c1x1.nvfp4-nvfp4", "FC1 needs at least 128"),
        ("fc1.sm100f.t128x128.c2x1.nvfp4-nvfp4", "even exactly for pairs"),
        ("fc1.sm100f.t256x128.c1x2.nvfp4-nvfp4", "even exactly for pairs"),
        ("fc1.sm100f.t128x128.c1x3.nvfp4-nvfp4", "use 1, 2 or 4"),
        ("fc1.sm100f.t128x128.c1x8.nvfp4-nvfp4", "use 1, 2 or 4"),
        ("fc1.sm100f.t128x128.c1x1.bf16-nvfp4", "nvfp4 activations"),
    ],
)
def test_what_no_problem_makes_legal_is_refused(key: str, said: str) -> None:
    with pytest.raises(VariantError, match=said):
        check_legal(Variant.parse(key))


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("fc1.sm100f.t128x192.c1x1.nvfp4-nvfp4", "has 128x128, 128x256, 256x128, 256x256"),
        ("fc2.sm100f.t64x128.c1x1.nvfp4-bf16", "tile 64x128"),
        ("fc2.sm100f.t128x128.c1x1.nvfp4-bf16.splitk2", "this kernel has none"),
    ],
)
def test_a_kernel_says_which_tiles_it_has(key: str, said: str) -> None:
    variant = Variant.parse(key)
    with pytest.raises(VariantError, match=said):
        kernels.check(f"sm100_{variant.op}", variant)


@pytest.mark.parametrize("key", ["fc1.sm100f.t256x128.c4x4.nvfp4-bf16", "fc2.sm100f.t256x256.c2x2.nvfp4-f32"])
def test_legal_clusters_that_are_not_shipped_build_too(key: str) -> None:
    """Contract section 8: the legal set is wider than what ships, and YAML alone may add any of it."""
    variant = Variant.parse(key)
    check_legal(variant)
    compiled = toolchain.compile_variant(variant, f"sm100_{variant.op}")
    audit.audit(variant, module_of(variant), compiled)


def section_8(variant: Variant, problem: Problem) -> bool:
    """Contract section 8, written a second time: what a legal tcgen05 variant runs."""
    if (variant.op, variant.a_dtype, variant.c_dtype) != (problem.op, problem.a_dtype, problem.c_dtype):
        return False
    if problem.op == "fc1":
        return 2 * problem.intermediate % variant.tile_n == 0
    return problem.intermediate % 256 == 0


def legal_variant(op: str, tile_m: int, tile_n: int, cluster_m: int, cluster_n: int) -> bool:
    """Contract section 8, written a second time: tiles and clusters."""
    powers = cluster_m in (1, 2, 4) and cluster_n in (1, 2, 4) and cluster_m * cluster_n <= 16
    pairs = cluster_m % 2 == 0 if tile_m == 256 else cluster_m == 1
    return powers and pairs and (op == "fc2" or tile_n >= 128)


def test_the_legal_set_is_section_8_s() -> None:
    count = 0
    for op, tile_m, tile_n, cluster_m, cluster_n in itertools.product(("fc1", "fc2"), (128, 256), (64, 128, 256), range(1, 9), range(1, 9)):
        variant = Variant.make(
            op=op, arch="sm_100f", tile_m=tile_m, tile_n=tile_n, cluster_m=cluster_m, cluster_n=cluster_n, a_dtype="nvfp4", c_dtype="bf16"
        )
        legal = legal_variant(op, tile_m, tile_n, cluster_m, cluster_n)
        if legal:
            check_legal(variant)
            kernels.check(f"sm100_{op}", variant)
        else:
            with pytest.raises(VariantError):
                check_legal(variant)
        count += legal
    assert count == 2 * 3 + 2 * 6 + 3 * 3 + 3 * 6  # fc1, fc2: widths x clusters of single tiles, of pairs


def test_can_implement_says_exactly_section_8() -> None:
    """Over random legal variants, shipped or not, and random problems; a refusal has a reason."""
    rng = np.random.default_rng(8)
    legal = [
        (op, m, n, cm, cn)
        for op, m, n, cm, cn in itertools.product(("fc1", "fc2"), (128, 256), (64, 128, 256), (1, 2, 4), (1, 2, 4))
        if legal_variant(op, m, n, cm, cn)
    ]
    outputs = {"fc1": ("nvfp4", "bf16", "f16", "f32", "e4m3", "e5m2"), "fc2": ("bf16", "f16", "f32")}
    accepted = 0
    for _ in range(4000):
        op, m, n, cm, cn = legal[rng.integers(len(legal))]
        variant = Variant.make(
            op=op, arch="sm_100f", tile_m=m, tile_n=n, cluster_m=cm, cluster_n=cn, a_dtype="nvfp4", c_dtype=str(rng.choice(outputs[op]))
        )
        other = str(rng.choice(["fc1", "fc2"])) if rng.random() < 0.1 else op
        problem = Problem(
            other,
            int(rng.choice([0, 1, 8, 127, 128, 129, 300, 100_000])),
            int(rng.choice([1, 2, 7, 256, 384])),
            64 * int(rng.integers(1, 200)),
            64 * int(rng.integers(1, 600)),
            str(rng.choice(["nvfp4", "nvfp4", "nvfp4", "bf16"])),
            variant.c_dtype if rng.random() < 0.8 and variant.c_dtype in outputs[other] else str(rng.choice(outputs[other])),
        )
        found, reason = can_implement(variant, problem)
        assert found == section_8(variant, problem), (variant.key, problem, reason)
        assert found == (not reason)
        accepted += found
    assert 500 < accepted < 3500


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hidden": 96}, "hidden=96: use a multiple of 64"),
        ({"intermediate": 100}, "intermediate=100: use a multiple of 64"),
        ({"m": 2**31}, "use an integer from 0"),
        ({"experts": 0}, "experts=0"),
        ({"experts": 2**20, "intermediate": 2**11}, r"dimensions of 2\*\*31 or more are refused"),
        ({"c_dtype": "int8"}, "c_dtype='int8' for fc1: use one of nvfp4"),
        ({"a_dtype": "mxfp8"}, "a_dtype='mxfp8' for fc1: use one of"),
        ({"c_dtype": ""}, "c_dtype=''"),
    ],
)
def test_a_problem_that_breaks_section_8_is_none(fields: dict[str, object], said: str) -> None:
    """An unknown dtype raises; it never falls back to another."""
    with pytest.raises(ProblemError, match=said):
        fc1(**fields)


@pytest.mark.parametrize("experts", [1, 2, 64, 256])
def test_alpha_post_has_a_row_a_token_and_a_column_an_expert(experts: int) -> None:
    problem = fc1(m=200, experts=experts, alpha_post=True)
    assert problem.tensors()["alpha_post"].shape == (200, experts)
    assert fc2(m=200, experts=experts).tensors()["alpha"].shape == (200, experts)
    assert fc2(m=200, experts=experts, active_list=True).tensors()["active_experts"].shape == (1 + experts,)
