"""Whole models and several processes on a GPU: replaced experts against the dequantised bf16 model, generation under a CUDA graph, ranks."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

torch = pytest.importorskip("torch")

from test_torch_ops import TOLERANCE, Layer  # noqa: E402


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_a_model_with_replaced_experts_agrees_with_its_dequantised_self_and_generates_under_a_graph(family: str) -> None:
    pytest.importorskip("transformers")
    from moe_models import Decoder, dequantise_experts, tiny

    from densemoe.runtime.torch import replace_moe

    plain = tiny(family)
    model, twin = copy.deepcopy(plain), dequantise_experts(copy.deepcopy(plain)).cuda()
    assert len(replace_moe(model)) == 2
    on_cpu, model = copy.deepcopy(model), model.cuda()
    ids = torch.arange(24).reshape(2, 12) * 7 % 97
    with torch.no_grad():
        ours, theirs, exact = model(ids.cuda()).logits.float().cpu(), twin(ids.cuda()).logits.float().cpu(), on_cpu(ids).logits.float()
    spread = float(theirs.std())
    print(f"{family}: largest difference to the dequantised model {float((ours - theirs).abs().max()) / spread:.4f} of the logits' spread")
    assert float((ours - theirs).abs().max()) < 0.05 * spread  # both work in bf16 in between, as on a CPU
    assert float((ours - exact).abs().max()) < 0.05 * spread

    decoder = Decoder(model, ids[:1, :8].cuda())
    eager = decoder.decode(16)
    with torch.no_grad():  # each token is the best, or as good, by the logits of a forward pass over all of them
        logits = model(torch.cat([ids[0, :8], torch.tensor(eager)])[None].cuda()).logits[0, 7:-1].float().cpu()
    chosen = logits.gather(1, torch.tensor(eager)[:, None])[:, 0]
    assert float((logits.max(dim=1)[0] - chosen).max()) < 0.05 * spread
    assert model.generate(ids[:1, :8].cuda(), max_new_tokens=16, min_new_tokens=16, do_sample=False).shape == (1, 24)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        decoder.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        decoder.step()
    assert decoder.decode(16, graph.replay) == eager


def _quantised(layer: Any) -> list[dict[str, Any]]:
    """Every expert's projections of a layer, gate and up with one global scale."""
    from densemoe.runtime.torch.weights import Projection, quantize_projection

    made = []
    for expert in range(8):
        gate, up, down = (torch.from_numpy(layer.data.projection(name, expert)) for name in ("gate", "up", "down"))
        both = quantize_projection(torch.cat([gate, up]))
        rows = gate.shape[0]
        halves = [Projection(both.codes[part], both.scales[part], both.global_scale) for part in (slice(0, rows), slice(rows, None))]
        made.append({"gate": halves[0], "up": halves[1], "down": quantize_projection(down)})
    return made


def _part(experts: list[dict[str, Any]], rank: int, ranks: int, device: Any) -> Any:
    """A rank's weights: its part of I of the given experts."""
    from densemoe.runtime.torch.weights import Projection, WeightStore

    whole = experts[0]["gate"].codes.shape[0]
    own = slice(whole // ranks * rank, whole // ranks * (rank + 1))
    store = WeightStore(len(experts), 512, whole // ranks, device=device)
    for slot, expert in enumerate(experts):
        gate, up = (Projection(expert[name].codes[own], expert[name].scales[own], expert[name].global_scale) for name in ("gate", "up"))
        down, halves, groups = expert["down"], slice(own.start // 2, own.stop // 2), slice(own.start // 16, own.stop // 16)
        store.put(slot, gate=gate, up=up, down=Projection(down.codes[:, halves].copy(), down.scales[:, groups].copy(), down.global_scale))
    return store.finish()


def _rank(rank: int, folder: str, backend: str, devices: int) -> None:
    """Tensor and expert parallelism of a layer over two ranks, the sum by the module."""
    from densemoe.runtime.torch import DenseGemmMoE, MoEConfig

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank % devices)
    torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    layer = Layer(8, 2, 512, 512, 8)
    experts, results = _quantised(layer), {}
    x, ids, router = (each.to(device) for each in (layer.x, layer.ids, layer.router))
    for name, part in (("tp", _part(experts, rank, 2, device)), ("ep", _part(experts[4 * rank : 4 * rank + 4], 0, 1, device))):
        own = DenseGemmMoE(MoEConfig(8, 2, 512, 512, reduce=True, **{f"{name}_size": 2, f"{name}_rank": rank}), part)
        results[name] = own(x, ids=ids, weights=router).cpu()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _two_ranks(folder: Path, backend: str, devices: int) -> None:
    from densemoe.runtime.torch import DenseGemmMoE, MoEConfig

    torch.multiprocessing.spawn(_rank, (str(folder), backend, devices), nprocs=2)
    layer = Layer(8, 2, 512, 512, 8)
    whole = DenseGemmMoE(MoEConfig(8, 2, 512, 512), _part(_quantised(layer), 0, 1, "cuda"))
    expected = whole(layer.x.cuda(), ids=layer.ids.cuda(), weights=layer.router.cuda()).cpu()
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    for name in ("tp", "ep"):
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], expected, rtol=2**-5, atol=2**-5)  # bf16 parts, and their sum rounded again


def test_two_processes_on_one_gpu_give_what_one_gives(tmp_path: Path) -> None:
    _two_ranks(tmp_path, "gloo", 1)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA devices")
def test_two_gpus_give_what_one_gives_through_nccl(tmp_path: Path) -> None:
    _two_ranks(tmp_path, "nccl", 2)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two CUDA devices")
def test_a_layer_runs_on_the_device_of_its_tensors_whatever_the_current_one_is() -> None:
    from densemoe.runtime.torch import ops

    layer = Layer(8, 2, 512, 512, 8)
    arguments = [each.to("cuda:1") if isinstance(each, torch.Tensor) else each for each in layer.arguments("nvfp4")]
    assert torch.cuda.current_device() == 0
    for _ in range(2):
        out = ops.moe(*arguments)
        assert out.device == torch.device("cuda:1")
        torch.testing.assert_close(out.cpu(), ops.moe(*layer.arguments("nvfp4")), **TOLERANCE)
    assert torch.cuda.current_device() == 0
    with pytest.raises(Exception, match="put every tensor on one device"):
        ops.moe(*[arguments[0], None, arguments[2].to("cuda:0"), *arguments[3:]])
