"""FC1 and FC2 on a GPU against the float64 reference, by the contract's bounds: the grids of section 9, ragged shapes, exact and extreme data."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.capability(9)]

if not os.environ.get("DENSEMOE_NO_TORCH"):
    torch = pytest.importorskip("torch")

from densemoe.runtime import bounds, data  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402
from densemoe.runtime.problem import Problem  # noqa: E402

A_DTYPES = ("bf16", "nvfp4")
FC1_OUTPUTS = ("nvfp4", "bf16", "f16", "f32")
FC2_OUTPUTS = ("bf16", "f16", "f32")


@pytest.fixture(scope="module")
def loader() -> Loader:
    torch.cuda.init()
    torch.zeros(1, device="cuda")  # torch's primary context is current from here on
    return Loader()


def check(reports: list[bounds.Report], what: object) -> bounds.Report:
    for report in reports:
        assert report.passed, f"{what}: {report}"
    record(what, reports)
    return reports[0]


def record(what: object, reports: list[bounds.Report]) -> None:
    """Adds a line to the file that DENSEMOE_TEST_RECORD names: the README's table is made of it."""
    path = os.environ.get("DENSEMOE_TEST_RECORD")
    if path:
        worst = max(report.worst for report in reports)
        exempt = sum(report.exemptions + sum(part.exemptions for part in report.parts) for report in reports)
        bytes_ = sum(report.elements + sum(part.elements for part in report.parts) for report in reports)
        with Path(path).open("a") as file:
            file.write(f"{what}\t{worst:.4f}\t{exempt}\t{bytes_}\n")


def _fc1_weights() -> Iterator[tuple[int, int]]:
    return itertools.product((256, 512, 1024, 2816), (256, 512, 2048))


