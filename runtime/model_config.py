"""Hugging Face ``config.json`` → the mixture-of-experts layer that it describes, or why densemoe cannot run it.

Configurations of public models lie in ``artifacts/models``: the fields that decide a layer's shape, nothing else. No model is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.canonical import read_file
from densemoe.runtime.errors import ArtifactError, ProblemError
from densemoe.runtime.problem import LARGEST_DIMENSION

__all__ = ["MoeLayer", "model_names", "read_config"]

_LARGEST_CONFIG: Final = 4 << 20  # bytes; configurations have some kilobytes, with a quantisation list some hundred
#: Dimensions that the kernels read must be whole columns of the 128x4 scale tiles (contract section 8).
UNIT: Final = 64


@dataclass(frozen=True)
class _Family:
    """Names of the fields that one ``model_type`` uses."""

    experts: str
    intermediate: str
    top_k: Sequence[str] = ("num_experts_per_tok",)


_ROUTED: Final = _Family("n_routed_experts", "moe_intermediate_size")
_FAMILIES: Final[Mapping[str, _Family]] = {
    "deepseek_v2": _ROUTED,
    "deepseek_v3": _ROUTED,
    "deepseek_v32": _ROUTED,
    "glm4_moe": _ROUTED,
    "kimi_k2": _ROUTED,
    "qwen2_moe": _Family("num_experts", "moe_intermediate_size"),
    "qwen3_moe": _Family("num_experts", "moe_intermediate_size"),
    "qwen3_next": _Family("num_experts", "moe_intermediate_size"),
    "mixtral": _Family("num_local_experts", "intermediate_size"),
    "minimax_m2": _Family("num_local_experts", "intermediate_size"),
    "gpt_oss": _Family("num_local_experts", "intermediate_size", ("num_experts_per_tok", "experts_per_token")),
    "llama4_text": _Family("num_local_experts", "intermediate_size"),
}
#: What a family does that the contract's layer does not, whatever its sizes.
_REFUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "gpt_oss": (
        "its activation is (up + 1) * gate * sigmoid(1.702 * gate) with both halves clamped (swiglu_limit), not SwiGLU",
        "its expert projections have biases, which the kernels do not add",
    ),
    "llama4_text": ("it multiplies the router's weight into the layer's input, before the activation, not into its output",),
}


@dataclass(frozen=True)
class MoeLayer:
    """A mixture-of-experts layer, whole.

    Attributes:
        model: where it was read from.
        model_type: as the configuration says.
        experts, top_k: routed experts, and how many each token takes.
        hidden, intermediate: H, and I of one expert.
        shared: I of the shared experts, which run beside the layer, 0 where there are none.
        refused: reasons why densemoe cannot run it at all.
    """

    model: str
    model_type: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    shared: int = 0
    refused: tuple[str, ...] = ()

    def shard(self, tensor_parallel: int, expert_parallel: int) -> tuple[int, int]:
        """Experts and I that one rank holds.

        Raises:
            ProblemError: the layer does not divide that way into shapes that the kernels take.
        """
        if self.experts % expert_parallel:
            raise ProblemError(f"{self.experts} experts do not divide by expert parallelism {expert_parallel}: use a divisor")
        if self.intermediate % tensor_parallel or self.intermediate // tensor_parallel % UNIT:
            fitting = [n for n in range(1, self.intermediate // UNIT + 1) if self.intermediate % (n * UNIT) == 0]
            raise ProblemError(
                f"I = {self.intermediate} over tensor parallelism {tensor_parallel} gives {self.intermediate / tensor_parallel:g},"
                f" which is no multiple of {UNIT}: use one of {', '.join(map(str, fitting)) or 'none: I itself is none'}"
            )
        return self.experts // expert_parallel, self.intermediate // tensor_parallel


def model_names() -> tuple[str, ...]:
    """Names of the models whose configuration densemoe brings."""
    folder = resources.files("densemoe.artifacts").joinpath("models")
    return tuple(sorted(each.name.removesuffix(".json") for each in folder.iterdir() if each.name.endswith(".json")))


def read_config(model: str) -> MoeLayer:
    """The layer that a model's configuration describes.

    Args:
        model: path of a ``config.json``, of a folder that holds one, or a name of ``model_names``.

    Raises:
        ProblemError: there is no such file, or it describes no mixture of experts that is known.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        if model.lower() not in model_names():
            raise ProblemError(f"{model!r} is no config.json, no folder with one, and no known model: {', '.join(model_names())}")
        path = Path(str(resources.files("densemoe.artifacts").joinpath("models"))) / f"{model.lower()}.json"
    try:
        document = json.loads(read_file(path.resolve(), _LARGEST_CONFIG))
    except (ArtifactError, ValueError, RecursionError) as error:
        raise ProblemError(f"{path} cannot be read: {error}") from None
    return _layer(model, document)


def _layer(model: str, document: Any) -> MoeLayer:
    if not isinstance(document, dict):
        raise ProblemError(f"{model}: a configuration is a JSON object")
    if isinstance(document.get("text_config"), dict) and document.get("model_type") not in _FAMILIES:
        document = document["text_config"]  # a multimodal model's language part
    model_type = document.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ProblemError(f"{model}: model_type {model_type!r} is not known; use one of {', '.join(_FAMILIES)}, or ask for it in an issue")

    def integer(names: Sequence[str]) -> int:
        for name in names:
            if name in document:
                value = document[name]
                if type(value) is not int or not 1 <= value <= LARGEST_DIMENSION:
                    raise ProblemError(f"{model}: {name} = {value!r}: an integer from 1 to {LARGEST_DIMENSION} belongs there")
                return value
        raise ProblemError(f"{model}: {' or '.join(names)} is missing: a {model_type} configuration has it")

    experts, hidden, intermediate = integer((family.experts,)), integer(("hidden_size",)), integer((family.intermediate,))
    refused = list(_REFUSED.get(str(model_type), ()))
    activation = document.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        refused.append(f"its activation is {activation!r}; the kernels fuse SwiGLU, which is 'silu'")
    for name, size in (("hidden_size", hidden), (family.intermediate, intermediate)):
        if size % UNIT:
            refused.append(f"{name} = {size} is no multiple of {UNIT}")
    return MoeLayer(
        model=model,
        model_type=str(model_type),
        experts=experts,
        top_k=integer(family.top_k),
        hidden=hidden,
        intermediate=intermediate,
        shared=_shared(document, intermediate),
        refused=tuple(refused),
    )


def _shared(document: Mapping[str, Any], intermediate: int) -> int:
    count, size = document.get("n_shared_experts"), document.get("shared_expert_intermediate_size")
    if type(size) is int:
        return size
    return count * intermediate if type(count) is int else 0
