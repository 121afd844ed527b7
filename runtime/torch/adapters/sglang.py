"""SGLang: a fused-MoE method for NVFP4 layers. SGLang passes ``apply`` a dispatch output (hidden states and the router's choice) and takes a combine
input. Under expert parallelism its dispatcher gives ids local to the rank, -1 for those of others.

SGLang asks for subclasses of its ``FusedMoEMethodBase``: ``DensemoeMoEMethod.derived(FusedMoEMethodBase)``.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.torch.adapters.stacked import StackedExperts

__all__ = ["DensemoeMoEMethod"]

_DISPATCHER = "sglang.srt.layers.moe.token_dispatcher.standard"


class _CombineInput(NamedTuple):
    """What SGLang's StandardCombineInput is, where SGLang is not loaded."""

    hidden_states: Any


class DensemoeMoEMethod(StackedExperts):
    """``create_weights``, ``process_weights_after_loading(layer)``, ``create_moe_runner``, then ``apply(layer, dispatch_output)``."""

    runner: Any = None

    def create_moe_runner(self, layer: Any, moe_runner_config: Any) -> None:
        """Keeps SGLang's config of the layer; there is no other runner."""
        self.moe_runner_config = moe_runner_config

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        """A combine input with hidden states ``[M, H]``, of ``dispatch_output.hidden_states`` and its ``topk_output.topk_weights``, ``.topk_ids``.

        Raises:
            ProblemError: the hidden states were quantised by the dispatcher.
        """
        if getattr(dispatch_output, "hidden_states_scale", None) is not None:
            raise ProblemError("the dispatcher quantised the hidden states: densemoe quantises them itself; turn the FP4 all-gather off")
        choice, first = dispatch_output.topk_output, self.moe.config.first_expert
        ids = choice.topk_ids
        if first:
            ids = ids + first * (ids >= 0)
        out = self.routed(dispatch_output.hidden_states, choice.topk_weights, ids)
        host = sys.modules.get(_DISPATCHER)
        return _CombineInput(out) if host is None else host.StandardCombineInput(hidden_states=out)
