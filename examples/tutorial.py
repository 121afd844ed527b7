"""From a Hugging Face checkpoint to a MoE layer, step by step; docs/torch_tutorial.md shows this file's output.

    python examples/tutorial.py

Runs on a CPU in seconds, in the exact reference of the ops. Needs torch, transformers 5 and safetensors.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
import transformers

from densemoe.runtime.torch import DenseGemmMoE, MoEConfig, can_implement, replace_moe
from densemoe.runtime.torch.checkpoint import convert, find_layers, load_layer, load_packed
from densemoe.runtime.torch.safetensors_file import Checkpoint


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> str:
    """Rms of the difference over the rms of ``theirs``."""
    return f"{float((ours.float() - theirs.float()).square().mean().sqrt() / theirs.float().square().mean().sqrt()):.0%}"


def main(folder: Path) -> None:
    """The steps of the tutorial."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=256,
        moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder / "model")

    print("## 1. A checkpoint and its layers")
    checkpoint = Checkpoint(folder / "model")
    layers = find_layers(checkpoint)
    for each in layers:
        print(f"{each.prefix}: E {each.experts}, H {each.hidden}, I {each.intermediate}")

    print("## 2. One layer, quantised while it is read")
    layer = layers[0]
    moe_config = MoEConfig(layer.experts, 4, layer.hidden, layer.intermediate, routing="RenormalizeNaive")
    weights = load_layer(checkpoint, layer)
    moe = DenseGemmMoE(moe_config, weights)
    print(moe)
    print(f"{(weights.w1.numel() + weights.w2.numel()) / (layer.experts * 3 * layer.hidden * layer.intermediate):.4f} bytes a weight")

    print("## 3. Hidden states through it, beside the model's own bf16 experts")
    x = torch.randn(5, 256).bfloat16()
    block = model.model.layers[0].mlp
    with torch.no_grad():
        logits, expected = block.gate(x)[0], block(x[None])[0]
    print("error of the output:", relative(moe(x, logits), expected))
    ids, router = moe.route(logits)
    print("the same from ids and weights:", torch.equal(moe(x, logits), moe(x, ids=ids, weights=router)))

    print("## 4. Packed once, mapped afterwards")
    convert(folder / "model", folder / "packed.safetensors", report=print)
    mapped = DenseGemmMoE(moe_config, load_packed(Checkpoint(folder / "packed.safetensors"), layer.prefix))
    print("equal to the layer above:", torch.equal(mapped(x, logits), moe(x, logits)))

    print("## 5. Two ranks of tensor parallelism")
    parts = []
    for rank in range(2):
        own = MoEConfig(layer.experts, 4, layer.hidden, layer.intermediate, routing="RenormalizeNaive", tp_size=2, tp_rank=rank)
        parts.append(DenseGemmMoE(own, load_layer(checkpoint, layer, tp_rank=rank, tp_size=2))(x, logits))
    print("error of the sum of both:", relative(parts[0] + parts[1], expected))

    print("## 6. What cannot run says why")
    for change in ({"tp_size": 4}, {"activation": "gelu"}, {"gated_limit": 7.0}):
        print(change, "→", can_implement(MoEConfig(layer.experts, 4, layer.hidden, layer.intermediate, **change))[1])

    print("## 7. The whole model")
    print("replaced:", ", ".join(replace_moe(model)))
    print("new tokens:", model.generate(torch.arange(2, 10)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] - 8)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="gate")  # gate and up of random experts have scales of their own
    with tempfile.TemporaryDirectory() as given:
        main(Path(given))
