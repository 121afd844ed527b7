"""Mixtral with densemoe's MoE layers: a small model with random weights, its logits beside those of the bf16 model.

    python examples/mixtral.py [cpu|cuda]

Routing Renormalize, done by the model. Needs torch and transformers 5.
"""

from __future__ import annotations

import torch
import transformers
from compare import TINY, compare


def main() -> None:
    """Makes the model and compares."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**TINY, num_local_experts=8, num_experts_per_tok=2)
    compare(transformers.MixtralForCausalLM(config))


if __name__ == "__main__":
    main()
