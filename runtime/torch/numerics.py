"""What NVFP4 costs: the error of a layer against its unquantised self in float64, by form and number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from densemoe.runtime import packing, reference
from densemoe.runtime.data import LayerCase
from densemoe.runtime.layer_data import LayerData
from densemoe.runtime.torch import ops

__all__ = ["FORMS", "Row", "report"]

#: Form → (input in NVFP4, NVFP4 between FC1 and FC2, fused alpha).
FORMS: Final = {
    "bf16": (False, False, False),
    "nvfp4 between": (False, True, False),
    "nvfp4": (True, True, False),
    "nvfp4 fused alpha": (True, True, True),
}
_LARGEST_INPUT: Final = 6.0  # of standard normals: few elements saturate
_MARK_ABSOLUTE: Final = 0.15  # of contract section 9
_MARK_RELATIVE: Final = 0.01


@dataclass(frozen=True)
class Row:
    """One form at one number of tokens.

    Attributes:
        relative_error: root mean square of the error over that of the exact output.
        largest: largest error over the root mean square of the exact output.
        share: outputs within 0.15 + 1 % of the exact ones (contract section 9 asks for 97 % in the default form).
    """

    tokens: int
    form: str
    relative_error: float
    largest: float
    share: float


def report(experts: int, top_k: int, hidden: int, intermediate: int, *, tokens: Sequence[int] = (1, 8, 64), device: Any = "cpu") -> list[Row]:
    """Rows for every number of tokens and form, on seeded weights and normal inputs; weights are made once.

    Args:
        device: ``cpu`` runs the exact reference of the ops, ``cuda`` the kernels.
    """
    weights = LayerData(LayerCase(experts, top_k, hidden, intermediate, 1))
    made = [weights.expert(e) for e in range(experts)]
    packed = [torch.from_numpy(np.concatenate([getattr(each, f"fc{op}_packed") for each in made])).to(device) for op in (1, 2)]
    scales = [torch.tensor([float(getattr(each, f"fc{op}_scale")) for each in made], device=device) for op in (1, 2)]
    rows = []
    for m in tokens:
        case = LayerData(LayerCase(experts, top_k, hidden, intermediate, m))
        x = torch.from_numpy(case.x.view(np.int16)).view(torch.bfloat16)
        ids, router = case.routing()
        exact = reference.layer(x.double(), lambda e: tuple(map(torch.from_numpy, weights.unquantised(e))), ids, router)
        size = float(exact.square().mean().sqrt())
        for form, (given, between, fused) in FORMS.items():
            first = torch.tensor([2688 / _LARGEST_INPUT], device=device) if given else None
            second = torch.tensor([float(case.output_multiplier)], device=device) if between else None
            alpha1 = scales[0] if first is None else scales[0] / first
            alpha2 = scales[1] if second is None else scales[1] / second
            largest = alpha2.max().reshape(1) if fused else None
            choice = (torch.from_numpy(ids).to(device), torch.from_numpy(router).to(device))
            weights_and_sizes = (packed[0], alpha1, packed[1], alpha2, hidden, intermediate, packing.LAYOUT, "bf16")
            out = ops.moe(x.to(device), *choice, *weights_and_sizes, first, second, alpha_max=largest).double().cpu()
            error = (out - exact).abs()
            within = (error <= _MARK_ABSOLUTE + _MARK_RELATIVE * exact.abs()).double().mean()
            rows.append(Row(m, form, float(error.square().mean().sqrt()) / size, float(error.max()) / size, float(within)))
    return rows
