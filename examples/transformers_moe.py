"""A small Qwen3-MoE or Mixtral with random weights, its experts replaced by densemoe: logits beside those of the bf16 model.

    python examples/transformers_moe.py [qwen3|mixtral] [cpu|cuda]

On a CPU the ops run their exact reference. Needs torch and transformers 5.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import transformers

from densemoe.runtime.torch import replace_moe


def tiny(family: str) -> Any:
    """A model of two layers."""
    common = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    if family == "mixtral":
        config = transformers.MixtralConfig(**common, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2)
        return transformers.MixtralForCausalLM(config)
    config = transformers.Qwen3MoeConfig(
        **common, head_dim=64, intermediate_size=256, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True
    )
    return transformers.Qwen3MoeForCausalLM(config)


def main(family: str = "qwen3", device: str = "cpu") -> None:
    """Replaces, compares, generates."""
    plain = tiny(family).to(torch.bfloat16).eval().to(device)
    model = copy.deepcopy(plain)
    print("replaced:", ", ".join(replace_moe(model)))
    ids = torch.arange(32, device=device).reshape(2, 16) * 7 % 512
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    print(f"logits: rms error {float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()):.2%} of the bf16 model's rms")
    print("generated:", model.generate(ids[:1, :8], max_new_tokens=8, do_sample=False)[0, 8:].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
