"""SGLang: a fused-MoE method for NVFP4 layers. SGLang passes ``apply`` a dispatch output: hidden states and the router's choice."""

from __future__ import annotations

from typing import Any

from densemoe.runtime.torch.adapters.stacked import StackedExperts

__all__ = ["DensemoeMoEMethod"]


class DensemoeMoEMethod(StackedExperts):
    """``process_weights_after_loading(layer)``, then ``apply(layer, dispatch_output)``."""

    def apply(self, layer: Any, dispatch_output: Any, *unused: Any) -> Any:
        """Hidden states ``[M, H]`` of ``dispatch_output.hidden_states`` and its ``topk_output.topk_weights`` and ``.topk_ids``."""
        choice = dispatch_output.topk_output
        return super().apply(layer, dispatch_output.hidden_states, choice.topk_weights, choice.topk_ids)
