"""The reference and the bounds on torch tensors equal those on numpy arrays: the GPU tests rely on it (run here on the CPU)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from densemoe.runtime import arrays, bounds, data, marks, reference
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import pack_codes, quantise_rows
from densemoe.runtime.problem import Problem


def lift(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def close(theirs: Any, ours: np.ndarray) -> None:
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-12, atol=1e-12 * max(1e-300, np.nanmax(np.abs(ours), initial=0)))


def fc1_both(m: int = 20) -> tuple[reference.Fc1Result, reference.Fc1Result]:
    rng = np.random.default_rng(0)
    weights = data.fc1_weights(rng, 2, 192, 64, "normal")
    codes, scales, a_scale = data.activations(rng, m, 192, "nvfp4", "normal")
    alpha = data.fc1_alpha(weights, a_scale).astype(np.float64)
    post = data.alpha_post(rng, m, 2, zeros=0.2).astype(np.float64)
    ours = reference.fc1(
        reference.activation_values(codes, scales), reference.Weights("fc1", weights.codes, weights.scales, 2), alpha, range(2), post
    )
    theirs = reference.fc1(
        reference.activation_values(lift(codes), lift(scales)),
        reference.Weights("fc1", lift(weights.codes), lift(weights.scales), 2),
        lift(alpha),
        range(2),
        lift(post),
    )
    return ours, theirs


def as_torch(result: reference.Fc1Result) -> reference.Fc1Result:
    return reference.Fc1Result(*(lift(getattr(result, name)) for name in ("y", "up", "gate", "up_magnitude", "gate_magnitude", "post")))


def test_fc1_and_its_bound() -> None:
    ours, theirs = fc1_both()
    for name in ("y", "up", "gate", "up_magnitude", "gate_magnitude", "post"):
        close(getattr(theirs, name), getattr(ours, name))
    close(bounds.fc1_bound(theirs, 192), bounds.fc1_bound(ours, 192))


def test_a_sample_of_fc1() -> None:
    rng = np.random.default_rng(1)
    weights = data.fc1_weights(rng, 2, 64, 128)
    a = rng.standard_normal((9, 64))
    columns = reference.fc1_columns([0, 65, 130, 255], 128)
    ours = reference.fc1(a, reference.Weights("fc1", weights.codes, weights.scales, 2), np.ones(2), columns, rows=[1, 8])
    theirs = reference.fc1(
        lift(a), reference.Weights("fc1", lift(weights.codes), lift(weights.scales), 2), lift(np.ones(2)), columns, rows=[1, 8]
    )
    close(theirs.y, ours.y)


@pytest.mark.parametrize("scalar", [False, True])
def test_fc2_and_its_bound(scalar: bool) -> None:
    rng = np.random.default_rng(2)
    weights = data.fc2_weights(rng, 3, 128, 64)
    codes, scales, a_scale = data.activations(rng, 130, 192, "nvfp4")
    alpha = data.fc2_alpha(rng, 130, weights, a_scale, scalar=scalar, zeros=0.3).astype(np.float64)
    ours = reference.fc2(
        reference.activation_values(codes, scales), reference.Weights("fc2", weights.codes, weights.scales, 3), alpha, 3, 64, columns=[0, 9, 127]
    )
    theirs = reference.fc2(
        reference.activation_values(lift(codes), lift(scales)),
        reference.Weights("fc2", lift(weights.codes), lift(weights.scales), 3),
        lift(alpha),
        3,
        64,
        columns=[0, 9, 127],
    )
    close(theirs.c, ours.c)
    close(theirs.magnitude, ours.magnitude)
    close(theirs.active, ours.active)
    close(bounds.fc2_bound(theirs, 3, 64), bounds.fc2_bound(ours, 3, 64))


def same_report(theirs: bounds.Report, ours: bounds.Report) -> None:
    assert (theirs.elements, theirs.mismatches, theirs.exemptions, theirs.unspecified, theirs.nbytes, theirs.name) == (
        ours.elements,
        ours.mismatches,
        ours.exemptions,
        ours.unspecified,
        ours.nbytes,
        ours.name,
    )
    assert theirs.worst == pytest.approx(ours.worst, rel=1e-9)
    assert theirs.detail == ours.detail
    assert len(theirs.parts) == len(ours.parts)
    for their_part, our_part in zip(theirs.parts, ours.parts, strict=True):
        same_report(their_part, our_part)


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32", "e4m3", "e5m2"])
def test_plain_outputs_are_judged_alike(dtype: str) -> None:
    rng = np.random.default_rng(3)
    exact = rng.standard_normal((30, 40)) * 2.0 ** rng.integers(-140, 120, (30, 40))
    exact[0, :3] = [np.nan, np.inf, 0.0]
    bound = np.abs(exact) * 1e-3
    actual = exact * (1 + rng.uniform(-3e-3, 3e-3, exact.shape))
    same_report(
        bounds.compare_plain(lift(actual), lift(exact), lift(bound), dtype), bounds.compare_plain(actual, exact, bound, dtype)
    )


def test_half_ulps_are_exact_down_to_the_subnormals() -> None:
    magnitudes = np.concatenate([[0.0], 2.0 ** np.arange(-160.0, 128.0), 1.7 * 2.0 ** np.arange(-160.0, 128.0)])
    for dtype in ("bf16", "f16", "f32", "e4m3", "e5m2"):
        np.testing.assert_array_equal(bounds.half_ulp(lift(magnitudes), dtype).numpy(), bounds.half_ulp(magnitudes, dtype))


@pytest.mark.parametrize("faults", [0, 30])
def test_nvfp4_outputs_are_judged_alike(faults: int) -> None:
    ours, _ = fc1_both(150)
    problem = Problem("fc1", 150, 2, 192, 64, "nvfp4", "nvfp4", alpha_post=True)
    multiplier = np.float32(2688 / np.abs(ours.y).max())
    codes, scales = quantise_rows(ours.y.astype(np.float32), multiplier)
    rng = np.random.default_rng(4)
    for _ in range(faults):
        codes[rng.integers(150), rng.integers(128)] ^= 1 << rng.integers(4)
        scales[rng.integers(150), rng.integers(8)] ^= 1 << rng.integers(8)
    actual = {"c.codes": pack_codes(codes), "c.scales": tile_scales(scales)}
    our_report = bounds.compare_fc1(actual, ours, problem, output_multiplier=float(multiplier))
    their_report = bounds.compare_fc1({k: lift(v) for k, v in actual.items()}, as_torch(ours), problem, output_multiplier=float(multiplier))
    same_report(their_report, our_report)
    assert our_report.passed == (faults == 0)


def test_exact_comparison_takes_torch_outputs() -> None:
    rng = np.random.default_rng(5)
    weights = data.fc1_weights(rng, 1, 64, 64, "exact")
    codes, scales, a_scale = data.activations(rng, 3, 64, "nvfp4", "exact")
    result = reference.fc1(
        reference.activation_values(lift(codes), lift(scales)),
        reference.Weights("fc1", lift(weights.codes), lift(weights.scales), 1),
        lift(data.fc1_alpha(weights, a_scale).astype(np.float64)),
        [0],
    )
    y = result.up.float() * result.gate.float()
    for dtype, kind in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        problem = Problem("fc1", 3, 1, 64, 64, "nvfp4", dtype)
        assert bounds.compare_fc1({"c": y.to(kind)}, result, problem, exact=True).worst == 0
    off = torch.nextafter(y, torch.full_like(y, torch.inf))
    assert bounds.compare_fc1({"c": off}, result, Problem("fc1", 3, 1, 64, 64, "nvfp4", "f32"), exact=True).mismatches == 3 * 64


def test_the_layer_and_its_mark() -> None:
    rng = np.random.default_rng(6)
    up, gate = rng.standard_normal((2, 3, 6, 8))
    down, x = rng.standard_normal((3, 8, 6)), rng.standard_normal((4, 8))
    ids, router = np.array([[0, 1], [2, 0], [1, 1], [2, 1]]), rng.random((4, 2)).astype(np.float32)
    ours = reference.layer(x, lambda e: (up[e], gate[e], down[e]), ids, router)
    theirs = reference.layer(lift(x), lambda e: (lift(up[e]), lift(gate[e]), lift(down[e])), ids, router)
    close(theirs, ours)
    same_report(marks.layer_mark(theirs + 0.2, theirs), marks.layer_mark(ours + 0.2, ours))


def test_scale_bytes_untile_alike() -> None:
    tiled = tile_scales(np.random.default_rng(7).integers(0, 256, (200, 12), dtype=np.uint8))
    np.testing.assert_array_equal(arrays.untile(lift(tiled), 200).numpy(), arrays.untile(tiled, 200))
