"""Contract section 8: which variants are legal at all, and whether a variant can run a problem. Each rule has its own message.

The rules are the contract's, device-independent. What one kernel module can be (a narrower set) is the kernel's own ``check``.
"""

from __future__ import annotations

from typing import Final

from densemoe.runtime.errors import VariantError
from densemoe.runtime.problem import GROUP, Problem, k64_width
from densemoe.runtime.variant import BRINGS, DETERMINISTIC, GROUPED_OPS, OPS, ROUNDED, ROUTES, Variant

__all__ = ["can_implement", "check_legal"]

LARGEST_CLUSTER: Final = 4
LARGEST_CLUSTER_SIZE: Final = 16
TCGEN05_K_TILE: Final = 256
PAIR_TILE_M: Final = 256  # a tile of 256 tokens is a pair of CTAs
SMALLEST_FC1_TILE_N: Final = 128  # whole pairs of 64 up and 64 gate rows
K64_ORDER_ROWS: Final = 256  # weight rows of the kernels that read activations in K 64 order
LARGEST_ROUTED: Final = 32  # pairs that a warp of grouped FC1 or FC2 sorts itself
SORTED_EXPERTS: Final = 2**19  # experts of which it has a tile in one word
LARGEST_WORD: Final = 2**31 - 1  # kernels count tiles in 32-bit words


def _tcgen05(variant: Variant) -> bool:
    return variant.op in OPS and variant.arch.startswith("sm_10")


def check_legal(variant: Variant) -> None:
    """Raises VariantError where the contract forbids ``variant`` whatever the problem."""
    for name, size in (("cluster_m", variant.cluster_m), ("cluster_n", variant.cluster_n)):
        if size & (size - 1) or size > LARGEST_CLUSTER:
            raise VariantError(f"cluster: {name}={size} of {variant.key}: use 1, 2 or 4")
    if variant.cluster_m * variant.cluster_n > LARGEST_CLUSTER_SIZE:
        raise VariantError(f"cluster of {variant.key} has {variant.cluster_m * variant.cluster_n} CTAs: at most {LARGEST_CLUSTER_SIZE}")
    if not _tcgen05(variant):
        return
    pair = variant.tile_m == PAIR_TILE_M
    if pair != (variant.cluster_m % 2 == 0):
        raise VariantError(f"cluster: cluster_m={variant.cluster_m} with tile_m={variant.tile_m}: even exactly for pairs of CTAs (tile_m 256)")
    if variant.op == "fc1" and variant.tile_n < SMALLEST_FC1_TILE_N:
        raise VariantError(f"tile: tile_n={variant.tile_n} of {variant.key}: FC1 needs at least {SMALLEST_FC1_TILE_N}, whole pairs of up and gate")
    if variant.a_dtype != "nvfp4":
        raise VariantError(f"a_dtype: {variant.a_dtype} of {variant.key}: the tcgen05 kernels read nvfp4 activations")


def can_implement(variant: Variant, problem: Problem) -> tuple[bool, str]:
    """Whether ``variant`` can run ``problem``, and why not.

    Returns:
        (True, "") or (False, the rule that it breaks, with the values).
    """
    reason = _reason(variant, problem)
    return (not reason, reason)


def _reason(variant: Variant, problem: Problem) -> str:
    if variant.op != problem.op:
        return f"it is {'an' if variant.op.startswith('fc') else 'a'} {variant.op} kernel, the problem is {problem.op}"
    if variant.a_dtype != problem.a_dtype:
        return f"it reads {variant.a_dtype} activations, the problem has {problem.a_dtype}"
    if variant.c_dtype != problem.c_dtype:
        return f"it writes {variant.c_dtype}, the problem wants {problem.c_dtype}"
    if problem.op == "fc1" and bool(variant.option(ROUNDED)) != problem.rounded:
        written = ("codes and scales", "bf16 values")
        return f"it writes NVFP4 as {written[not problem.rounded]}, the problem wants {written[problem.rounded]}"
    if problem.op == "fc1" and _tcgen05(variant) and (2 * problem.intermediate) % variant.tile_n:
        return f"2I = {2 * problem.intermediate} is not a multiple of its tile_n {variant.tile_n}"
    if problem.op == "fc2" and _tcgen05(variant) and problem.intermediate % TCGEN05_K_TILE:
        return f"I = {problem.intermediate} on this rank is not a multiple of its K tile {TCGEN05_K_TILE}"
    if problem.op == "groupedfc2" and bool(variant.option(DETERMINISTIC)) != problem.deterministic:
        return "it adds in any order, the problem wants one" if problem.deterministic else "it adds in one order, which the problem does not ask for"
    if problem.op in GROUPED_OPS:
        if variant.tile_m != problem.group_tile:
            return f"its tiles have {variant.tile_m} rows, those of the problem {problem.group_tile}"
        if problem.a_in_k64_order and variant.tile_n != K64_ORDER_ROWS:
            return f"activations of tiles of {problem.group_tile} rows come in K 64 order, which kernels of {K64_ORDER_ROWS} weight rows read"
        if bool(variant.option(ROUTES)) != problem.routes:
            return "it reads what `route` sorted, the problem has the router's choice" if problem.routes else "it sorts the router's choice itself"
        if problem.routes and problem.m * problem.top_k > LARGEST_ROUTED:
            return f"{problem.m * problem.top_k} pairs: it sorts up to {LARGEST_ROUTED} itself"
        if problem.routes and problem.experts > SORTED_EXPERTS:
            return f"{problem.experts} experts: it sorts up to {SORTED_EXPERTS} itself"
        steps = problem.m * problem.top_k * -(-max(problem.hidden, problem.intermediate) // 64)
        return f"{steps} steps: it counts them in 32 bits; split M" if steps > LARGEST_WORD else ""
    if problem.op in ("prepare", "route") and bool(variant.option(BRINGS)) != bool(problem.x_dtype):
        return "it brings no activations, the problem has some" if problem.x_dtype else "it brings activations, the problem has none"
    if problem.op in ("prepare", "route") and (groups := problem.m * k64_width(problem.hidden) // GROUP) > LARGEST_WORD // 2:
        return f"{groups} groups of {GROUP} activations: it counts up to {LARGEST_WORD // 2}; split M"
    tiles = -(-problem.m // variant.tile_m) * -(-_tile_axis(problem) // variant.tile_n)
    if tiles > LARGEST_WORD:
        return f"{tiles} tiles: it counts them in 32 bits; split M"
    return ""


def _tile_axis(problem: Problem) -> int:
    """Weight rows that the tiles cut: E·2I for FC1, H for FC2."""
    return 2 * problem.n_out if problem.op == "fc1" else problem.n_out
