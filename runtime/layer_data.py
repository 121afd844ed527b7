"""Seeded data of whole layers (contract section 9): bf16 weights that are made again, expert by expert, whenever they are asked for.

Weights are integers in [-127, 127] times a power of two: exact in bf16, quick to make, one byte each while they wait to be quantised. Their
size gives up and gate projections a standard deviation of 0.7 to 1.4 and an expert's output one of 0.15 to 0.3, whatever H and I, so that
NVFP4's own error stays below the 0.15 of the layers' mark. Nothing here holds more than one expert's weights at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from densemoe.runtime import packing
from densemoe.runtime.data import LayerCase
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.layout import interleave_up_gate, tile_scales
from densemoe.runtime.nvfp4 import LARGEST_E2M1, LARGEST_E4M3, bf16_bits, quantise_expert
from densemoe.runtime.reference import Weights
from densemoe.runtime.routing import route

__all__ = ["LayerData", "LayerExpert"]

Bytes = npt.NDArray[np.uint8]

_PROJECTIONS: Final = {"up": 0, "gate": 1, "down": 2}
_LARGEST_INTEGER: Final = 127
_INTEGER_STD: Final = math.sqrt(_LARGEST_INTEGER * (_LARGEST_INTEGER + 1) / 3)
_OUTPUT_STD: Final = 0.33  # of a down projection's row times √I


class LayerExpert(NamedTuple):
    """One expert's weights in every form that a run needs.

    Attributes:
        fc1_packed, fc2_packed: uint8 ``[expert_stride(op, H, I)]``.
        fc1, fc2: the same for the reference: an op of one expert, number 0.
        fc1_scale, fc2_scale: global scales.
    """

    fc1_packed: Bytes
    fc2_packed: Bytes
    fc1: Weights
    fc2: Weights
    fc1_scale: np.float32
    fc2_scale: np.float32


@dataclass(frozen=True)
class LayerData:
    """One layer's input, routing and weights.

    Attributes:
        case: E, k, H, I, M.
        seed: of everything.
        method: routing method, see ``routing.route``.
    """

    case: LayerCase
    seed: int = 0
    method: str = "Renormalize"

    def _rng(self, *what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *what])

    @property
    def x(self) -> npt.NDArray[np.uint16]:
        """The layer's input: bf16 bits ``[M, H]`` of standard normals."""
        return bf16_bits(self._rng(100).standard_normal((self.case.m, self.case.hidden), dtype=np.float32))

    def routing(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """ids int32 ``[M, k]`` and router weights float32 ``[M, k]``, of normal logits."""
        logits = self._rng(101).standard_normal((self.case.m, self.case.experts), dtype=np.float32)
        return route(self.method, logits, self.case.top_k)

    def _integers(self, projection: str, expert: int) -> npt.NDArray[np.int8]:
        if not 0 <= expert < self.case.experts:
            raise ProblemError(f"expert={expert}: use 0 to {self.case.experts - 1}")
        shape = (self.case.hidden, self.case.intermediate) if projection == "down" else (self.case.intermediate, self.case.hidden)
        return self._rng(_PROJECTIONS[projection], expert).integers(-_LARGEST_INTEGER, _LARGEST_INTEGER + 1, shape, dtype=np.int8)

    def _step(self, projection: str) -> float:
        """The power of two that an integer is multiplied by: the one nearest to the aim."""
        hidden, intermediate = math.sqrt(self.case.hidden), math.sqrt(self.case.intermediate)
        step = 2.0 ** round(math.log2(1 / (hidden * _INTEGER_STD)))
        if projection != "down":
            return step
        # SwiGLU's output grows about as the square of what goes in, whose size is off its aim by the rounding above
        swiglu = (step * hidden * _INTEGER_STD) ** 2
        return float(2.0 ** round(math.log2(_OUTPUT_STD / (intermediate * swiglu * _INTEGER_STD))))

    def projection(self, name: str, expert: int) -> npt.NDArray[np.float32]:
        """Unquantised weights, exact in bf16: ``up`` and ``gate`` ``[I, H]``, ``down`` ``[H, I]``."""
        return np.asarray(self._integers(name, expert) * np.float32(self._step(name)), dtype=np.float32)

    def unquantised(self, expert: int) -> tuple[Any, Any, Any]:
        """(up, gate, down) as float64, for ``reference.layer``."""
        up, gate, down = (self.projection(name, expert).astype(np.float64) for name in ("up", "gate", "down"))
        return up, gate, down

    def fc1_expert(self, expert: int) -> tuple[Bytes, Bytes, np.float32]:
        """One expert of FC1 in NVFP4: codes ``[2I, H/2]`` interleaved up/gate, row-major scales ``[2I, H/16]``, its global scale."""
        integers = interleave_up_gate(self._integers("up", expert), self._integers("gate", expert))
        codes, scales, scale = quantise_expert(integers)
        return codes, scales, np.float32(scale * np.float32(self._step("up")))  # a power of two changes no code and no scale byte

    def fc2_expert(self, expert: int) -> tuple[Bytes, Bytes, np.float32]:
        """One expert of FC2 in NVFP4: codes ``[H, I/2]``, row-major scales ``[H, I/16]``, its global scale."""
        codes, scales, scale = quantise_expert(self._integers("down", expert))
        return codes, scales, np.float32(scale * np.float32(self._step("down")))

    def expert(self, expert: int) -> LayerExpert:
        """One expert quantised and packed, beside what the reference reads."""
        codes1, scales1, scale1 = self.fc1_expert(expert)
        codes2, scales2, scale2 = self.fc2_expert(expert)
        return LayerExpert(
            packing.pack_expert("fc1", codes1, scales1),
            packing.pack_expert("fc2", codes2, scales2),
            Weights("fc1", codes1[None], tile_scales(scales1), 1),
            Weights("fc2", codes2, tile_scales(scales2), 1),
            scale1,
            scale2,
        )

    @property
    def output_multiplier(self) -> np.float32:
        """``output_multiplier`` of FC1's NVFP4 output: largest value 16, which few elements reach (they saturate)."""
        multiplier: np.float32 = np.float32(LARGEST_E4M3 * LARGEST_E2M1 / 16)
        return multiplier
