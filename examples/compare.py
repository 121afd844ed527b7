"""What the examples of this folder share: a model's experts replaced by densemoe, beside the model as it was."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch

from densemoe.runtime.torch import replace_moe

#: Sizes small enough for a CPU, where the ops run their exact reference.
TINY = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def compare(made: Any) -> None:
    """Replaces, compares logits, generates. ``made`` is a transformers model; the first argument of the command line names the device."""
    device = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    plain = made.to(torch.bfloat16).eval().to(device)
    model = copy.deepcopy(plain)
    print("replaced:", ", ".join(replace_moe(model)))
    ids = torch.arange(32, device=device).reshape(2, 16) * 7 % 512
    with torch.no_grad():
        ours, theirs = model(ids).logits.float(), plain(ids).logits.float()
    print(f"logits: rms error {float((ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()):.1%} of the bf16 model's rms")
    print("generated:", model.generate(ids[:1, :8], max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, 8:].tolist())