@pytest.mark.parametrize(("rows", "hidden"), list(_fc1_weights()))
def test_fc1_grid(loader: Loader, rows: int, hidden: int) -> None:
    """384 cases of section 9, each in both activation dtypes with NVFP4 output, and one plain output dtype each in turn."""
    import harness

    weights = harness.Weights("fc1", 32, hidden, rows // 2, "integers", seed=rows + hidden)
    plain = itertools.cycle(FC1_OUTPUTS[1:])
    cases = 0
    for experts, m, post in itertools.product((1, 4, 8, 32), (1, 8, 127, 256), (True, False)):
        part = weights.prefix(experts)
        for a_dtype, c_dtype in ((a, c) for a in A_DTYPES for c in ("nvfp4", next(plain))):
            reports = harness.run_fc1(loader, part, m, a_dtype, c_dtype, post)
            check(reports, ("fc1-grid", experts, rows, m, hidden, post, a_dtype, c_dtype))
        cases += 1
    assert cases == 32


@pytest.mark.parametrize(("experts", "intermediate", "hidden"), list(itertools.product((1, 4, 8, 32, 256), (256, 512, 1024), (256, 512, 2048))))
def test_fc2_grid(loader: Loader, experts: int, intermediate: int, hidden: int) -> None:
    """180 cases of section 9, each in both activation dtypes, the output dtype in turn, alpha per token and expert."""
    import harness

    weights = harness.Weights("fc2", experts, hidden, intermediate, "integers", seed=experts + intermediate + hidden)
    outputs = itertools.cycle(FC2_OUTPUTS)
    for m, a_dtype in itertools.product((1, 8, 127, 256), A_DTYPES):
        reports = harness.run_fc2(loader, weights, m, a_dtype, next(outputs), scalar=False)
        check(reports, ("fc2-grid", experts, intermediate, m, hidden, a_dtype))
    harness.collect()


def _random_shapes(count: int, seed: int) -> list[tuple[int, int, int, int]]:
    rng = np.random.default_rng(seed)
    return [
        (int(rng.integers(1, 601)), int(rng.choice([1, 3, 5, 7, 13])), int(64 * rng.integers(1, 12)), int(64 * rng.integers(1, 12)))
        for _ in range(count)
    ]


@pytest.mark.parametrize(("m", "experts", "hidden", "intermediate"), _random_shapes(24, 3))
def test_ragged_shapes(loader: Loader, m: int, experts: int, hidden: int, intermediate: int) -> None:
    """Odd E, H and I that are multiples of 64 only, any M; every tile of every dtype is forced once."""
    import harness

    fc1 = harness.Weights("fc1", experts, hidden, intermediate, "normal", seed=m)
    fc2 = harness.Weights("fc2", experts, hidden, intermediate, "normal", seed=m)
    tiles = itertools.cycle((8, 16, 32))
    for a_dtype, c_dtype in itertools.product(A_DTYPES, FC1_OUTPUTS):
        key = f"fc1.sm90a.t{next(tiles)}x64.c1x1.{a_dtype}-{c_dtype}"
        check(harness.run_fc1(loader, fc1, m, a_dtype, c_dtype, m % 2 == 0, kind="normal", variant=key), ("fc1-ragged", key, m))
    for tile in (8, 16, 32):
        key = f"fc1.sm90a.t{tile}x64.c1x1.bf16-nvfp4.rounded"
        reports = harness.run_fc1(loader, fc1, m, "bf16", "nvfp4", m % 2 == 0, kind="normal", variant=key, rounded=True)
        check(reports, ("fc1-ragged", key, m))
    for a_dtype, c_dtype in itertools.product(A_DTYPES, FC2_OUTPUTS):
        key = f"fc2.sm90a.t{next(tiles)}x64.c1x1.{a_dtype}-{c_dtype}"
        check(harness.run_fc2(loader, fc2, m, a_dtype, c_dtype, m % 3 == 0, kind="normal", variant=key), ("fc2-ragged", key, m))


@pytest.mark.parametrize("tile", [8, 16, 32])
@pytest.mark.parametrize("a_dtype", A_DTYPES)
@pytest.mark.parametrize(("m", "experts", "hidden", "intermediate"), [(1, 2, 256, 64), (37, 5, 320, 192), (129, 3, 1024, 256)])
def test_exact_data_is_exact(loader: Loader, tile: int, a_dtype: str, m: int, experts: int, hidden: int, intermediate: int) -> None:
    """Rule 1: bit for bit, whatever the order of additions; FC1's accumulators are seen through gates whose sigmoid is 1."""
    import harness

    fc1 = harness.Weights("fc1", experts, hidden, intermediate, "exact", seed=tile)
    fc2 = harness.Weights("fc2", experts, hidden, intermediate, "exact", seed=tile)
    for c_dtype in ("f32", "bf16"):
        key = f"fc1.sm90a.t{tile}x64.c1x1.{a_dtype}-{c_dtype}"
        check(harness.run_fc1(loader, fc1, m, a_dtype, c_dtype, True, kind="exact", variant=key), ("fc1-exact", key, m))
    for c_dtype, scalar in itertools.product(FC2_OUTPUTS, (False, True)):
        key = f"fc2.sm90a.t{tile}x64.c1x1.{a_dtype}-{c_dtype}"
        check(harness.run_fc2(loader, fc2, m, a_dtype, c_dtype, scalar, kind="exact", variant=key), ("fc2-exact", key, m))


@pytest.mark.parametrize("a_dtype", A_DTYPES)
def test_every_code_under_every_scale(loader: Loader, a_dtype: str) -> None:
    """Random codes under all e4m3 scales that weights may have: subnormal, largest and zero ones."""
    import harness

    fc1 = harness.Weights("fc1", 3, 256, 128, "raw", seed=1)
    fc2 = harness.Weights("fc2", 3, 256, 128, "raw", seed=2)
    for m in (3, 20, 40):
        check(harness.run_fc1(loader, fc1, m, a_dtype, "f32", False, kind="normal"), ("fc1-raw", a_dtype, m))
        check(harness.run_fc2(loader, fc2, m, a_dtype, "f32", False, kind="normal"), ("fc2-raw", a_dtype, m))


@pytest.mark.parametrize("m", [5, 12, 40])
def test_zero_alpha_post_selects_nan_away(loader: Loader, m: int) -> None:
    """A token with NaN activations and alpha_post 0 gives exactly 0 (section 3, step 4)."""
    import harness

    weights = harness.Weights("fc1", 3, 256, 128, "normal", seed=1)
    problem = Problem("fc1", m, 3, 256, 128, "bf16", "f32", alpha_post=True)
    a = torch.randn((m, 256), device="cuda").bfloat16()
    a[1] = float("nan")
    post = torch.ones((m, 3), device="cuda")
    post[1] = 0
    c = torch.full((m, 384), 7.0, device="cuda")
    with loader.plan(problem, {"a": a, "b": weights.packed, "alpha": torch.ones(3, device="cuda"), "alpha_post": post, "c": c}, 0) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    assert (c[1] == 0).all()
    assert torch.isfinite(c).all()


@pytest.mark.parametrize("m", [5, 12, 40])
def test_zero_alpha_selects_nan_away(loader: Loader, m: int) -> None:
    """FC2: NaN in the columns of an expert whose alpha is 0 for that token contributes exactly 0 (section 4)."""
    import harness

    weights = harness.Weights("fc2", 4, 256, 192, "normal", seed=1)
    problem = Problem("fc2", m, 4, 256, 192, "bf16", "f32")
    a = torch.randn((m, 4 * 192), device="cuda").bfloat16()
    alpha = torch.rand((m, 4), device="cuda") + 0.5
    clean = torch.empty((m, 256), device="cuda")
    c = torch.empty_like(clean)
    alpha[2, 1] = 0
    a[2, 192:384] = 0
    tensors: dict[str, Any] = {"b": weights.packed, "alpha": alpha}
    with loader.plan(problem, {**tensors, "a": a, "c": clean}, 0) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    dirty = a.clone()
    dirty[2, 192:384] = float("nan")
    with loader.plan(problem, {**tensors, "a": dirty, "c": c}, 0) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    assert torch.isfinite(c).all()
    from densemoe.runtime import reference

    # the order of float32 additions differs between launches: both are held to the contract's bound
    exact = reference.fc2(torch.nan_to_num(a).double(), weights.expert, alpha.double(), 4, 192)
    for output in (clean, c):
        check([bounds.compare_plain(output.double(), exact.c, bounds.fc2_bound(exact, 4, 192), "f32")], ("fc2-nan", m))


def test_nan_stays_in_its_row(loader: Loader) -> None:
    """NaN activations reach their own token only (section 2)."""
    import harness

    fc1 = harness.Weights("fc1", 2, 256, 128, "normal", seed=1)
    a = torch.randn((9, 256), device="cuda").bfloat16()
    a[4, 17] = float("nan")
    c = torch.empty((9, 256), device="cuda")
    problem = Problem("fc1", 9, 2, 256, 128, "bf16", "f32")
    with loader.plan(problem, {"a": a, "b": fc1.packed, "alpha": torch.ones(2, device="cuda"), "c": c}, 0) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    assert torch.isnan(c[4]).all()
    assert torch.isfinite(c[torch.arange(9) != 4]).all()


def test_m_zero_launches_nothing(loader: Loader) -> None:
    problem = Problem("fc1", 0, 2, 256, 128)
    empty = torch.empty((0,), dtype=torch.bfloat16, device="cuda")
    tensors = {"a": empty.reshape(0, 256), "c": empty.reshape(0, 256), "alpha": torch.ones(2, device="cuda")}
    packed = torch.zeros(2 * 4 * 2 * 4608, dtype=torch.uint8, device="cuda")
    with loader.plan(problem, {**tensors, "b": packed}, 0) as plan:
        plan.launch()


def test_a_plan_replays_in_a_cuda_graph(loader: Loader) -> None:
    """Replays with changed inputs give what a launch gives, workspaces included."""
    import harness

    from densemoe.runtime import reference

    weights = harness.Weights("fc2", 8, 512, 256, "normal", seed=1)
    problem = Problem("fc2", 16, 8, 512, 256, "bf16", "f32")
    a = torch.randn((16, 2048), device="cuda").bfloat16()
    alpha, c = torch.rand((16, 8), device="cuda"), torch.empty((16, 512), device="cuda")
    with loader.plan(problem, {"a": a, "b": weights.packed, "alpha": alpha, "c": c}, 0) as plan:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            plan.launch(stream.cuda_stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.launch(torch.cuda.current_stream().cuda_stream)
        for _ in range(3):
            a.copy_(torch.randn_like(a))
            graph.replay()
            torch.cuda.synchronize()
            replayed = c.clone()
            plan.launch(torch.cuda.current_stream().cuda_stream)
            torch.cuda.synchronize()
            exact = reference.fc2(a.double(), weights.expert, alpha.double(), 8, 256)
            for output in (replayed, c):
                check([bounds.compare_plain(output.double(), exact.c, bounds.fc2_bound(exact, 8, 256), "f32")], "fc2-graph")


def test_weights_beyond_4_gib(loader: Loader) -> None:
    """Byte offsets beyond 2**32: 32 experts whose packed weights take 4.8 GB; the last expert is compared."""
    import harness

    experts, hidden, intermediate, m = 32, 8192, 16384, 3
    one = harness.Weights("fc1", 1, hidden, intermediate, "codes", seed=1)
    stride = one.packed.numel()
    assert experts * stride > 1 << 32
    packed = torch.zeros(experts * stride, dtype=torch.uint8, device="cuda")
    packed[-stride:] = one.packed
    problem = Problem("fc1", m, experts, hidden, intermediate, "bf16", "f32")
    a = torch.randn((m, hidden), device="cuda").bfloat16()
    c = torch.empty((m, experts * intermediate), device="cuda")
    scale = 1 / 240
    with loader.plan(problem, {"a": a, "b": packed, "alpha": torch.full((experts,), scale, device="cuda"), "c": c}, 0) as plan:
        plan.launch(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
    from densemoe.runtime import reference

    exact = reference.fc1(a.double(), one.expert, torch.full((1,), scale, device="cuda", dtype=torch.float64).float().double(), [0])
    report = bounds.compare_plain(c[:, -intermediate:].double(), exact.y, bounds.fc1_bound(exact, hidden), "f32")
    assert report.passed, report
    assert (c[:, :-intermediate] == 0).all()
    harness.collect()


@pytest.mark.parametrize("case", list(data.layers()), ids=lambda case: "-".join(map(str, case)))
def test_layers(loader: Loader, case: data.LayerCase) -> None:
    """Layers of section 9 in the default form: FC1 by rule 3, FC2 by rule 2 on FC1's actual output, and the 97 % mark."""
    import harness

    check(harness.run_layer(loader, case), ("layer", *case))
    harness.collect()


@pytest.mark.parametrize("case", [(128, 8, 2048, 768, 1), (128, 8, 2048, 768, 33), (13, 3, 256, 512, 16), (8, 2, 4096, 14336, 2)])
def test_layers_of_active_experts(loader: Loader, case: tuple[int, ...]) -> None:
    """Experts without a token are skipped; their weights are spoiled and FC1's columns of theirs stay poisoned."""
    import harness

    check(harness.run_layer(loader, data.LayerCase(*case), listed=True), ("layer-listed", *case))
    harness.collect()


@pytest.mark.parametrize("listed", [False, True])
def test_qwen3_30b_layer(loader: Loader, listed: bool) -> None:
    """The layer that the quick start runs, in both activation dtypes."""
    from densemoe.runtime import runner

    for a_dtype in A_DTYPES:
        report = runner.run_layer(loader, m=8, experts=128, top_k=8, hidden=2048, intermediate=768, a_dtype=a_dtype, listed=listed)
        assert report.passed, report
