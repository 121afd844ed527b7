"""``replace_moe``: the experts of a ``transformers`` model, quantised to NVFP4 and run by densemoe. Router, attention and the rest stay.

Works on every model whose experts are one module with stacked ``gate_up_proj`` ``[E, 2I, H]`` and ``down_proj`` ``[E, H, I]``, called as
``experts(hidden_states, top_k_index, top_k_weights)``: Qwen2-MoE, Qwen3-MoE, Mixtral and their like in transformers 5.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from densemoe.runtime import packing
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.torch.config import MoEConfig, fused_by_default
from densemoe.runtime.torch.module import DenseGemmMoE
from densemoe.runtime.torch.weights import MoEWeights, Projection, WeightStore, quantize_projection

__all__ = ["Experts", "quantize_experts", "replace_moe"]

Tensor = Any
_log = logging.getLogger("densemoe")
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


class Experts(torch.nn.Module):  # type: ignore[misc]
    """A DenseGemmMoE with the signature of transformers' expert modules."""

    def __init__(self, moe: DenseGemmMoE) -> None:
        super().__init__()
        self.moe = moe
        self.num_experts = moe.config.experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[M, H]`` of ``[M, H]``, ids and weights ``[M, k]``."""
        return self.moe(hidden_states, ids=top_k_index.contiguous(), weights=top_k_weights)


def quantize_experts(
    gate_up: Tensor,
    down: Tensor,
    *,
    layout: str = packing.LAYOUT,
    device: Any = None,
    between_scale: float | None = None,
    input_scale: float | None = None,
) -> MoEWeights:
    """NVFP4 of stacked experts, one at a time; gate and up of an expert share the larger one's global scale, as calibration tools do.

    Args:
        gate_up: ``[E, 2I, H]``, gate first. down: ``[E, H, I]``.
        input_scale, between_scale: calibrated dequantisation factors of NVFP4 activations.
    """
    experts, rows, hidden = gate_up.shape
    store = WeightStore(experts, hidden, rows // 2, layout, gate_up.device if device is None else device)
    for expert in range(experts):
        both = quantize_projection(gate_up[expert])
        half = rows // 2
        gate, up = (Projection(both.codes[part], both.scales[part], both.global_scale) for part in (slice(0, half), slice(half, rows)))
        store.put(expert, gate=gate, up=up, down=quantize_projection(down[expert]))
    made = store.finish()
    return MoEWeights(**{**made.__dict__, "input_scale": input_scale, "between_scale": between_scale})


def replace_moe(model: Any, *, layout: str = packing.LAYOUT, fused_alpha: bool | None = None) -> list[str]:
    """Replaces every stacked experts module of ``model`` in place; unquantised weights are freed layer by layer.

    Args:
        fused_alpha: see MoEConfig; its default where absent.

    Returns:
        Names of the modules that were replaced.

    Raises:
        ProblemError: a layer that densemoe cannot run (nothing is replaced then), or no layer at all.
    """
    found = [(name, module) for name, module in model.named_modules() if _is_experts(module)]
    if not found:
        raise ProblemError(f"{type(model).__name__} has no experts module with gate_up_proj and down_proj: replace_moe knows no other form")
    configs = [_config(model, name, module, layout, fused_alpha) for name, module in found]
    for config in configs:
        DenseGemmMoE(config)
    for (name, module), config in zip(found, configs, strict=True):
        with warnings.catch_warnings():
            weights = quantize_experts(module.gate_up_proj.detach(), module.down_proj.detach(), layout=layout)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, Experts(DenseGemmMoE(config, weights)))
        _log.info("%s: densemoe (NVFP4, E %d, H %d, I %d)", name, config.experts, config.hidden, config.intermediate)
    return [name for name, _ in found]


def _is_experts(module: Any) -> bool:
    return all(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in ("gate_up_proj", "down_proj"))


def _refusal(module: Any) -> str:
    """What an experts module does that the layer does not, by the marks that transformers puts on it; nothing where it is plain SwiGLU."""
    gate = getattr(type(module), "_apply_gate", None)
    marks = (
        (getattr(module, "has_bias", False), "its experts have biases, the kernels add none"),
        (not getattr(module, "has_gate", True), "its experts have no gate, only SwiGLU is supported"),
        (getattr(module, "has_post_expert_norm", False), "it normalises every expert's output, the kernels do not"),
        (gate is not None and gate.__name__ != "_default_apply_gate", "its gate is its own (gpt-oss's, a limit), only up · silu(gate) is supported"),
        (getattr(module, "is_transposed", False), "its experts are stored transposed, [E, 2I, H] and [E, H, I] are read"),
        (not getattr(module, "is_concatenated", True), "its gate and up projections are interleaved, gate first and up behind it are read"),
    )
    return next((reason for found, reason in marks if found), "")


def _config(model: Any, name: str, module: Any, layout: str, fused_alpha: bool | None) -> MoEConfig:
    reason = _refusal(module)
    if reason:
        raise ProblemError(f"{name} ({type(module).__name__}): {reason}")
    experts, rows, hidden = module.gate_up_proj.shape
    down = tuple(module.down_proj.shape)
    if down != (experts, hidden, rows // 2):
        raise ProblemError(f"{name}: gate_up_proj {[experts, rows, hidden]} and down_proj {list(down)}: [E, 2I, H] and [E, H, I] belong together")
    if module.gate_up_proj.dtype not in _DTYPES:
        raise ProblemError(f"{name} is {module.gate_up_proj.dtype}: load the model in bfloat16 or float16")
    activation = type(getattr(module, "act_fn", None)).__name__
    # a model-wide setting; the router gives ids and weights, so the number of experts a token is only a limit here
    top_k = getattr(model.config, "num_experts_per_tok", 1)
    return MoEConfig(
        experts,
        top_k,
        hidden,
        rows // 2,
        dtype=_DTYPES[module.gate_up_proj.dtype],
        layout=layout,
        fused_alpha=fused_by_default() if fused_alpha is None else fused_alpha,
        activation="silu" if activation in ("SiLU", "SiLUActivation") else activation,
        bias=any(getattr(module, f"{each}_bias", None) is not None for each in ("gate_up_proj", "down_proj")),
    )
