"""NVFP4 experts as vLLM and SGLang keep them on a layer, packed for densemoe; and the layer's call, which both share.

Parameters of a layer, by the names that both hosts use: ``w13_weight`` uint8 ``[E, 2I, H/2]`` (gate rows first), ``w13_weight_scale`` e4m3
``[E, 2I, H/16]``, ``w13_weight_scale_2`` ``[E, 2]`` or ``[E]``, ``w2_weight`` ``[E, H, I/2]``, ``w2_weight_scale`` ``[E, H, I/16]``,
``w2_weight_scale_2`` ``[E]``, and where calibrated ``w13_input_scale``, ``w2_input_scale``. Scales are row-major, as loaded, not yet swizzled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.packing import LAYOUT
from densemoe.runtime.problem import GROUP
from densemoe.runtime.torch.config import MoEConfig
from densemoe.runtime.torch.module import DenseGemmMoE
from densemoe.runtime.torch.weights import MoEWeights, Projection, WeightStore

__all__ = ["StackedExperts", "weights_of"]

Tensor = Any


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def weights_of(layer: Any, layout: str = LAYOUT) -> MoEWeights:
    """Packs a layer's stacked experts, one at a time.

    Raises:
        CheckpointError: shapes or scales that do not fit.
    """
    experts, rows, half = layer.w13_weight.shape
    intermediate, hidden = rows // 2, half * 2
    store = WeightStore(experts, hidden, intermediate, layout, layer.w13_weight.device)
    scale13 = layer.w13_weight_scale_2.detach().float().cpu().reshape(experts, -1).numpy()
    scale2 = layer.w2_weight_scale_2.detach().float().cpu().reshape(experts).numpy()
    inputs = [_input_scales(layer, name, experts) for name in ("w13_input_scale", "w2_input_scale")]
    for expert in range(experts):
        codes, scales = _bytes(layer.w13_weight[expert]), _bytes(layer.w13_weight_scale[expert])
        parts = [
            Projection(codes[part], scales[part], scale13[expert, min(index, scale13.shape[1] - 1)], inputs[0][expert])
            for index, part in enumerate((slice(0, intermediate), slice(intermediate, rows)))
        ]
        down = Projection(_bytes(layer.w2_weight[expert]), _bytes(layer.w2_weight_scale[expert]), scale2[expert], inputs[1][expert])
        store.put(expert, gate=parts[0], up=parts[1], down=down)
    return store.finish()


def _input_scales(layer: Any, name: str, experts: int) -> list[np.float32 | None]:
    """The largest input scale of each expert's projections, or nothing where the layer was not calibrated."""
    given = getattr(layer, name, None)
    if given is None:
        return [None] * experts
    return [np.float32(each) for each in given.detach().float().cpu().reshape(experts, -1).max(dim=1)[0].tolist()]


class StackedExperts:
    """The MoE method that a host's layer calls: parameters, packed once they are loaded, then the layer with the host's own routing.

    Args:
        config: of the layer on this rank; refused layers raise ProblemError here, before any weight is touched.
    """

    def __init__(self, config: MoEConfig) -> None:
        self.moe: Any = DenseGemmMoE(config)
        self._layer = self.moe

    @classmethod
    def derived(cls, base: type) -> type:
        """This method as a subclass of the host's abstract class."""
        return type(cls.__name__, (cls, base), {"__doc__": cls.__doc__, "__module__": cls.__module__})

    def create_weights(
        self, layer: Any, num_experts: int, hidden_size: int, intermediate_size_per_partition: int, params_dtype: Any, **extra_weight_attrs: Any
    ) -> None:
        """Registers the parameters, uninitialised, with the attributes that the host's weight loader asks for.

        Raises:
            ProblemError: sizes that are not those of the config.
        """
        c = self._layer.config
        expected, found = (c.rank_experts, c.hidden, c.rank_intermediate), (num_experts, hidden_size, intermediate_size_per_partition)
        if found != expected:
            raise ProblemError(f"the host's layer has (E, H, I) {found} on this rank: the config says {expected}")
        e, h, i = found
        shapes: dict[str, tuple[tuple[int, ...], Any, str]] = {
            "w13_weight": ((e, 2 * i, h // 2), torch.uint8, ""),
            "w13_weight_scale": ((e, 2 * i, h // GROUP), torch.float8_e4m3fn, "block"),
            "w13_weight_scale_2": ((e, 2), torch.float32, "tensor"),
            "w13_input_scale": ((e, 2), torch.float32, "tensor"),
            "w2_weight": ((e, h, i // 2), torch.uint8, ""),
            "w2_weight_scale": ((e, h, i // GROUP), torch.float8_e4m3fn, "block"),
            "w2_weight_scale_2": ((e,), torch.float32, "tensor"),
            "w2_input_scale": ((e,), torch.float32, "tensor"),
        }
        for name, (shape, dtype, quant_method) in shapes.items():
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
            for key, value in {**extra_weight_attrs, **({"quant_method": quant_method} if quant_method else {})}.items():
                setattr(parameter, key, value)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Packs the layer's parameters and frees them."""
        self._layer.load(weights_of(layer, self._layer.config.layout))
        for name in ("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"):
            setattr(layer, name, None)

    def routed(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Hidden states ``[M, H]`` of hidden states, router weights and ids ``[M, k]``."""
        return self._layer(x, ids=topk_ids.contiguous(), weights=topk_weights)
