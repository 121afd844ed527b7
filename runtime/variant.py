"""A Variant: every parameter that decides the bytes of one kernel, and its readable key.

A key and a Variant are two spellings of one thing: ``Variant.parse(variant.key) == variant`` for every Variant. The key's grammar::

    <op>.<arch>.t<tile_m>x<tile_n>.c<cluster_m>x<cluster_n>.<a_dtype>-<c_dtype>[.<option>[<value>]]…

    fc1.sm100f.t128x256.c1x2.nvfp4-nvfp4.post
    fc2.sm90a.t8x64.c1x1.bf16-f32.wgmma.stages3

Options are a kernel's own code-generation parameters. They stand in alphabetical order; a value of 0 is the default and is left out, 1 is
the bare name. Weights are NVFP4 in every variant (contract section 7), so the key does not repeat it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Final

from densemoe.runtime.errors import VariantError

__all__ = [
    "ALL_OPS",
    "ARCHITECTURES",
    "AUXILIARY_OPS",
    "A_DTYPES",
    "A_DTYPES_OF",
    "BRINGS",
    "B_DTYPES",
    "C_DTYPES",
    "DETERMINISTIC",
    "GROUPED_OPS",
    "OPS",
    "ROUNDED",
    "ROUTES",
    "Architecture",
    "Variant",
    "arch_of_key",
    "architecture",
    "symbol_of",
]

OPS: Final = ("fc1", "fc2")
#: The same over gathered tokens: each expert multiplies those that chose it.
GROUPED_OPS: Final = ("groupedfc1", "groupedfc2")
#: The option of grouped FC2 that adds in one order, and gives the same bits every time.
DETERMINISTIC: Final = "deterministic"
#: The option of FC1 whose NVFP4 output is written as the bf16 values that codes and scales stand for: what FC2 of a layer reads.
ROUNDED: Final = "rounded"
#: The option of ``prepare`` and ``route`` that bring activations as bf16 besides.
BRINGS: Final = "brings"
#: The option of the grouped ops that sort the router's choice themselves, of few pairs, so that a layer needs no ``route``.
ROUTES: Final = "routes"
#: What a layer does besides: alpha and the list of active experts from the router's choice; that choice sorted by expert; NVFP4 activations. They
#: read no packed weights.
AUXILIARY_OPS: Final = ("prepare", "route", "quantize")
ALL_OPS: Final = (*OPS, *GROUPED_OPS, *AUXILIARY_OPS)
A_DTYPES: Final = ("nvfp4", "bf16")
B_DTYPES: Final = ("nvfp4",)
#: Output dtypes that the contract allows for each op (sections 3 and 4).
C_DTYPES: Final[Mapping[str, tuple[str, ...]]] = {
    "fc1": ("nvfp4", "bf16", "f16", "f32", "e4m3", "e5m2"),
    "fc2": ("bf16", "f16", "f32"),
    "groupedfc1": ("nvfp4", "bf16", "f16", "f32"),
    "groupedfc2": ("bf16", "f16", "f32"),
    "prepare": ("f32",),
    "route": ("f32",),
    "quantize": ("nvfp4",),
}
#: Input dtypes of each op: ``prepare`` and ``route`` read expert ids.
A_DTYPES_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "fc1": A_DTYPES,
    "fc2": A_DTYPES,
    "groupedfc1": ("bf16",),
    "groupedfc2": ("bf16",),
    "prepare": ("i32", "i64"),
    "route": ("i32", "i64"),
    "quantize": ("bf16", "f16", "f32"),
}


@dataclass(frozen=True)
class Architecture:
    """A compilation target.

    Attributes:
        name: as CuTe DSL and ptxas spell it, for example ``sm_100f``.
        capabilities: compute capabilities (major, minor) that load its cubins.
        kind: ``exact`` (one capability) or ``family`` (all of its major version that are listed).
        largest_smem: bytes of shared memory that one CTA may use.
    """

    name: str
    capabilities: tuple[tuple[int, int], ...]
    kind: str
    largest_smem: int

    @cached_property
    def key(self) -> str:
        """The name as it stands in variant keys and directory names: without the underscore."""
        return self.name.replace("_", "")


#: sm_100f and the exact builds' devices: measured with cutlass-dsl 4.8.1 (docs/facts.md); 227 KiB of shared memory a CTA on all of them.
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    each.name: each
    for each in (
        Architecture("sm_90a", ((9, 0),), "exact", 232_448),
        Architecture("sm_100a", ((10, 0),), "exact", 232_448),
        Architecture("sm_103a", ((10, 3),), "exact", 232_448),
        Architecture("sm_100f", ((10, 0), (10, 3)), "family", 232_448),
    )
}
_BY_KEY: Final = {each.key: each for each in ARCHITECTURES.values()}


def architecture(name: str) -> Architecture:
    """The Architecture called ``name`` (``sm_90a`` or ``sm90a``).

    Raises:
        VariantError: ``name`` is not one that densemoe builds for.
    """
    found = ARCHITECTURES.get(name) or _BY_KEY.get(name)
    if found is None:
        raise VariantError(f"architecture {name!r} is not known: use one of {', '.join(ARCHITECTURES)}")
    return found


_OPTION = re.compile(r"[a-z]+")
_KEY = re.compile(
    r"(?P<op>[a-z0-9]+)\.(?P<arch>sm[0-9]+[af]?)\.t(?P<tile_m>[1-9][0-9]*)x(?P<tile_n>[1-9][0-9]*)"
    r"\.c(?P<cluster_m>[1-9][0-9]*)x(?P<cluster_n>[1-9][0-9]*)\.(?P<a>[a-z0-9]+)-(?P<c>[a-z0-9]+)(?P<options>(?:\.[a-z]+(?:[1-9][0-9]*)?)*)"
)
_NOT_IN_SYMBOLS = re.compile(r"[^a-z0-9]+")  # compiled once here, not in a cold start
_KEY_OPTION = re.compile(r"\.([a-z]+)([1-9][0-9]*)?")


def _matched(key: str) -> re.Match[str]:
    match = _KEY.fullmatch(key)
    if match is None:
        raise VariantError(
            f"variant key {key!r} does not parse: write <op>.<arch>.t<M>x<N>.c<M>x<N>.<a>-<c>[.<option>…], for example "
            "fc1.sm90a.t8x64.c1x1.bf16-nvfp4"
        )
    return match


def arch_of_key(key: str) -> str:
    """The architecture that a key names. Its variant may be one that another version of densemoe had, and this one would refuse.

    Raises:
        VariantError: ``key`` does not follow the grammar.
    """
    name = _matched(key)["arch"]
    return _BY_KEY[name].name if name in _BY_KEY else name


def symbol_of(key: str) -> str:
    """The kernel symbol that belongs to a variant key."""
    return "densemoe_" + _NOT_IN_SYMBOLS.sub("_", key) + "_0"


@dataclass(frozen=True, order=True)
class Variant:
    """One kernel to compile.

    Attributes:
        op: one of ``ALL_OPS``.
        arch: an architecture's name, ``sm_90a``.
        tile_m, tile_n: the tile in tokens and in weight rows (FC1 counts rows before SwiGLU).
        cluster_m, cluster_n: CTAs of a cluster along the tile axes.
        a_dtype, c_dtype: dtypes of the activations and of the output; the weights are ``b_dtype``.
        options: (name, value) pairs in alphabetical order, values at least 1: what else decides the code, as the kernel names it.
    """

    op: str
    arch: str
    tile_m: int
    tile_n: int
    cluster_m: int
    cluster_n: int
    a_dtype: str
    c_dtype: str
    options: tuple[tuple[str, int], ...] = ()
    b_dtype: str = field(default="nvfp4")

    def __post_init__(self) -> None:
        if self.op not in ALL_OPS:
            raise VariantError(f"op {self.op!r} is not known: use one of {', '.join(ALL_OPS)}")
        architecture(self.arch)
        if self.arch not in ARCHITECTURES:
            raise VariantError(f"arch {self.arch!r}: spell it {architecture(self.arch).name!r}")
        for name, allowed in (("a_dtype", A_DTYPES_OF[self.op]), ("b_dtype", B_DTYPES), ("c_dtype", C_DTYPES[self.op])):
            if getattr(self, name) not in allowed:
                raise VariantError(f"{name}={getattr(self, name)!r} for {self.op}: use one of {', '.join(allowed)}")
        for name in ("tile_m", "tile_n", "cluster_m", "cluster_n"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise VariantError(f"{name}={value!r}: use a positive integer")
        names = [name for name, _ in self.options]
        if names != sorted(set(names)):
            raise VariantError(f"options {names}: give each once, in alphabetical order")
        for name, value in self.options:
            if not _OPTION.fullmatch(name):
                raise VariantError(f"option name {name!r}: use lower-case letters alone")
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise VariantError(f"option {name}={value!r}: use an integer of at least 1, or leave the option out for its default 0")

    @classmethod
    def make(cls, *, options: Mapping[str, int] | None = None, **fields: object) -> Variant:
        """A Variant from fields and an options mapping in any order; options of value 0 are dropped."""
        pairs = tuple(sorted((name, int(value)) for name, value in (options or {}).items() if value))
        return cls(**fields, options=pairs)  # type: ignore[arg-type]

    def option(self, name: str, default: int = 0) -> int:
        """The value of option ``name``, or ``default`` where it is left out."""
        return dict(self.options).get(name, default)

    def with_options(self, **values: int) -> Variant:
        """A copy whose named options have these values (0 drops one)."""
        merged = {**dict(self.options), **values}
        return replace(self, options=tuple(sorted((name, value) for name, value in merged.items() if value)))

    @cached_property
    def key(self) -> str:
        """The readable key; see the module's docstring for the grammar."""
        parts = [
            self.op,
            architecture(self.arch).key,
            f"t{self.tile_m}x{self.tile_n}",
            f"c{self.cluster_m}x{self.cluster_n}",
            f"{self.a_dtype}-{self.c_dtype}",
            *(name if value == 1 else f"{name}{value}" for name, value in self.options),
        ]
        return ".".join(parts)

    @cached_property
    def symbol(self) -> str:
        """The kernel's symbol in the cubin. It follows the key, since the name is an input of ptxas, and never contains "cutlass"."""
        return symbol_of(self.key)

    @classmethod
    @lru_cache(maxsize=4096)  # a cold start meets each key in the manifest and in the selection
    def parse(cls, key: str) -> Variant:
        """The Variant that ``key`` spells.

        Raises:
            VariantError: ``key`` does not follow the grammar, or names something unknown.
        """
        match = _matched(key)
        options = tuple((name, int(value or 1)) for name, value in _KEY_OPTION.findall(match["options"]))
        variant = cls(
            op=match["op"],
            arch=architecture(match["arch"]).name,
            tile_m=int(match["tile_m"]),
            tile_n=int(match["tile_n"]),
            cluster_m=int(match["cluster_m"]),
            cluster_n=int(match["cluster_n"]),
            a_dtype=match["a"],
            c_dtype=match["c"],
            options=options,
        )
        if variant.key != key:
            raise VariantError(f"variant key {key!r} is not in its canonical form: write {variant.key!r}")
        return variant
