"""The kernels over gathered tokens on a GPU: route bit for bit, FC1 and FC2 by the contract's bounds, whole layers against the CPU op."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.capability(9)]

torch = pytest.importorskip("torch")

from densemoe.runtime import bounds, data, reference  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402
from densemoe.runtime.problem import Problem  # noqa: E402


@pytest.fixture(scope="module")
def loader() -> Loader:
    torch.zeros(1, device="cuda")  # torch's primary context is current from here on
    return Loader()


def launched(loader: Loader, problem: Problem, tensors: dict[str, Any], times: int = 1) -> dict[str, Any]:
    """The outputs by role, poisoned before each launch."""
    import harness

    dtypes = {**harness.DTYPES, "i32": torch.int32}
    outputs = {}
    for role, spec in problem.tensors().items():
        if spec.output:
            raw = torch.empty(spec.nbytes, dtype=torch.uint8, device="cuda")
            outputs[role] = raw.view(dtypes[spec.dtype]).reshape(spec.shape)
    with loader.plan(problem, {**tensors, **outputs}, 0) as plan:
        for _ in range(times):
            for output in outputs.values():
                output.view(torch.uint8).fill_(0x5A)
            harness.launch(plan)
    return outputs


def choice(m: int, experts: int, top_k: int, seed: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(m)]).astype(np.int32)
    return ids, np.exp2(rng.integers(-2, 1, ids.shape)).astype(np.float32), np.exp2(rng.integers(-3, 3, experts)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["i32", "i64"])
@pytest.mark.parametrize("group_tile", [8, 32])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(1, 8, 1), (37, 13, 3), (64, 128, 8), (512, 384, 8), (600, 4096, 32), (300, 2, 2)])
def test_route_is_the_reference_bit_for_bit(loader: Loader, dtype: str, group_tile: int, m: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(m)
    ids = rng.integers(-experts // 8, experts + experts // 8 + 1, (m, top_k)).astype({"i32": np.int32, "i64": np.int64}[dtype])
    arrays = {"ids": ids, "router": rng.random((m, top_k), np.float32), "w2_alpha": rng.random(experts, np.float32)}
    for elsewhere in (True, False):
        problem = Problem("route", m, experts, 0, 0, dtype, "f32", top_k=top_k, elsewhere=elsewhere, group_tile=group_tile)
        got = launched(loader, problem, {role: torch.from_numpy(each).cuda() for role, each in arrays.items()})
        expected = reference.route(*arrays.values(), group_tile=group_tile, elsewhere=elsewhere)
        tiles, rows = len(expected.tiles), len(expected.rows)
        assert got["tiles"][0].tolist() == [tiles, rows, 0, 0]
        assert np.array_equal(got["tiles"][1 : 1 + tiles, :3].cpu(), expected.tiles)
        assert np.array_equal(got["rows"][:rows].cpu(), expected.rows)
        np.testing.assert_array_equal(got["row_alpha"][:rows].cpu(), expected.row_alpha)


SHAPES = [(9, 5, 2, 320, 192), (33, 13, 3, 256, 128), (64, 128, 8, 512, 256), (200, 16, 4, 448, 320), (511, 8, 2, 1024, 512)]


@pytest.mark.parametrize("kind", ["exact", "integers", "normal"])
@pytest.mark.parametrize(("m", "experts", "top_k", "hidden", "intermediate"), SHAPES)
def test_grouped_gemms(loader: Loader, kind: str, m: int, experts: int, top_k: int, hidden: int, intermediate: int) -> None:
    """Every tile and dtype, all rows and all of the output."""
    import harness
    from test_kernels import check

    ids, router, w2_alpha = choice(m, experts, top_k, m)
    for op, tile, a_dtype in itertools.product(("fc1", "fc2"), (8, 16, 32), ("bf16", "nvfp4")):
        weights = harness.Weights(op, experts, hidden, intermediate, kind, seed=m)
        routes = reference.route(ids, router, w2_alpha, group_tile=tile)
        given = {role: torch.from_numpy(each).cuda() for role, each in routes.packed(m * top_k).items()}
        for c_dtype in ("f32", "nvfp4" if op == "fc1" and kind != "exact" else "bf16"):
            problem = Problem(f"grouped{op}", m, experts, hidden, intermediate, a_dtype, c_dtype, top_k=top_k, group_tile=tile)
            tensors, a, a_scale = harness.activations(problem.a_rows, problem.k, a_dtype, kind, m)
            tensors.update({role: each for role, each in given.items() if role in problem.tensors()}, b=weights.packed)
            what = (f"grouped{op}", kind, m, experts, top_k, hidden, intermediate, tile, a_dtype, c_dtype)
            if op == "fc1":
                alpha = harness.device_tensor(data.fc1_alpha(weights.plain, a_scale))
                exact: Any = reference.grouped_fc1(a, weights.expert, alpha.double(), routes)
                multiplier = np.float32(2688.0 / max(float(exact.y.abs().max()), 1e-30))
                tensors["alpha"] = alpha
                if c_dtype == "nvfp4":
                    tensors["output_multiplier"] = harness.device_tensor(np.array([multiplier]))
                got = launched(loader, problem, tensors)
                report = bounds.compare_fc1(got, exact, problem, output_multiplier=float(multiplier), exact=kind == "exact")
            else:
                exact = reference.grouped_fc2(a, weights.expert, given["row_alpha"].double(), routes, m)
                report = bounds.compare_fc2(launched(loader, problem, tensors, times=2), exact, problem, exact=kind == "exact")
            check([report], what)


@pytest.mark.parametrize("form", ["bf16", "nvfp4"])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(17, 8, 2), (64, 32, 4), (300, 8, 2)])
def test_layers_that_gather_equal_the_cpu_op(form: str, m: int, experts: int, top_k: int) -> None:
    from test_torch_ops import TOLERANCE, Layer, on_gpu

    from densemoe.runtime.torch import device, ops

    arguments = Layer(experts, top_k, 512, 256, m).arguments(form)
    ours = ops.moe(*on_gpu(arguments))
    torch.testing.assert_close(ours.cpu(), ops.moe(*arguments), **TOLERANCE)
    newest = list(device.runtime().entries.values())[-1]
    assert [plan.problem.op for plan in newest.plans[-3:]] == ["route", "groupedfc1", "groupedfc2"]
