"""Covering arrays over the contract's section 9 grids: every value and every pair of values of two axes, at little cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache

AXES = {
    "fc1": {"experts": (1, 4, 8, 32), "rows": (256, 512, 1024, 2816), "m": (1, 8, 127, 256), "hidden": (256, 512, 2048), "post": (0, 1)},
    "fc2": {"experts": (1, 4, 8, 32, 256), "intermediate": (256, 512, 1024), "m": (1, 8, 127, 256), "hidden": (256, 512, 2048)},
}
LEAST = 12  # cases a variant
Case = tuple[int, ...]
Pair = tuple[int, int, int, int]


def pairs_of(case: Case) -> set[Pair]:
    """(axis, value, axis, value) of every two axes."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def all_pairs(axes: Sequence[Sequence[int]]) -> set[Pair]:
    """Every pair that a covering array must have."""
    return {(i, a, j, b) for i, j in itertools.combinations(range(len(axes)), 2) for a in axes[i] for b in axes[j]}


def covering(axes: Sequence[Sequence[int]], cost: Callable[[Case], float]) -> list[Case]:
    """Cases that cover every pair: repeatedly the one with most new pairs for its cost."""
    missing, every, found = all_pairs(axes), list(itertools.product(*axes)), []
    while missing:
        best = max(every, key=lambda case: (len(pairs_of(case) & missing) ** 2 / cost(case), case))
        found.append(best)
        missing -= pairs_of(best)
    return found


def fc1_cost(case: Case) -> float:
    """Tiles of 128 x 128, each an epilogue and its K tiles."""
    experts, rows, m, hidden, _ = case
    return experts * rows / 128 * -(-m // 128) * (3 + hidden / 256) + 20


def fc2_cost(case: Case) -> float:
    """Tiles of 128 x 128, an epilogue an expert."""
    experts, intermediate, m, hidden = case
    return hidden / 128 * -(-m // 128) * experts * (1 + intermediate / 256) + 20


def cost_of(op: str) -> Callable[[Case], float]:
    """What a case of ``op`` costs."""
    return fc1_cost if op == "fc1" else fc2_cost


@cache
def cases(op: str) -> tuple[Case, ...]:
    """A covering array of one op, cheap cases first; a case has the values in the order of ``AXES``."""
    return tuple(sorted(covering(list(AXES[op].values()), cost_of(op)), key=cost_of(op)))


def share(op: str, part: int, parts: int) -> list[Case]:
    """One of ``parts`` shares of the array, filled up with its cheapest cases to at least 12."""
    whole = cases(op)
    own = list(whole[part::parts])
    return own + [case for case in whole if case not in own][: max(0, LEAST - len(own))]
