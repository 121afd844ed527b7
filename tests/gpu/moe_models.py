"""Small transformers models for tests: made, their experts dequantised in place, decoded with a static cache, eagerly or under a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from densemoe.runtime import layout
from densemoe.runtime.nvfp4 import Nvfp4Tensor
from densemoe.runtime.torch.weights import quantize_projection

FAMILIES = ("qwen3", "mixtral")


def tiny(family: str) -> Any:
    """A bf16 model of two layers with seeded random weights, on the CPU."""
    import transformers

    common = {"vocab_size": 97, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    if family == "qwen3":
        config = transformers.Qwen3MoeConfig(
            **common, moe_intermediate_size=64, intermediate_size=128, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, head_dim=32
        )
        made = transformers.Qwen3MoeForCausalLM
    else:
        config = transformers.MixtralConfig(**common, intermediate_size=128, num_local_experts=4, num_experts_per_tok=2)
        made = transformers.MixtralForCausalLM
    torch.manual_seed(0)
    return made(config).to(torch.bfloat16).eval()


def dequantise_experts(model: Any) -> Any:
    """Gives every expert, in place, the values that its NVFP4 weights have; gate and up share a global scale, as in ``replace_moe``."""
    for module in [each for each in model.modules() if getattr(each, "gate_up_proj", None) is not None]:
        with torch.no_grad():
            for stack in (module.gate_up_proj, module.down_proj):
                for expert in range(stack.shape[0]):
                    part = quantize_projection(stack[expert])
                    values = Nvfp4Tensor(part.codes, layout.tile_scales(part.scales), part.global_scale).dequantise("f32")
                    stack[expert] = torch.from_numpy(values).to(stack.dtype).to(stack.device)
    return model


class Decoder:
    """Greedy decoding with a static cache: every step is the same work on the same addresses, so that a CUDA graph may hold it.

    Args:
        prompt: ids ``[1, length]``.
    """

    def __init__(self, model: Any, prompt: torch.Tensor, longest: int = 64) -> None:
        import transformers

        self.model, self.prompt = model, prompt
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=longest)
        self.token = torch.zeros((1, 1), dtype=torch.long, device=prompt.device)

    @torch.no_grad()
    def step(self) -> None:
        """Puts the next token in place of the last."""
        logits = self.model(self.token, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    @torch.no_grad()
    def start(self) -> None:
        """Forgets what was decoded, and reads the prompt."""
        self.cache.reset()
        logits = self.model(self.prompt, past_key_values=self.cache, use_cache=True).logits
        self.token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    def decode(self, tokens: int, step: Any = None) -> list[int]:
        """The first ``tokens`` ids; ``step`` instead of the eager one, for example a graph's replay."""
        self.start()
        found = [int(self.token)]
        for _ in range(tokens - 1):
            (step or self.step)()
            found.append(int(self.token))
        return found
