"""The quick start's layer without a device: its problems, inputs and packed weights, and the judgement of what a device gave.

FC1 and FC2 in the default form (contract section 5). Needs the extra [host].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from densemoe.runtime import bounds, data, marks, reference
from densemoe.runtime.layer_data import LayerData, LayerExpert
from densemoe.runtime.layout import tile_scales
from densemoe.runtime.nvfp4 import bf16_values, quantise_expert, widen
from densemoe.runtime.problem import Problem

__all__ = ["INTO", "LayerRun", "Verdict"]

Array = npt.NDArray[Any]
#: Where FC2 reads what FC1 writes.
INTO: Mapping[str, str] = {"c": "a", "c.codes": "a.codes", "c.scales": "a.scales"}


@dataclass(frozen=True)
class Verdict:
    """What a layer's outputs are worth.

    Attributes:
        fc1, fc2: against their bounds; FC2 on FC1's actual output.
        mark: share of outputs within 0.15 + 1 % of the unquantised layer; 0.97 passes (contract section 9).
        checked: what was compared, in words.
    """

    fc1: bounds.Report
    fc2: bounds.Report
    mark: float
    checked: str
    passed: bool


@dataclass(frozen=True)
class LayerRun:
    """One layer to run. Only the routed experts' weights are made; the others' memory holds a routed expert's, of which nothing may reach the output.

    Attributes:
        a_dtype: of the layer's input; FC1's output is NVFP4 with NVFP4 input, else bf16.
        listed: the kernels get the list of active experts and skip the others.
    """

    m: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    a_dtype: str = "bf16"
    seed: int = 0
    listed: bool = False

    @property
    def shape(self) -> dict[str, int]:
        """M, E, k, H and I by name."""
        return {name: getattr(self, name) for name in ("m", "experts", "top_k", "hidden", "intermediate")}

    @property
    def _middle(self) -> str:
        return "nvfp4" if self.a_dtype == "nvfp4" else "bf16"

    @cached_property
    def first(self) -> Problem:
        """FC1."""
        return Problem("fc1", self.m, self.experts, self.hidden, self.intermediate, self.a_dtype, self._middle, active_list=self.listed)

    @cached_property
    def second(self) -> Problem:
        """FC2."""
        return Problem("fc2", self.m, self.experts, self.hidden, self.intermediate, self._middle, "bf16", active_list=self.listed)

    @cached_property
    def _layer(self) -> LayerData:
        return LayerData(data.LayerCase(self.experts, self.top_k, self.hidden, self.intermediate, self.m), self.seed)

    @cached_property
    def _routing(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        return self._layer.routing()

    @cached_property
    def routed(self) -> list[int]:
        """Experts with a token, ascending."""
        return [int(e) for e in np.unique(self._routing[0])]

    @cached_property
    def _made(self) -> dict[int, LayerExpert]:
        return {expert: self._layer.expert(expert) for expert in self.routed}

    @cached_property
    def _every(self) -> list[LayerExpert]:
        return [self._made.get(expert, self._made[self.routed[0]]) for expert in range(self.experts)]

    @cached_property
    def _input(self) -> tuple[dict[str, Array], Array, np.float32]:
        """(arrays by role, float64 values without the global scale, global scale)."""
        if self.a_dtype == "bf16":
            return {"a": self._layer.x}, bf16_values(self._layer.x).astype(np.float64), np.float32(1)
        codes, scales, scale = quantise_expert(bf16_values(self._layer.x))
        tiled = tile_scales(scales)
        return {"a.codes": codes, "a.scales": tiled}, reference.activation_values(codes, tiled), scale

    @cached_property
    def _alphas(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(FC1's ``[E]``, FC2's ``[M, E]``)."""
        dequant = self._layer.output_multiplier if self._middle == "nvfp4" else 1
        first = np.array([each.fc1_scale * self._input[2] for each in self._every], dtype=np.float32)
        w2_alpha = np.array([each.fc2_scale / dequant for each in self._every], dtype=np.float32)
        return first, reference.build_alpha(*self._routing, w2_alpha, experts=self.experts)

    @property
    def fc1_weights(self) -> list[Array]:
        """Packed weights, expert by expert: ``b`` is all of them end to end."""
        return [each.fc1_packed for each in self._every]

    @property
    def fc2_weights(self) -> list[Array]:
        """As ``fc1_weights``."""
        return [each.fc2_packed for each in self._every]

    def fc1_inputs(self) -> dict[str, Array]:
        """FC1's inputs by role, but for the weights."""
        arrays = {**self._input[0], "alpha": self._alphas[0], **self._list()}
        if self._middle == "nvfp4":
            arrays["output_multiplier"] = np.array([self._layer.output_multiplier])
        return arrays

    def fc2_inputs(self) -> dict[str, Array]:
        """FC2's inputs by role, but for the weights and FC1's output."""
        return {"alpha": self._alphas[1], **self._list()}

    def _list(self) -> dict[str, Array]:
        if not self.listed:
            return {}
        return {"active_experts": np.array([len(self.routed), *self.routed, *[0] * (self.experts - len(self.routed))], dtype=np.int32)}

    def judge(self, got: Mapping[str, Array], result: npt.NDArray[np.uint16]) -> Verdict:
        """FC1 and FC2 within their bounds, the layer by its mark. Experts without a token have alpha 0 for all: the reference leaves them out.

        Args:
            got: FC1's outputs by role.
            result: FC2's output, bf16 bits ``[M, H]``.
        """
        a, a_scale = self._input[1:]
        made, routed, width = self._made, self.routed, self.intermediate
        columns = np.concatenate([np.arange(e * width, (e + 1) * width) for e in routed])
        exact1 = reference.fc1(a, lambda e: made[e].fc1(0), self._alphas[0].astype(np.float64), routed)
        multiplier = float(self._layer.output_multiplier)
        one = bounds.compare_fc1(got, exact1, self.first, output_multiplier=multiplier, columns=columns)
        values = widen(got["c"], self.first.c_dtype) if "c" in got else reference.activation_values(got["c.codes"], got["c.scales"])
        alpha = self._alphas[1][:, routed].astype(np.float64)
        exact2 = reference.fc2(values[:, columns], lambda i: made[routed[i]].fc2(0), alpha, len(routed), width)
        two = bounds.compare_fc2({"c": result}, exact2, self.second)
        unquantised = reference.layer(a * float(a_scale), self._layer.unquantised, *self._routing)
        mark = marks.layer_mark(widen(result, "bf16"), unquantised)
        return Verdict(
            one,
            two,
            1 - mark.worst * (1 - marks.LAYER_SHARE),
            f"{len(routed)} routed experts of FC1 (of {self.experts}), all of FC2",
            one.passed and two.passed and mark.passed,
        )
