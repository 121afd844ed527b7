"""What a variant is run on: a covering array of the contract's section 9 grid, with a ragged M and a padded cluster, or the whole grid.

A covering array has every value of every axis (E, I, M, H, alpha_post) and every pair of values of two axes. What the grid leaves open is dealt
out evenly, in an order that follows from the case's place alone: kind of data, list of active experts, alphas of exactly 0, scalar alpha, number
of multiprocessors, and each run-time setting that the variant's recipe has.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Final

from densemoe.runtime.data import KINDS
from densemoe.runtime.errors import ProblemError, VariantError
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import BRINGS, DETERMINISTIC, ROUNDED, ROUTES, Variant

__all__ = ["AXES", "SCHEDULES", "Case", "all_pairs", "axes_of", "cases_of", "covering", "digest", "grid", "pairs_of", "schedule_of"]

#: Contract section 9; what has no grid there takes the same sizes. Kernels that bring activations have axes of their own.
AXES: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "fc1": {
        "experts": (1, 4, 8, 32),
        "intermediate": (128, 256, 512, 1408),
        "m": (1, 8, 127, 256),
        "hidden": (256, 512, 2048),
        "alpha_post": (0, 1),
    },
    "fc2": {"experts": (1, 4, 8, 32, 256), "intermediate": (256, 512, 1024), "m": (1, 8, 127, 256), "hidden": (256, 512, 2048)},
    "groupedfc1": {
        "experts": (1, 4, 8, 32),
        "intermediate": (128, 256, 512, 1408),
        "m": (1, 8, 127, 256),
        "hidden": (256, 512, 2048),
        "top_k": (1, 2, 8),
    },
    "groupedfc2": {
        "experts": (1, 4, 8, 32, 256),
        "intermediate": (256, 512, 1024),
        "m": (1, 8, 127, 256),
        "hidden": (256, 512, 2048),
        "top_k": (1, 2, 8),
    },
    "prepare": {"experts": (1, 8, 32, 256), "top_k": (1, 2, 8), "m": (1, 8, 127, 256), "elsewhere": (0, 1)},
    "prepare.brings": {"experts": (1, 32), "top_k": (1, 8), "m": (1, 8, 127, 256), "elsewhere": (0, 1), "brought": (1, 2, 3, 4, 5)},
    "route": {"experts": (1, 8, 32, 256), "top_k": (1, 2, 8), "m": (1, 8, 127, 256), "elsewhere": (0, 1), "deterministic": (0, 1)},
    "route.brings": {
        "experts": (1, 8, 32, 256),
        "top_k": (1, 2, 8),
        "m": (1, 8, 127, 256),
        "elsewhere": (0, 1),
        "brought": (1, 2, 3, 4, 5),
        "deterministic": (0, 1),
    },
    "groupedfc1.routes": {
        "experts": (1, 4, 32, 256),
        "intermediate": (128, 256, 1408),
        "m": (1, 3, 4),
        "hidden": (256, 512, 2048),
        "top_k": (1, 2, 8),
        "elsewhere": (0, 1),
        "wide_ids": (0, 1),
    },
    "groupedfc2.routes": {
        "experts": (1, 4, 32, 256),
        "intermediate": (256, 512),
        "m": (1, 3, 4),
        "hidden": (256, 512, 2048),
        "top_k": (1, 2, 8),
        "elsewhere": (0, 1),
        "wide_ids": (0, 1),
    },
    "quantize": {"m": (1, 8, 127, 256), "hidden": (64, 256, 512, 2048)},
}
SCHEDULES: Final = ("eager", "lazy", "random", "pct")
_PCT_DEPTH: Final = 3  # priority changes find bugs that need so many ordering constraints
_GEMMS: Final = ("fc1", "fc2", "groupedfc1", "groupedfc2")
_ROUTED: Final = ("route", "groupedfc1", "groupedfc2")  # their tiles of rows are a property of the problem
_ROUTE_TILES: Final = (8, 16, 32)
#: (dtype, whether it is rounded to NVFP4) of the activations of BROUGHT_HIDDEN columns that ``prepare`` and ``route`` bring, by number.
BROUGHT: Final = (("", False), ("bf16", False), ("nvfp4", False), ("bf16", True), ("f16", True), ("f32", True))
BROUGHT_HIDDEN: Final = 320
_KINDS_DEALT: Final = ("integers", "exact", "integers", "normal")
_TWICE: Final = 64  # tokens times experts up to which a case is launched twice: beyond, a second launch costs more than it shows
_SM_COUNTS: Final = (4, 16)  # few: persistent kernels then take several tiles a CTA

Values = tuple[int, ...]
Pair = tuple[int, int, int, int]
#: How the members of a Case are spelled; what is not here is one of the recipe's settings.
_NAMES: Final = {
    "m": "m",
    "e": "experts",
    "h": "hidden",
    "i": "intermediate",
    "kind": "kind",
    "post": "alpha_post",
    "scalar": "scalar_alpha",
    "list": "active_list",
    "zeros": "zeros",
    "k": "top_k",
    "group": "group_tile",
    "elsewhere": "elsewhere",
    "x": "brought",
    "places": "deterministic",
    "wide": "wide_ids",
    "sms": "sm_count",
    "launches": "launches",
}


@dataclass(frozen=True)
class Case:
    """One problem with its data and run-time settings; ``Case.parse(case.text) == case``.

    Attributes:
        kind: of the data, ``runtime.data``.
        active_list: half of the experts are listed, the others must not matter.
        zeros: some alphas are exactly 0 (``prepare``, ``route`` and what ``routes``: some ids are nobody's).
        group_tile: ``route``: most rows of a tile; the grouped GEMMs have their tile_m.
        brought: ``prepare`` and ``route``: which of BROUGHT they bring as bf16.
        deterministic: ``route``: it says where each pair's row stands; grouped FC2 has a variant for it.
        wide_ids: what ``routes`` is given ids of 64 bits.
        sm_count: multiprocessors of the emulated device.
        launches: on the same workspaces; the last one's output counts.
        settings: (name, value) of the recipe's run-time settings that are not at their default.
    """

    m: int
    experts: int = 0
    hidden: int = 0
    intermediate: int = 0
    kind: str = "integers"
    alpha_post: int = 0
    scalar_alpha: int = 0
    active_list: int = 0
    zeros: int = 0
    top_k: int = 0
    group_tile: int = 0
    elsewhere: int = 0
    brought: int = 0
    deterministic: int = 0
    wide_ids: int = 0
    sm_count: int = _SM_COUNTS[0]
    launches: int = 1
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def text(self) -> str:
        """As in ``m=127,e=8,h=512,i=1408,post=1,sms=16,prefetch=3``: what is left out has its default."""
        defaults = {each.name: each.default for each in fields(self)}
        parts = [f"{short}={getattr(self, name)}" for short, name in _NAMES.items() if getattr(self, name) != defaults[name]]
        return ",".join(parts + [f"{name}={value}" for name, value in self.settings])

    @classmethod
    def parse(cls, text: str) -> Case:
        """The Case that ``text`` spells.

        Raises:
            ProblemError: it spells none.
        """
        members: dict[str, Any] = {}
        settings: list[tuple[str, int]] = []
        for part in text.split(","):
            short, equals, value = part.partition("=")
            if not short or not equals or (short != "kind" and not value.isdecimal()) or short in (*members, *dict(settings)):
                raise ProblemError(f"case {text!r}: {part!r} is not name=number, each name once, as in m=127,e=8,h=512,i=1408,post=1")
            if short not in _NAMES:
                settings.append((short, int(value)))
            else:
                members[short] = value if short == "kind" else int(value)
        if members.get("kind", KINDS[0]) not in KINDS:
            raise ProblemError(f"case {text!r}: kind is one of {', '.join(KINDS)}")
        if "m" not in members:
            raise ProblemError(f"case {text!r}: give m, the number of tokens")
        return cls(**{_NAMES[short]: value for short, value in members.items()}, settings=tuple(settings))

    def problem(self, variant: Variant) -> Problem:
        """The Problem of ``variant``.

        Raises:
            ProblemError: the contract's section 8 refuses it.
        """
        group_tile = (self.group_tile or variant.tile_m) if variant.op in _ROUTED else 0
        x_dtype, x_rounded = BROUGHT[self.brought] if self.brought < len(BROUGHT) else ("none such", False)
        return Problem(
            variant.op,
            self.m,
            self.experts,
            BROUGHT_HIDDEN if self.brought else self.hidden,
            self.intermediate,
            variant.a_dtype,
            variant.c_dtype,
            alpha_post=bool(self.alpha_post),
            scalar_alpha=bool(self.scalar_alpha),
            active_list=bool(self.active_list),
            top_k=self.top_k,
            first_expert=self.experts if self.elsewhere else 0,
            elsewhere=bool(self.elsewhere),
            group_tile=group_tile,
            x_dtype=x_dtype,
            x_rounded=x_rounded,
            rounded=bool(variant.option(ROUNDED)),
            deterministic=bool(self.deterministic or variant.option(DETERMINISTIC)),
            routes=bool(variant.option(ROUTES)),
            id_dtype=("i32", "i64")[self.wide_ids] if variant.option(ROUTES) else "",
        )


# ---- covering arrays


def pairs_of(case: Values) -> set[Pair]:
    """(axis, value, axis, value) of every two axes."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def all_pairs(axes: Sequence[Sequence[int]]) -> set[Pair]:
    """Every pair that a covering array must have."""
    return {(i, a, j, b) for i, j in itertools.combinations(range(len(axes)), 2) for a in axes[i] for b in axes[j]}


def covering(axes: Sequence[Sequence[int]], cost: Callable[[Values], float]) -> list[Values]:
    """Cases that cover every pair: repeatedly the one with most new pairs for its cost."""
    missing, every, found = all_pairs(axes), list(itertools.product(*axes)), []
    while missing:
        best = max(every, key=lambda case: (len(pairs_of(case) & missing) ** 2 / cost(case), case))
        found.append(best)
        missing -= pairs_of(best)
    return found


def _cost(name: str, tile_m: int) -> Callable[[Values], float]:
    """What a case takes, in 128 x 128 tiles of an MMA; every case has some work of its own."""
    names, op = list(AXES[name]), name.partition(".")[0]

    def cost(values: Values) -> float:
        case = dict(zip(names, values, strict=True))
        weights = case.get("intermediate", 1) * case.get("hidden", 1) * (2 if op.endswith("fc1") else 1)
        if op in _ROUTED:
            pairs = case["m"] * case["top_k"]
            tiles = min(case["experts"], pairs) + pairs / tile_m
        else:
            tiles = case.get("experts", 1) * -(-case["m"] // tile_m)
        return tiles * tile_m / 128 * weights / 128**2 + 20

    return cost


def axes_of(variant: Variant) -> str:
    """The name of a variant's axes in AXES."""
    return next((f"{variant.op}.{name}" for name in (BRINGS, ROUTES) if variant.option(name)), variant.op)


def grid(op: str) -> list[Case]:
    """Every case of the op's grid, options at their defaults."""
    names = list(AXES[op])
    return [_of_grid(names, values) for values in itertools.product(*AXES[op].values())]


def _of_grid(names: Sequence[str], values: Values) -> Case:
    members: dict[str, Any] = dict(zip(names, values, strict=True))
    return Case(**members)


@cache
def _array(op: str, tile_m: int) -> tuple[Case, ...]:
    names = list(AXES[op])
    found = covering(list(AXES[op].values()), _cost(op, tile_m))
    return tuple(_of_grid(names, values) for values in found)


# ---- a variant's cases


def _off_grid(variant: Variant) -> list[Case]:
    """A ragged M over more than one tile with dimensions that divide nothing; and one tile for a whole cluster, of which the rest is padding."""
    if variant.op not in _GEMMS:
        return []
    ragged_m = variant.tile_m + 5
    if variant.option(ROUTES):
        bad = [Case(6, 5, 64, 64, "normal", zeros=1, top_k=2)]  # ids that nobody has
        return [
            Case(ragged_m, 3, 320, 192, "exact", top_k=2),
            Case(16, 8, 256, 128, "integers", top_k=2),
            Case(32, 5, 64, 320, "exact", top_k=1),
            Case(4, 40, 64, 64, "normal", zeros=1, top_k=8, elsewhere=1),
            Case(3, 4, 64, 64, "exact", zeros=1, top_k=1, elsewhere=1, wide_ids=1),
            *(bad if variant.op == "groupedfc2" else ()),
        ]
    if variant.op in _ROUTED:
        return [Case(ragged_m, 3, 320, 192, "exact", top_k=2), Case(5, 7, 64, 64, "normal", top_k=3)]
    tcgen05 = variant.arch.startswith("sm_10")
    if variant.op == "fc1":
        width = variant.tile_n // 2 if tcgen05 else 64
        return [
            Case(ragged_m, 3, 320, 3 * width, "exact", alpha_post=1),
            Case(5, 1, 64, width, "normal", zeros=1, alpha_post=1),
        ]
    width = 256 if tcgen05 else 64
    return [
        Case(ragged_m, 3, variant.tile_n * variant.cluster_n + 64, width, "exact"),
        Case(5, 2, 64, 3 * width, "normal", zeros=1),
    ]


def _dealt(values: Sequence[int | str], count: int, label: str) -> list[Any]:
    """``count`` of ``values``, each as often as the others, in an order that follows from ``label``."""
    found = list(itertools.islice(itertools.cycle(values), count))
    random.Random(label).shuffle(found)
    return found


def _with_options(variant: Variant, recipe: Recipe, cases: Sequence[Case]) -> list[Case]:
    """The cases with what the grid leaves open dealt out."""
    count, dense = len(cases), variant.op in ("fc1", "fc2")
    kinds = _dealt(_KINDS_DEALT, count, "kind")
    lists, zeros, scalars = (_dealt(values, count, name) for name, values in (("list", (0, 0, 0, 1)), ("zeros", (0, 1)), ("scalar", (0, 0, 1))))
    sm_counts = _dealt(_SM_COUNTS, count, "sms")
    launches = _dealt((1, 1, 2), count, "launches") if recipe.workspaces else [1] * count
    group_tiles = _dealt(_ROUTE_TILES, count, "group")
    settings = {name: _dealt(allowed, count, name) for name, allowed in recipe.settings}
    found = []
    for i, case in enumerate(cases):
        chosen = tuple((name, int(settings[name][i])) for name, allowed in recipe.settings if settings[name][i] != allowed[0])
        if not dense:
            options: dict[str, Any] = {}
            if variant.op in _GEMMS:
                options.update(kind=kinds[i], launches=launches[i] if case.m * case.experts <= _TWICE else 1)
            if variant.op in ("prepare", "route") or case.elsewhere:
                options["zeros"] = zeros[i]
            if variant.op == "route":
                options["group_tile"] = group_tiles[i]
            found.append(replace(case, sm_count=sm_counts[i], settings=chosen, **options))
            continue
        listed = lists[i] if case.experts > 1 else 0
        scalar = scalars[i] if variant.op == "fc2" and not listed else 0  # one alpha for all says nothing of experts that are not listed
        scaled = bool(case.alpha_post) if variant.op == "fc1" else not scalar
        found.append(
            replace(
                case,
                kind=kinds[i],
                active_list=listed,
                scalar_alpha=scalar,
                zeros=zeros[i] if scaled else 0,
                sm_count=sm_counts[i],
                launches=launches[i] if case.m * case.experts <= _TWICE else 1,
                settings=chosen,
            )
        )
    return found


def cases_of(variant: Variant, recipe: Recipe, count: int | None = None, *, full: bool = False) -> list[Case]:
    """The cases that ``variant`` is run on, two off the grid first.

    Args:
        recipe: of the variant; its settings are varied.
        count: that many; by default the two and a covering array. More than those come from the rest of the grid, in a fixed random order.
        full: the two and the whole grid.
    """
    if variant.op not in AXES:
        raise VariantError(f"{variant.key}: there are no cases for the op {variant.op}; add its axes to compile/emulate/cases.py")
    name = axes_of(variant)
    whole = [case for case in grid(name) if can_implement(variant, case.problem(variant))[0]]
    array = [case for case in _array(name, variant.tile_m) if case in whole]
    rest = [case for case in whole if case not in array]
    random.Random(variant.op).shuffle(rest)
    fixed = _off_grid(variant)
    if full or (count or 0) > len(fixed) + len(array):
        array += rest
    found = fixed + _with_options(variant, recipe, array)
    return found if full or count is None else found[:count]


def digest(cases: Iterable[Case], seeds: Iterable[int], schedules: Iterable[str]) -> str:
    """sha256 of a list of runs: another list has another."""
    text = repr(([case.text for case in cases], list(seeds), list(schedules)))
    return hashlib.sha256(text.encode()).hexdigest()


def schedule_of(name: str, case: Case, seed: int) -> str:
    """The emulator's schedule for a name: ``random`` and ``pct`` get a number that follows from case and seed.

    Raises:
        ProblemError: no such schedule.
    """
    kind, _, rest = name.partition(":")
    if kind not in SCHEDULES or (rest and not all(part.isdecimal() for part in rest.split(":"))):
        raise ProblemError(f"schedule {name!r}: use one of {', '.join(SCHEDULES)}, random:SEED or pct:SEED:DEPTH")
    if rest or kind in ("eager", "lazy"):
        return name
    number = int(hashlib.sha256(f"{case.text} {seed}".encode()).hexdigest()[:4], 16)
    return f"random:{number}" if kind == "random" else f"pct:{number}:{_PCT_DEPTH}"
