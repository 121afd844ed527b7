"""The kernels over gathered tokens on a GPU: route bit for bit, FC1 and FC2 by the contract's bounds, whole layers against the CPU op."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.capability(9)]

torch = pytest.importorskip("torch")

from routes import same_routes  # noqa: E402

from densemoe.runtime import bounds, data, reference  # noqa: E402
from densemoe.runtime.layout import k64_order  # noqa: E402
from densemoe.runtime.loader import Loader  # noqa: E402
from densemoe.runtime.nvfp4 import bf16_bits, bf16_values  # noqa: E402
from densemoe.runtime.problem import Problem  # noqa: E402


@pytest.fixture(scope="module")
def loader() -> Loader:
    torch.zeros(1, device="cuda")  # torch's primary context is current from here on
    return Loader()


def launched(loader: Loader, problem: Problem, tensors: dict[str, Any], times: int = 1, variant: str | None = None) -> dict[str, Any]:
    """The outputs by role, poisoned before each launch. ``variant``: a key instead of the selection's."""
    import harness

    dtypes = {**harness.DTYPES, "i32": torch.int32}
    outputs = {}
    for role, spec in problem.tensors().items():
        if spec.output:
            raw = torch.empty(spec.nbytes, dtype=torch.uint8, device="cuda")
            outputs[role] = raw.view(dtypes[spec.dtype]).reshape(spec.shape)
    with loader.plan(problem, {**tensors, **outputs}, 0, variant) as plan:
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
@pytest.mark.parametrize(("m", "experts", "top_k"), [(1, 8, 1), (37, 13, 3), (64, 128, 8), (77, 40, 6), (512, 384, 8), (600, 4096, 32), (300, 2, 2)])
def test_route_is_the_reference_bit_for_bit(loader: Loader, dtype: str, group_tile: int, m: int, experts: int, top_k: int) -> None:
    rng = np.random.default_rng(m)
    ids = rng.integers(-experts // 8, experts + experts // 8 + 1, (m, top_k)).astype({"i32": np.int32, "i64": np.int64}[dtype])
    arrays = {"ids": ids, "router": rng.random((m, top_k), np.float32), "w2_alpha": rng.random(experts, np.float32)}
    for elsewhere in (True, False):
        problem = Problem("route", m, experts, 0, 0, dtype, "f32", top_k=top_k, elsewhere=elsewhere, group_tile=group_tile, deterministic=True)
        got = launched(loader, problem, {role: torch.from_numpy(each).cuda() for role, each in arrays.items()})
        expected = reference.route(*arrays.values(), group_tile=group_tile, elsewhere=elsewhere)
        tiles, rows, row_alpha, places = (got[role].cpu().numpy() for role in ("tiles", "rows", "row_alpha", "places"))
        same_routes(tiles, rows, row_alpha, expected, places)


@pytest.mark.parametrize(("x_dtype", "rounded"), [("bf16", False), ("nvfp4", False), ("bf16", True), ("f16", True), ("f32", True)])
@pytest.mark.parametrize(("op", "group_tile"), [("route", 32), ("route", 16), ("prepare", 0)])
@pytest.mark.parametrize(("m", "hidden"), [(1, 64), (37, 320), (512, 7168), (4097, 2048)])
def test_activations_are_brought_as_bf16(loader: Loader, op: str, group_tile: int, x_dtype: str, rounded: bool, m: int, hidden: int) -> None:
    """Bit for bit, beside what else ``route`` and ``prepare`` give; those that are rounded as the reference rounds them."""
    import harness

    rng = np.random.default_rng(m)
    arrays = {"ids": rng.integers(0, 16, (m, 4)).astype(np.int32), "router": rng.random((m, 4), np.float32), "w2_alpha": rng.random(16, np.float32)}
    if rounded:
        values = rng.standard_normal((m, hidden), np.float32) * np.exp2(rng.integers(-9, 3, (m, hidden // 64))).repeat(64, axis=1)
        stored = {"bf16": bf16_bits, "f16": lambda x: x.astype(np.float16), "f32": lambda x: x.astype(np.float32)}[x_dtype](values)
        multiplier = np.float32(100)
        expected = reference.rounded_bf16(bf16_values(stored) if x_dtype == "bf16" else stored, multiplier)
        x = {"x": stored, "x.multiplier": np.array([multiplier])}
    else:
        first, tiled, _ = data.activations(rng, m, hidden, x_dtype, "normal")
        x = {"x": first, **({} if tiled is None else {"x.scales": tiled})}
        expected = first if tiled is None else reference.decoded_bf16(first, tiled)
    problem = Problem(op, m, 16, hidden, 0, "i32", "f32", top_k=4, group_tile=group_tile, x_dtype=x_dtype, x_rounded=rounded)
    given = {**arrays, **x, **({"alpha_divisor": np.ones(1, np.float32)} if op == "prepare" else {})}
    got = launched(loader, problem, {role: harness.device_tensor(each) for role, each in given.items()})
    if op == "route":
        same_routes(*(got[role].cpu().numpy() for role in ("tiles", "rows", "row_alpha")), reference.route(*arrays.values(), group_tile=group_tile))
    else:
        assert np.array_equal(got["alpha"].cpu().numpy(), reference.build_alpha(*arrays.values(), experts=16))
    assert problem.brought == ("x.k64" if group_tile == 32 else "x.bf16")
    wanted = k64_order(expected) if group_tile == 32 else expected
    assert np.array_equal(got[problem.brought].view(torch.int16).cpu().numpy().view(np.uint16), wanted)


SHAPES = [(9, 5, 2, 320, 192), (33, 13, 3, 256, 128), (64, 128, 8, 512, 256), (200, 16, 4, 448, 320), (511, 8, 2, 1024, 512)]
FAMILIES = {64: (8, 16), 256: (16, 32, 48, 64, 96, 128, 160)}  # tile_m by tile_n: mma.sync; mma.sync of 16, else WGMMA
C_DTYPES = {("fc1", 64): ("f32", "nvfp4"), ("fc1", 256): ("bf16", "nvfp4"), ("fc2", 64): ("f32", "bf16"), ("fc2", 256): ("f32", "bf16", "f16")}


def judged(loader: Loader, kind: str, ids: Any, experts: int, hidden: int, intermediate: int, tile_n: int, seed: int) -> None:
    """Every tile and dtype of a family, all rows and all of the output, on ``[M, k]`` ids; FC2 twice on the same workspace."""
    import harness
    from test_kernels import check

    (m, top_k), rng = ids.shape, np.random.default_rng(seed)
    router = np.exp2(rng.integers(-2, 1, ids.shape)).astype(np.float32)
    w2_alpha = np.exp2(rng.integers(-3, 3, experts)).astype(np.float32)
    for op, tile in itertools.product(("fc1", "fc2"), FAMILIES[tile_n]):
        weights = harness.Weights(op, experts, hidden, intermediate, kind, seed=seed)
        routes = reference.route(ids, router, w2_alpha, group_tile=tile)
        given = {role: torch.from_numpy(each).cuda() for role, each in routes.packed(m * top_k).items()}
        given["places"] = torch.from_numpy(routes.places(m, top_k)).cuda()
        for c_dtype, ordered in itertools.product(C_DTYPES[op, tile_n], (False, True) if op == "fc2" else (False,)):
            if c_dtype == "nvfp4" and kind == "exact":
                continue
            problem = Problem(
                f"grouped{op}", m, experts, hidden, intermediate, "bf16", c_dtype, top_k=top_k, group_tile=tile, deterministic=ordered
            )  # fmt: skip
            key = f"grouped{op}.sm90a.t{tile}x{tile_n}.c1x1.bf16-{c_dtype}{'.deterministic' * ordered}"
            tensors, a, a_scale = harness.activations(problem.a_rows, problem.k, "bf16", kind, seed, problem.a_in_k64_order)
            tensors.update({role: each for role, each in given.items() if role in problem.tensors()}, b=weights.packed)
            what = (f"grouped{op}", kind, m, experts, top_k, hidden, intermediate, f"{tile}x{tile_n}", c_dtype, ordered)
            if op == "fc1":
                alpha = harness.device_tensor(data.fc1_alpha(weights.plain, a_scale))
                exact: Any = reference.grouped_fc1(a, weights.expert, alpha.double(), routes)
                multiplier = np.float32(2688.0 / max(float(exact.y.abs().max()), 1e-30))
                tensors["alpha"] = alpha
                if c_dtype == "nvfp4":
                    tensors["output_multiplier"] = harness.device_tensor(np.array([multiplier]))
                got = launched(loader, problem, tensors, 2, key)
                report = bounds.compare_fc1(got, exact, problem, output_multiplier=float(multiplier), exact=kind == "exact")
            else:
                exact = reference.grouped_fc2(a, weights.expert, given["row_alpha"].double(), routes, m)
                report = bounds.compare_fc2(launched(loader, problem, tensors, 2, key), exact, problem, exact=kind == "exact")
            check([report], what)


@pytest.mark.parametrize("kind", ["exact", "integers", "normal"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(("m", "top_k", "experts"), [(1, 1, 1), (1, 8, 128), (3, 8, 9), (4, 8, 300), (16, 2, 3), (32, 1, 1), (32, 1, 40), (7, 3, 2)])
def test_what_sorts_the_router_s_choice_itself(
    loader: Loader, kind: str, wide: bool, elsewhere: bool, m: int, top_k: int, experts: int
) -> None:
    """FC1 and FC2 of every dtype, twice on the same workspaces; some ids are nobody's on this rank."""
    import harness
    from test_kernels import check

    first, hidden, intermediate, rng = 5, 2048 if experts == 9 else 320, 192, np.random.default_rng([m, top_k, experts])
    ids = rng.integers(first, first + experts, (m, top_k))
    ids[rng.random(ids.shape) < 0.1 * (elsewhere or kind == "normal")] = first + experts + 3
    router = np.exp2(rng.integers(-2, 1, ids.shape)).astype(np.float32)
    w2_alpha = np.exp2(rng.integers(-3, 3, experts)).astype(np.float32)
    routes = reference.route(ids, router, w2_alpha, group_tile=8, first_expert=first, elsewhere=elsewhere)
    used = len(routes.rows)
    told = {"ids": ids.astype(np.int64 if wide else np.int32), "router": router, "w2_alpha": w2_alpha}
    for op, c_dtypes in (("fc1", ("bf16",)), ("fc2", ("bf16", "f16", "f32"))):
        weights = harness.Weights(op, experts, hidden, intermediate, kind, seed=m)
        for c_dtype in c_dtypes:
            problem = Problem(
                f"grouped{op}", m, experts, hidden, intermediate, "bf16", c_dtype, top_k=top_k, group_tile=8,
                routes=True, id_dtype="i64" if wide else "i32", first_expert=first, elsewhere=elsewhere,
            )  # fmt: skip
            tensors, a, a_scale = harness.activations(problem.a_rows, problem.k, "bf16", kind, m, False)
            tensors.update({role: torch.from_numpy(each).cuda() for role, each in told.items() if role in problem.tensors()}, b=weights.packed)
            if op == "fc1":
                tensors["alpha"] = harness.device_tensor(data.fc1_alpha(weights.plain, a_scale))
                exact: Any = reference.grouped_fc1(a, weights.expert, tensors["alpha"].double(), routes)
                got = launched(loader, problem, tensors, 2)
                report = bounds.compare_fc1(got, exact, problem, rows=np.arange(used), exact=kind == "exact")
            else:
                exact = reference.grouped_fc2(a[:used], weights.expert, torch.from_numpy(routes.row_alpha).cuda().double(), routes, m)
                report = bounds.compare_fc2(launched(loader, problem, tensors, 2), exact, problem, exact=kind == "exact")
            check([report], (op, kind, m, top_k, experts, c_dtype, wide, elsewhere))


@pytest.mark.parametrize("tile_n", [64, 256])
@pytest.mark.parametrize("kind", ["exact", "integers", "normal"])
@pytest.mark.parametrize(("m", "experts", "top_k", "hidden", "intermediate"), SHAPES)
def test_grouped_gemms(loader: Loader, kind: str, m: int, experts: int, top_k: int, hidden: int, intermediate: int, tile_n: int) -> None:
    """Every tile and dtype, all rows and all of the output."""
    ids, _, _ = choice(m, experts, top_k, m)
    judged(loader, kind, ids, experts, hidden, intermediate, tile_n, m)


@pytest.mark.parametrize("kind", ["exact", "integers"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(64, 64), (320, 192), (2048, 768)])
def test_ragged_tiles_of_wgmma(loader: Loader, kind: str, hidden: int, intermediate: int) -> None:
    """Experts of 0, 1, a tile's rows less one, a tile's, one more, and many tokens, for every tile; single K blocks among them."""
    counts = [0, 1, 8, 9, 15, 16, 17, 25, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 159, 160, 161, 300]
    ids = np.random.default_rng(5).permutation(np.repeat(np.arange(len(counts)), counts)).astype(np.int32)[:, None]
    judged(loader, kind, ids, len(counts), hidden, intermediate, 256, hidden)


@pytest.mark.parametrize("tile", [16, 64, 128, 160])
def test_fc1_of_wgmma_has_the_same_bits_every_time(loader: Loader, tile: int) -> None:
    """Sums over CTAs have one order, whichever comes last: twenty launches of a problem whose units lie in several spans."""
    import harness

    m, experts, hidden, intermediate = 3 * tile, 3, 4096, 384
    ids, router, w2_alpha = choice(m, experts, 1, tile)
    given = {role: torch.from_numpy(each).cuda() for role, each in reference.route(ids, router, w2_alpha, group_tile=tile).packed(m).items()}
    problem = Problem("groupedfc1", m, experts, hidden, intermediate, "bf16", "bf16", top_k=1, group_tile=tile)
    weights = harness.Weights("fc1", experts, hidden, intermediate, "normal", seed=tile)
    tensors, _, a_scale = harness.activations(m, hidden, "bf16", "normal", tile, problem.a_in_k64_order)
    tensors.update(tiles=given["tiles"], rows=given["rows"], b=weights.packed, alpha=harness.device_tensor(data.fc1_alpha(weights.plain, a_scale)))
    key = f"groupedfc1.sm90a.t{tile}x256.c1x1.bf16-bf16"
    (role,) = (role for role, spec in problem.tensors().items() if spec.output)
    first = launched(loader, problem, tensors, 1, key)[role].clone()
    for _ in range(20):
        assert torch.equal(launched(loader, problem, tensors, 1, key)[role].view(torch.int16), first.view(torch.int16))


@pytest.mark.parametrize("tile_n", [64, 256])
def test_fc2_in_one_order_has_the_same_bits_every_time(loader: Loader, tile_n: int) -> None:
    """Twenty launches on one workspace while another stream keeps SMs busy, of units that lie in several spans: every tile, of data that adds up
    otherwise in another order."""
    import harness

    experts, top_k, hidden, intermediate = 6, 4, 1024, 1792
    noise, busy = torch.cuda.Stream(), torch.randn(1536, 1536, device="cuda")
    for tile in FAMILIES[tile_n]:
        m = 2 * tile + 3
        ids, router, w2_alpha = choice(m, experts, top_k, tile)
        router = np.random.default_rng(tile).random(router.shape, np.float32)
        routes = reference.route(ids, router, w2_alpha, group_tile=tile)
        given = {role: torch.from_numpy(each).cuda() for role, each in routes.packed(m * top_k).items()}
        given["places"] = torch.from_numpy(routes.places(m, top_k)).cuda()
        problem = Problem("groupedfc2", m, experts, hidden, intermediate, "bf16", "f32", top_k=top_k, group_tile=tile, deterministic=True)
        weights = harness.Weights("fc2", experts, hidden, intermediate, "normal", seed=tile)
        tensors, _, _ = harness.activations(problem.a_rows, intermediate, "bf16", "normal", tile, problem.a_in_k64_order)
        tensors.update({role: each for role, each in given.items() if role in problem.tensors()}, b=weights.packed)
        c = torch.empty(m, hidden, device="cuda")
        found = []
        with loader.plan(problem, {**tensors, "c": c}, 0, f"groupedfc2.sm90a.t{tile}x{tile_n}.c1x1.bf16-f32.deterministic") as plan:
            for turn in range(20):
                with torch.cuda.stream(noise):
                    for _ in range(turn % 4):
                        busy = torch.tanh(busy @ busy)
                harness.launch(plan)
                torch.cuda.synchronize()
                found.append(c.clone())
        assert all(torch.equal(each.view(torch.int32), found[0].view(torch.int32)) for each in found[1:]), f"tile {tile}"


@pytest.mark.parametrize("asked", ["argument", "torch"])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(5, 8, 2), (40, 16, 4), (90, 8, 2), (300, 8, 2), (300, 32, 8)])
def test_layers_give_the_same_bits_where_that_is_asked_for(m: int, experts: int, top_k: int, asked: str) -> None:
    """By the op's argument, or by torch.use_deterministic_algorithms; within the CPU op's tolerance as ever."""
    from test_torch_ops import TOLERANCE, Layer, on_gpu

    from densemoe.runtime.torch import device, ops

    arguments = Layer(experts, top_k, 512, 256, m).arguments("bf16")
    given = on_gpu(arguments)
    if asked == "torch":
        torch.use_deterministic_algorithms(True)
    try:
        found = [ops.moe(*given, deterministic=asked == "argument") for _ in range(20)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(each, found[0]) for each in found[1:])
    torch.testing.assert_close(found[0].cpu(), ops.moe(*arguments), **TOLERANCE)
    newest = list(device.runtime().entries.values())[-1]
    assert newest.plans[-1].key.endswith(".deterministic") == (m > 8)


@pytest.mark.parametrize("form", ["bf16", "nvfp4", "outside"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (320, 192)])
@pytest.mark.parametrize(("m", "experts", "top_k"), [(17, 8, 2), (64, 32, 4), (90, 8, 2), (200, 8, 2), (300, 8, 2)])
def test_layers_that_gather_equal_the_cpu_op(form: str, m: int, experts: int, top_k: int, hidden: int, intermediate: int) -> None:
    """In K 64 order, with the last block half empty too."""
    from test_torch_ops import TOLERANCE, Layer, on_gpu

    from densemoe.runtime.torch import device, ops

    arguments = Layer(experts, top_k, hidden, intermediate, m).arguments(form)
    ours = ops.moe(*on_gpu(arguments))
    torch.testing.assert_close(ours.cpu(), ops.moe(*arguments), **TOLERANCE)
    newest = list(device.runtime().entries.values())[-1]
    assert [plan.problem.op for plan in newest.plans[-3:]] == ["route", "groupedfc1", "groupedfc2"]
