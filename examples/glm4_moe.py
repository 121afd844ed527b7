"""GLM-4.5 with densemoe's MoE layers: a small model with random weights, its logits beside those of the bf16 model.

    python examples/glm4_moe.py [cpu|cuda]

Routing DeepSeekV3 with one group and shared experts stay the model's. Needs torch and transformers 5.
"""

from __future__ import annotations

import torch
import transformers
from compare import TINY, compare


def main() -> None:
    """Makes the model and compares."""
    torch.manual_seed(0)
    config = transformers.Glm4MoeConfig(
        **TINY,
        head_dim=64,
        moe_intermediate_size=128,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
    )
    compare(transformers.Glm4MoeForCausalLM(config))


if __name__ == "__main__":
    main()
