"""vLLM: a fused-MoE method for NVFP4 layers. vLLM passes ``apply`` the router's weights and ids; its layer sums over ranks itself."""

from __future__ import annotations

from typing import Any

from densemoe.runtime.torch.adapters.stacked import StackedExperts

__all__ = ["DensemoeFusedMoEMethod"]


class DensemoeFusedMoEMethod(StackedExperts):
    """``process_weights_after_loading(layer)``, then ``apply(layer, x, topk_weights, topk_ids, …)``, as vLLM's FusedMoEMethodBase has them."""

    def apply(self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, shared_experts_input: Any = None) -> Any:
        """Hidden states ``[M, H]``. Shared experts are the host's: their input is not used here."""
        return super().apply(layer, x, topk_weights, topk_ids)
