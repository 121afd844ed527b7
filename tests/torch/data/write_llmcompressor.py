"""Writes the checkpoint beside this file with llm-compressor, which wants other versions of transformers and compressed-tensors than the tests do:

    python -m venv env && env/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    env/bin/python tests/torch/data/write_llmcompressor.py

A Qwen3-MoE of one layer and two experts with random weights; NVFP4 weights, and activations calibrated on four short texts of random ids.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier


def main() -> None:
    """Writes llmcompressor_qwen3.safetensors."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=32, intermediate_size=64,
        moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(f"{folder}/plain")
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/plain", dtype=torch.bfloat16)
        data = Dataset.from_dict({"input_ids": torch.randint(0, 32, (4, 16)).tolist(), "attention_mask": [[1] * 16] * 4})
        recipe = QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head", "re:.*gate$", "re:.*self_attn.*"])
        oneshot(model=model, dataset=data, recipe=recipe, num_calibration_samples=4, max_seq_length=16)
        model.save_pretrained(f"{folder}/done", save_compressed=True)
        shutil.copy(f"{folder}/done/model.safetensors", Path(__file__).with_name("llmcompressor_qwen3.safetensors"))


if __name__ == "__main__":
    main()
