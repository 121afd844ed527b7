"""DeepSeek-V3 (Kimi-K2 has the same layers) with densemoe's MoE layers: a small model with random weights, logits beside those in bf16.

    python examples/deepseek_v3.py [cpu|cuda]

Routing DeepSeekV3 (grouped, with a bias) and shared experts stay the model's. Needs torch and transformers 5.
"""

from __future__ import annotations

import torch
import transformers
from compare import TINY, compare


def main() -> None:
    """Makes the model and compares."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **{**TINY, "num_key_value_heads": 4},
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        head_dim=32,
    )
    compare(transformers.DeepseekV3ForCausalLM(config))


if __name__ == "__main__":
    main()
