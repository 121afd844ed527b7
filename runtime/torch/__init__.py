"""densemoe for PyTorch: ops, the MoE module, checkpoints, parallelism. Importing it registers the ops (``torch.ops.densemoe``).

Needs the extra [torch]. On a CPU the ops run a slow, exact reference; on a GPU the kernels of the installed artifact set.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from densemoe.runtime.torch import ops
from densemoe.runtime.torch.ops import fc1_swiglu, fc2, moe, quantize_nvfp4

#: Public name → the module that has it, imported on first use.
_LAZY: Final = {
    "DenseGemmMoE": "module",
    "MoEConfig": "config",
    "MoEWeights": "weights",
    "can_implement": "config",
    "create_moe": "module",
    "replace_moe": "replace",
    "route": "routing",
}

__all__ = ["fc1_swiglu", "fc2", "moe", "ops", "quantize_nvfp4", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"densemoe.runtime.torch.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'densemoe.runtime.torch' has no attribute {name!r}: it has {', '.join(__all__)}")
