"""Beyond the shipped shapes: every legal cluster, byte offsets past 2**32, random problems against random variants."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import emulated

from densemoe.compile import matrix
from densemoe.runtime import bounds, data, reference
from densemoe.runtime.layout import scale_offsets, weight_shapes
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement

SHIPPED = [each.variant for each in matrix.load().profile("full") if each.variant.arch == "sm_100f" and each.variant.op in ("fc1", "fc2")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("schedule", ["eager", "random:1"])
@pytest.mark.parametrize("shape", ["t256x128.c2x2", "t256x256.c2x4", "t256x128.c4x1", "t256x256.c4x2", "t256x128.c4x4"])
def test_fc1_in_legal_clusters_that_are_not_shipped(shape: str, schedule: str) -> None:
    key = f"fc1.sm100f.{shape}.nvfp4-nvfp4"
    emulated.fc1(key, 300, 3, 320, 128, kind="exact", post=True, zeros=0.2, sm_count=16, schedule=schedule).check()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("schedule", ["eager", "random:1"])
@pytest.mark.parametrize("shape", ["t256x64.c2x1", "t256x128.c2x2", "t256x256.c2x1", "t256x256.c4x1", "t256x64.c4x4"])
def test_fc2_in_legal_tiles_and_clusters_that_are_not_shipped(shape: str, schedule: str) -> None:
    key = f"fc2.sm100f.{shape}.nvfp4-bf16"
    emulated.fc2(key, 300, 3, 192, 512, kind="exact", zeros=0.2, sm_count=16, schedule=schedule, splits=2).check()


def _one_expert(
    op: str, experts: int, hidden: int, intermediate: int, expert: int
) -> tuple[dict[str, np.ndarray], reference.Weights, data.Weights]:
    """Weights that are zero but for one expert's, their lookup by expert 0, and these weights alone. Zero pages of the host take no memory."""
    alone = data.fc1_weights if op == "fc1" else data.fc2_weights
    small = alone(np.random.default_rng(3), 1, hidden, intermediate, "exact")
    whole = {role: np.zeros(shape, dtype=np.uint8) for role, shape in weight_shapes(op, experts, hidden, intermediate).items()}
    if op == "fc1":
        rows = 2 * intermediate
        whole["b.codes"][expert] = small.codes[0]
        whole["b.scales"][expert * rows : (expert + 1) * rows] = small.scales
    else:
        whole["b.codes"][:, expert * intermediate // 2 : (expert + 1) * intermediate // 2] = small.codes
        columns = experts * intermediate // 16
        own = np.arange(intermediate // 16)
        at = scale_offsets(np.arange(hidden)[:, None], (own + expert * intermediate // 16)[None, :], columns)
        whole["b.scales"].reshape(-1)[at] = small.scales.reshape(-1)[scale_offsets(np.arange(hidden)[:, None], own[None, :], len(own))]
    return whole, reference.Weights(op, small.codes, small.scales, 1), small


def test_fc1_weights_past_four_gigabytes() -> None:
    """2,600 experts of 256 x 14,336 weights: codes of 4.8 GB. The last expert's lie past 2**32."""
    key, experts, hidden, intermediate, m = "fc1.sm100f.t128x256.c1x1.nvfp4-f32", 2600, 14336, 128, 3
    problem = Problem("fc1", m, experts, hidden, intermediate, "nvfp4", "f32", active_list=True)
    whole, lookup, alone = _one_expert("fc1", experts, hidden, intermediate, experts - 1)
    assert whole["b.codes"].nbytes > 2**32
    codes, scales, a_scale = data.activations(np.random.default_rng(4), m, hidden, "nvfp4", "exact")
    alpha = np.zeros(experts, dtype=np.float32)
    alpha[-1] = alone.global_scales[0] * a_scale
    tensors = {"a.codes": codes, "a.scales": scales, **whole, "alpha": alpha, "c": np.zeros((m, experts * intermediate), dtype=np.float32)}
    tensors["active_experts"] = emulated.active_list([experts - 1], experts)
    emulated.launch(key, problem, tensors)
    exact = reference.fc1(reference.activation_values(codes, scales), lookup, alpha[-1:].astype(np.float64), [0])
    one = Problem("fc1", m, 1, hidden, intermediate, "nvfp4", "f32")
    report = bounds.compare_fc1({"c": np.ascontiguousarray(tensors["c"][:, -intermediate:])}, exact, one, exact=True)
    assert report.passed, report.text


@pytest.mark.full
def test_fc1_output_past_four_gigabytes() -> None:
    """8,192 experts of 64 columns in float32 and 2,100 tokens: an output of 4.4 GB, of which the last tokens' last columns are judged."""
    key, experts, hidden, intermediate, m = "fc1.sm100f.t128x128.c1x1.nvfp4-f32", 8192, 64, 64, 2100
    problem = Problem("fc1", m, experts, hidden, intermediate, "nvfp4", "f32", alpha_post=True, active_list=True)
    whole, lookup, alone = _one_expert("fc1", experts, hidden, intermediate, experts - 1)
    codes, scales, a_scale = data.activations(np.random.default_rng(4), m, hidden, "nvfp4", "exact")
    alpha = np.full(experts, alone.global_scales[0] * a_scale, dtype=np.float32)
    tensors = {"a.codes": codes, "a.scales": scales, **whole, "alpha": alpha, "alpha_post": np.full((m, experts), 0.5, dtype=np.float32)}
    tensors["c"] = np.zeros((m, experts * intermediate), dtype=np.float32)
    assert tensors["c"].nbytes > 2**32
    tensors["active_experts"] = emulated.active_list([experts - 1], experts)
    emulated.launch(key, problem, tensors)
    posts = np.full((m, 1), 0.5)
    exact = reference.fc1(reference.activation_values(codes, scales), lookup, alpha[-1:].astype(np.float64), [0], posts)
    one = Problem("fc1", m, 1, hidden, intermediate, "nvfp4", "f32", alpha_post=True)
    report = bounds.compare_fc1({"c": np.ascontiguousarray(tensors["c"][:, -intermediate:])}, exact, one, exact=True)
    assert report.passed, report.text
    assert not tensors["c"][-1, : -intermediate].any()


def test_fc2_operands_past_four_gigabytes() -> None:
    """K = 2**27: 64 weight rows and 65 tokens of 64 MB each. The last expert's weights and the last token's activations lie past 2**32."""
    key, experts, hidden, intermediate, m = "fc2.sm100f.t128x64.c1x1.nvfp4-f32", 2**19, 64, 256, 65
    problem = Problem("fc2", m, experts, hidden, intermediate, "nvfp4", "f32", active_list=True)
    whole, lookup, _ = _one_expert("fc2", experts, hidden, intermediate, experts - 1)
    codes, scales, _ = data.activations(np.random.default_rng(4), m, intermediate, "nvfp4", "exact")
    specs = problem.tensors()
    tensors = {role: np.zeros(specs[role].shape, dtype=np.uint8) for role in ("a.codes", "a.scales")}
    tensors["a.codes"][:, -intermediate // 2 :] = codes
    own, columns = np.arange(intermediate // 16), experts * intermediate // 16
    at = scale_offsets(np.arange(m)[:, None], (own + columns - len(own))[None, :], columns)
    tensors["a.scales"].reshape(-1)[at] = scales.reshape(-1)[scale_offsets(np.arange(m)[:, None], own[None, :], len(own))]
    assert min(tensors["a.codes"].nbytes, whole["b.codes"].nbytes) >= 2**32
    tensors.update(whole)
    tensors["alpha"] = np.zeros((m, experts), dtype=np.float32)
    tensors["alpha"][:, -1] = 2
    tensors["c"] = np.zeros((m, hidden), dtype=np.float32)
    tensors["active_experts"] = emulated.active_list([experts - 1], experts)
    emulated.launch(key, problem, tensors)
    exact = reference.fc2(reference.activation_values(codes, scales), lookup, np.full((m, 1), 2.0), 1, intermediate)
    report = bounds.compare_fc2({"c": tensors["c"]}, exact, Problem("fc2", m, 1, hidden, intermediate, "nvfp4", "f32"), exact=True)
    assert report.passed, report.text


def random_pairs(count: int, seed: int) -> list[tuple[str, dict[str, object]]]:
    """Random shipped variants with random problems, legal and not."""
    rng = np.random.default_rng(seed)
    found: list[tuple[str, dict[str, object]]] = []
    for _ in range(count):
        variant = SHIPPED[int(rng.integers(len(SHIPPED)))]
        experts = int(rng.choice([1, 2, 3, 5, 7]))
        active = sorted(rng.choice(experts, int(rng.integers(0, experts + 1)), replace=False).tolist()) if rng.random() < 0.3 else None
        case: dict[str, object] = {
            "m": int(rng.choice([1, 7, 8, 9, 64, 127, 128, 129, 200, 256, 257, 300])),
            "experts": experts,
            "hidden": 64 * int(rng.integers(1, 10)),
            "intermediate": 64 * int(rng.choice([1, 2, 3, 4, 8])),
            "kind": str(rng.choice(["exact", "integers", "normal", "raw"])),
            "active": active,
            "seed": int(rng.integers(2**31)),
            "schedule": f"random:{int(rng.integers(1000))}",
            "prefetch": int(rng.choice([0, 3])),
        }
        if variant.op == "fc1":
            case.update(post=bool(rng.integers(2)), zeros=0.1)
        else:
            case.update(scalar=bool(active is None and rng.integers(2)), splits=int(rng.choice([1, 2, 4])), zeros=0.1)
        found.append((variant.key, case))
    return found


def _run(key: str, case: dict[str, object]) -> bool:
    """Whether the variant takes the problem; where it does, that it runs clean and right."""
    variant = next(each for each in SHIPPED if each.key == key)
    shape = {name: case[name] for name in ("m", "experts", "hidden", "intermediate")}
    switches = {"alpha_post": bool(case.get("post")), "scalar_alpha": bool(case.get("scalar")), "active_list": case["active"] is not None}
    problem = Problem(variant.op, *shape.values(), a_dtype="nvfp4", c_dtype=variant.c_dtype, **switches)  # type: ignore[arg-type]
    if not can_implement(variant, problem)[0]:
        return False
    outcome = (emulated.fc1 if variant.op == "fc1" else emulated.fc2)(key, **case)  # type: ignore[arg-type]
    if case["active"] != [] or variant.op == "fc2":
        outcome.check()
    return True


def _check_pairs(count: int, seed: int) -> None:
    taken = 0
    for key, case in random_pairs(count, seed):
        try:
            taken += _run(key, case)
        except Exception as error:
            raise AssertionError(f"{key} {case}: {error}") from error
    assert count // 4 < taken <= count


def test_what_the_rules_accept_runs_clean_and_right() -> None:
    _check_pairs(24, 2026)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_what_the_rules_accept_runs_clean_and_right_at_length(seed: int) -> None:
    _check_pairs(100, seed)
