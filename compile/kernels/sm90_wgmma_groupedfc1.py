"""FC1 for sm_90a over gathered tokens, for more tokens an expert than ``sm90_groupedfc1``: same tensors, same packed weights, WGMMA.

The kernel is ``sm90_wgmma_kernel``.
"""

from __future__ import annotations

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.sm90_wgmma_config import check_tile as check
from densemoe.compile.kernels.sm90_wgmma_launch import compile_arguments, expected, oracle_arguments, recipe

__all__ = ["ARCHITECTURES", "OP", "WEIGHT_LAYOUT", "check", "compile_arguments", "expected", "oracle_arguments", "recipe"]

OP = "groupedfc1"
ARCHITECTURES = ("sm_90a",)
WEIGHT_LAYOUT = common.WEIGHT_LAYOUT
