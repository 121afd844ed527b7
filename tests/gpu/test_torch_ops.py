"""The ops on a GPU against their own CPU reference: layers in every form, CUDA graphs with changing routing, streams, opcheck, overhead."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")

from densemoe.runtime import data, marks, packing, reference  # noqa: E402
from densemoe.runtime.errors import ProblemError  # noqa: E402
from densemoe.runtime.layer_data import LayerData  # noqa: E402
from densemoe.runtime.layout import tile_scales  # noqa: E402
from densemoe.runtime.nvfp4 import pack_codes, quantise_rows  # noqa: E402

#: bf16 output: half an ulp of each side, and FC1's output that may round either way where sums differ in their order
TOLERANCE = {"rtol": 2**-6, "atol": 2**-6}


class Layer:
    """A layer's arguments for ``densemoe::moe`` on the CPU."""

    def __init__(self, experts: int, top_k: int, hidden: int, intermediate: int, m: int) -> None:
        self.data = LayerData(data.LayerCase(experts, top_k, hidden, intermediate, m))
        made = [self.data.expert(e) for e in range(experts)]
        self.x = torch.from_numpy(self.data.x.view(np.int16)).view(torch.bfloat16)
        self.ids, self.router = (torch.from_numpy(each) for each in self.data.routing())
        self.packed = [torch.from_numpy(np.concatenate([getattr(each, f"fc{op}_packed") for each in made])) for op in (1, 2)]
        self.scales = [torch.tensor([float(getattr(each, f"fc{op}_scale")) for each in made]) for op in (1, 2)]
        self.shape = (hidden, intermediate)

    def arguments(self, form: str, c_dtype: str = "bf16") -> list[Any]:
        """``form``: ``bf16``; ``nvfp4``, quantised by the layer; ``outside``, quantised before; ``fused``, as ``nvfp4`` in the fused form."""
        quantised = form != "bf16"
        between = torch.tensor([float(self.data.output_multiplier)]) if quantised else None
        given = torch.tensor([2688 / 6.0]) if quantised else None
        w1_alpha = self.scales[0] / (given if given is not None else 1)
        w2_alpha = self.scales[1] / (between if between is not None else 1)
        largest = w2_alpha.max().reshape(1) if form == "fused" else None
        if form == "outside":
            codes, scales = quantise_rows(self.x.float().numpy(), np.float32(given))
            x, x_scales, given = torch.from_numpy(pack_codes(codes)), torch.from_numpy(tile_scales(scales)), None
        else:
            x, x_scales = self.x, None
        required = [x, self.ids, self.router, self.packed[0], w1_alpha, self.packed[1], w2_alpha, *self.shape, packing.LAYOUT, c_dtype]
        return [*required, given, between, x_scales, largest]


def on_gpu(arguments: list[Any]) -> list[Any]:
    return [each.cuda() if isinstance(each, torch.Tensor) else each for each in arguments]


@pytest.fixture(scope="module")
def ops() -> Any:
    from densemoe.runtime.torch import ops as registered

    return registered


@pytest.fixture(scope="module")
def layer() -> Layer:
    return Layer(8, 2, 512, 512, 8)


@pytest.mark.parametrize("form", ["bf16", "nvfp4", "fused"])
@pytest.mark.parametrize("c_dtype", ["bf16", "f16"])
def test_a_layer_equals_its_cpu_reference(ops: Any, layer: Layer, form: str, c_dtype: str) -> None:
    arguments = layer.arguments(form, c_dtype)
    ours, theirs = ops.moe(*on_gpu(arguments)).cpu(), ops.moe(*arguments)
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    exact = reference.layer(
        layer.x.double(), lambda e: tuple(map(torch.from_numpy, layer.data.unquantised(e))), layer.ids.numpy(), layer.router.numpy()
    )
    assert marks.layer_mark(ours.double(), exact).passed


@pytest.mark.parametrize("m", [3, 40, 300])
def test_a_layer_that_quantises_has_the_bits_of_one_quantised_before(ops: Any, m: int) -> None:
    """Where prepare or route rounds x itself, in each order of what it brings, no fourth kernel is launched."""
    from densemoe.runtime.torch import device

    case = Layer(8, 2, 512, 256, m)
    found = []
    for form in ("nvfp4", "outside"):
        found.append(ops.moe(*on_gpu(case.arguments(form)), deterministic=True))
        newest = list(device.runtime().entries.values())[-1]
        if torch.cuda.get_device_capability()[0] == 9:
            assert len(newest.plans) == 3
    assert torch.equal(*found)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("m", [1, 5, 16, 17])
def test_a_bf16_layer_of_few_pairs_is_two_launches(ops: Any, m: int, wide: bool) -> None:
    """And has what the CPU op gives, on a graph whose routing changes as well."""
    from densemoe.runtime.torch import device

    case = Layer(8, 2, 512, 256, m)
    arguments = case.arguments("bf16")
    if wide:
        arguments[1] = arguments[1].long()
    given = on_gpu(arguments)
    torch.testing.assert_close(ops.moe(*given).cpu(), ops.moe(*arguments), **TOLERANCE)
    newest = list(device.runtime().entries.values())[-1]
    if torch.cuda.get_device_capability()[0] == 9:
        assert len(newest.plans) == (2 if m <= 16 else 3)
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        ops.moe(*given)
    side.synchronize()
    with torch.cuda.graph(graph, stream=side):
        out = ops.moe(*given)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        arguments[1] = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(m)]).to(arguments[1].dtype)
        given[1].copy_(arguments[1])
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(out.cpu(), ops.moe(*arguments), **TOLERANCE)


