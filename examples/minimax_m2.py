"""MiniMax-M2 with densemoe's MoE layers: a small model with random weights, its logits beside those of the bf16 model.

    python examples/minimax_m2.py [cpu|cuda]

Routing MiniMaxM2, done by the model. Needs torch and transformers 5.
"""

from __future__ import annotations

import torch
import transformers
from compare import TINY, compare


def main() -> None:
    """Makes the model and compares."""
    torch.manual_seed(0)
    config = transformers.MiniMaxM2Config(**TINY, head_dim=64, num_local_experts=16, num_experts_per_tok=4)
    compare(transformers.MiniMaxM2ForCausalLM(config))


if __name__ == "__main__":
    main()
