"""Qwen3-MoE with densemoe's MoE layers: a small model with random weights, its logits beside those of the bf16 model.

    python examples/qwen3_moe.py [cpu|cuda]

Routing RenormalizeNaive, done by the model. Needs torch and transformers 5.
"""

from __future__ import annotations

import torch
import transformers
from compare import TINY, compare


def main() -> None:
    """Makes the model and compares."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        **TINY, head_dim=64, moe_intermediate_size=128, num_experts=16, num_experts_per_tok=4, norm_topk_prob=True
    )
    compare(transformers.Qwen3MoeForCausalLM(config))


if __name__ == "__main__":
    main()