@pytest.mark.parametrize("shape", data.LAYERS[:4], ids=str)
@pytest.mark.parametrize("m", [1, 8])
def test_the_contract_s_small_layers(ops: Any, shape: tuple[int, int, int, int], m: int) -> None:
    """Those of section 9 that a CPU computes in time; the large ones run in test_kernels."""
    case = Layer(*shape, m)
    exact = reference.layer(case.x.double(), lambda e: tuple(map(torch.from_numpy, case.data.unquantised(e))), case.ids.numpy(), case.router.numpy())
    for form in ("bf16", "nvfp4", "outside"):
        arguments = case.arguments(form)
        ours = ops.moe(*on_gpu(arguments)).cpu()
        torch.testing.assert_close(ours, ops.moe(*arguments), **TOLERANCE)
        assert marks.layer_mark(ours.double(), exact).passed


def test_opcheck_on_the_device(ops: Any, layer: Layer) -> None:
    torch.library.opcheck(ops.moe.default, tuple(on_gpu(layer.arguments("nvfp4"))))
    torch.library.opcheck(ops.quantize_nvfp4.default, (layer.x.cuda(), torch.tensor([100.0], device="cuda")))


def test_a_captured_graph_follows_changing_routing(ops: Any, layer: Layer) -> None:
    arguments = on_gpu(layer.arguments("nvfp4"))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        ops.moe(*arguments)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = ops.moe(*arguments)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(8)]).to(torch.int32)
        arguments[1].copy_(ids)
        graph.replay()
        torch.cuda.synchronize()
        expected = layer.arguments("nvfp4")
        expected[1] = ids
        torch.testing.assert_close(out.cpu(), ops.moe(*expected), **TOLERANCE)


def test_streams_run_apart_and_give_the_same(ops: Any, layer: Layer) -> None:
    arguments = on_gpu(layer.arguments("bf16"))
    expected = ops.moe(*arguments)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(ops.moe(*arguments))
    torch.cuda.synchronize()
    for result in results:
        torch.testing.assert_close(result, expected, **TOLERANCE)


def test_an_id_outside_makes_its_token_nan_and_no_other(ops: Any, layer: Layer) -> None:
    arguments = on_gpu(layer.arguments("bf16"))
    arguments[1] = arguments[1].clone()
    arguments[1][3, 1] = 99
    out = ops.moe(*arguments)
    assert out[3].isnan().all()
    assert not out[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


def test_compiled_whole(ops: Any, layer: Layer) -> None:
    arguments = on_gpu(layer.arguments("nvfp4"))

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.moe(x * 1, *arguments[1:]) + x

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(arguments[0]), step(arguments[0]), **TOLERANCE)


def test_graphs_that_are_replayed_at_once_share_nothing(ops: Any, layer: Layer) -> None:
    """Two graphs of one layer, captured on one stream and replayed on two, and eager calls on a third."""
    arguments = on_gpu(layer.arguments("nvfp4"))
    expected = ops.moe(*arguments)
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([ops.moe(*arguments) for _ in range(8)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in range(3)]
    eager = []
    for _ in range(10):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager += [ops.moe(*arguments) for _ in range(8)]
    torch.cuda.synchronize()
    for result in (*results[0], *results[1], *eager):
        torch.testing.assert_close(result, expected, **TOLERANCE)


def test_threads_of_one_stream_and_a_thread_that_never_called_cuda(ops: Any, layer: Layer) -> None:
    """Every thread begins without a context, and all of them use the default stream."""
    arguments = on_gpu(layer.arguments("bf16"))
    expected = ops.moe(*arguments)
    with ThreadPoolExecutor(4) as pool:
        results = [each.result() for each in [pool.submit(ops.moe, *arguments) for _ in range(64)]]
    torch.cuda.synchronize()
    for result in results:
        torch.testing.assert_close(result, expected, **TOLERANCE)


def test_outputs_that_the_caller_gives(ops: Any, layer: Layer) -> None:
    arguments = on_gpu(layer.arguments("bf16"))
    c = torch.full((8, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
    assert ops.moe.out(*arguments, c=c) is None
    torch.testing.assert_close(c, ops.moe(*arguments), **TOLERANCE)
    for wrong in (c[:, ::2], c.float(), c[:7]):
        with pytest.raises(ProblemError):
            ops.moe.out(*arguments, c=wrong)
    with pytest.raises(ProblemError, match="overlaps"):
        ops.moe.out(c, *arguments[1:], c=c)


def test_wrong_inputs_raise_before_anything_is_launched(ops: Any, layer: Layer) -> None:
    arguments = on_gpu(layer.arguments("bf16"))
    ops.moe(*arguments)
    unaligned = torch.zeros(8 * 512 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(8, 512)
    for position, value in ((0, layer.x.cuda().t().contiguous().t()), (0, unaligned), (1, layer.ids), (2, layer.router.cuda().double()), (7, 448)):
        wrong = [*arguments[:position], value, *arguments[position + 1 :]]
        with pytest.raises((ProblemError, NotImplementedError)):  # tensors of two devices: PyTorch's own dispatcher may refuse them
            ops.moe(*wrong)
    torch.cuda.synchronize()
