"""Whole models on a GPU: replaced experts against the dequantised bf16 model, generation under a CUDA graph; two devices in one process."""

from __future__ import annotations

import copy

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
        ops.moe(*[arguments[0], arguments[1].to("cuda:0"), *arguments[2:]])
