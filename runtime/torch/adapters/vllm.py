"""vLLM: a fused-MoE method for NVFP4 layers. vLLM makes the parameters through it, routes, and sums over ranks itself.

vLLM asks for subclasses of its ``FusedMoEMethodBase``; ``derived`` makes one without this module importing vLLM:

    Method = DensemoeFusedMoEMethod.derived(FusedMoEMethodBase)    # in a quantisation config's get_quant_method
    return Method(config, moe=layer.moe_config)
"""

from __future__ import annotations

from typing import Any

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.torch.adapters.stacked import StackedExperts
from densemoe.runtime.torch.config import MoEConfig

__all__ = ["DensemoeFusedMoEMethod"]


class DensemoeFusedMoEMethod(StackedExperts):
    """``create_weights``, ``process_weights_after_loading(layer)``, then ``apply``, as vLLM's FusedMoEMethodBase has them.

    Args:
        config: of the layer on this rank.
        moe: vLLM's own config of the layer, for its base class.
    """

    def __init__(self, config: MoEConfig, moe: Any = None) -> None:
        super().__init__(config)
        self.moe = moe
        self.moe_quant_config = self.moe_kernel = None

    @property
    def topk_indices_dtype(self) -> Any:
        """Of the ids that vLLM's router gives: whatever it has."""
        return None

    @property
    def is_monolithic(self) -> bool:
        """vLLM routes."""
        return False

    @property
    def supports_eplb(self) -> bool:
        """Experts move by ``DenseGemmMoE.update_expert``, not by vLLM's exchange of parameters: they are freed after packing."""
        return False

    def uses_weight_scale_2_pattern(self) -> bool:
        """Weights have a second, tensor-wide scale."""
        return True

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """None: vLLM's own kernels are not used."""
        return None

    def apply(self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, shared_experts: Any = None, shared_experts_input: Any = None) -> Any:
        """Hidden states ``[M, H]``. Shared experts are the host's: they are not run here."""
        return self.routed(x, topk_weights, topk_ids)

    def apply_monolithic(self, layer: Any, x: Any, router_logits: Any, input_ids: Any = None) -> Any:
        """Not supported: the host routes.

        Raises:
            ProblemError: always.
        """
        raise ProblemError("apply_monolithic: this method is given ids and weights; call apply")
