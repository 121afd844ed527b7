"""``densemoe coverage``: for every bucket of M that a model's layer meets, whether a variant runs it, and whether that choice was measured.

Exit codes: 0 every bucket has a variant, 1 one has none or the model is refused, 2 the configuration or an option cannot be used,
3 there are no artifacts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from densemoe.runtime.errors import DensemoeError, ProblemError, SelectionError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.model_config import MoeLayer
from densemoe.runtime.problem import Problem
from densemoe.runtime.rules import can_implement
from densemoe.runtime.select import bucket, load_table, select
from densemoe.runtime.variant import OPS, Variant

__all__ = ["NONE", "TOKENS", "Cell", "cover"]

NONE: Final = "none"
#: One M of every bucket in which decode and small prefills run; larger M are prefill, where a dense layer over all experts is the wrong form.
TOKENS: Final = (1, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 256, 384, 512)


@dataclass(frozen=True)
class Cell:
    """One bucket of one kernel.

    Attributes:
        arch: of the set.
        activations: ``bf16`` or ``nvfp4``: what FC1 reads and passes on to FC2; the layer's output is bf16.
        op: ``fc1`` or ``fc2``.
        m: the bucket's largest M.
        state: ``measured``, ``modelled`` or ``none``.
        key: the variant.
        reason: why that one, or why none.
    """

    arch: str
    activations: str
    op: str
    m: int
    state: str
    key: str
    reason: str


def cover(
    layer: MoeLayer,
    artifacts: str | os.PathLike[str] | None = None,
    *,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    activations: Sequence[str] = ("bf16", "nvfp4"),
    tokens: Sequence[int] = TOKENS,
    architectures: Sequence[str] = (),
) -> list[Cell]:
    """Every (architecture, activations, op, bucket) of ``layer`` on one rank.

    Args:
        architectures: only these; all that the artifacts have where empty.

    Raises:
        ArtifactError: the artifacts cannot be read, or have no set for an architecture.
        ProblemError: the layer is refused, or does not divide as asked.
    """
    if layer.refused:
        raise ProblemError(f"{layer.model} ({layer.model_type}) cannot run on densemoe: {'; '.join(layer.refused)}")
    experts, intermediate = layer.shard(tensor_parallel, expert_parallel)
    found = ArtifactSet(artifacts)
    cells = []
    for arch in architectures or found.architectures:
        variants = [Variant.parse(key) for key in found.manifest(arch).variants]
        for dtype in activations:
            for op in OPS:
                for m in sorted({bucket(each) for each in tokens}):
                    # FC1 passes its activations' dtype on to FC2, whose output is the layer's
                    problem = Problem(op, m, experts, layer.hidden, intermediate, dtype, dtype if op == "fc1" else "bf16")
                    cells.append(_cell(problem, arch, variants))
    return cells


def _cell(problem: Problem, arch: str, variants: Sequence[Variant]) -> Cell:
    try:
        choice = select(problem, variants, load_table(arch))
    except SelectionError as error:
        return Cell(arch, problem.a_dtype, problem.op, problem.m, NONE, "", _why_none(problem, variants) or str(error))
    except DensemoeError as error:
        return Cell(arch, problem.a_dtype, problem.op, problem.m, NONE, "", f"{type(error).__name__}: {error}")
    return Cell(arch, problem.a_dtype, problem.op, problem.m, choice.provenance, choice.variant.key, choice.reason)


def _why_none(problem: Problem, variants: Sequence[Variant]) -> str:
    """Why none of ``variants`` runs ``problem``, in words that do not depend on M; empty where one could, and the selection wants another."""
    own = [each for each in variants if each.op == problem.op]
    dtypes = sorted({f"{each.a_dtype} to {each.c_dtype}" for each in own})
    if f"{problem.a_dtype} to {problem.c_dtype}" not in dtypes:
        return f"no {problem.op} kernel of the set takes {problem.a_dtype} to {problem.c_dtype}; it has {', '.join(dtypes) or 'none at all'}"
    fitting = [can_implement(each, problem) for each in own if (each.a_dtype, each.c_dtype) == (problem.a_dtype, problem.c_dtype)]
    return "" if any(accepted for accepted, _ in fitting) else "; ".join(sorted({reason for _, reason in fitting}))
