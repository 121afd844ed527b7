"""A Problem: the shapes and dtypes of one call of an op, its tensors by role, and the names that launch recipes may use.

Shapes, dtypes and alignments are those of the contract's sections 2–4 and 8. Sizes are in elements, alignments and byte counts in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.variant import A_DTYPES_OF, ALL_OPS, C_DTYPES, GROUPED_OPS, OPS

__all__ = ["ELEMENT_BITS", "X_FORMS", "Problem", "TensorSpec", "in_k64_order"]

ELEMENT_BITS: Final = {"nvfp4": 4, "e4m3": 8, "e5m2": 8, "u8": 8, "bf16": 16, "f16": 16, "f32": 32, "u32": 32, "i32": 32, "i64": 64}
#: Contract section 8: any dimension of 2**31 or more is refused; byte offsets are 64-bit.
LARGEST_DIMENSION: Final = 2**31 - 1
SCALE_ROWS: Final = 128  # rows of one scale tile (contract section 2)
GROUP: Final = 16  # consecutive k that share one e4m3 scale
CODES_ALIGNMENT: Final = 32
OTHER_ALIGNMENT: Final = 16
LARGEST_LISTED: Final = 4096  # experts that `prepare` has flags for
LARGEST_TOP_K: Final = 32  # `prepare` holds a token's experts one a lane
TILE_WORDS: Final = 4  # of one tile of `route`: expert, first row, rows, unused
K64_ORDER_FROM: Final = 32  # rows of a tile from which what the grouped ops multiply is in K 64 order
X_FORMS: Final = ("bf16", "f16", "f32", "nvfp4")  # of activations that `route` and `prepare` bring as bf16, as kernels number them
_ROUTED: Final = ("route", *GROUPED_OPS)
_IN_ANY_ORDER: Final = ("route", "groupedfc2")  # ops that differ where the layer is to give the same bits every time
_BETWEEN: Final = ("bf16", "nvfp4")  # between grouped FC1 and FC2 of large tiles
_SORTS: Final = ("prepare", "route")


@dataclass(frozen=True)
class TensorSpec:
    """What the contract says of one tensor of a problem.

    Attributes:
        role: for example ``a.codes``; see ``Problem.tensors``.
        dtype: ``u8``, ``bf16``, ``f16``, ``f32``, ``e4m3``, ``e5m2``, ``i32``.
        shape: in elements of ``dtype``, the last dimension contiguous.
        alignment: of the base address, in bytes.
        output: the kernel writes it.
        optional: may be absent.
    """

    role: str
    dtype: str
    shape: tuple[int, ...]
    alignment: int
    output: bool = False
    optional: bool = False

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * ELEMENT_BITS[self.dtype] // 8


def _ceil_to(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def in_k64_order(op: str, group_tile: int) -> bool:
    """Whether an op reads its activations in K 64 order (``layout.k64_order``): the grouped ops over tiles of 32 rows and more, whose shared memory
    then takes them by sixteen bytes. ``route`` brings a layer's to it, and FC1 writes so what FC2 reads."""
    return op in GROUPED_OPS and group_tile >= K64_ORDER_FROM


def k64_width(k: int) -> int:
    """Columns of ``k`` activations in K 64 order: whole K 128 blocks, zeros behind K."""
    return _ceil_to(k, 128)


@dataclass(frozen=True)
class Problem:
    """One call of an op.

    ``prepare`` (contract section 5) turns the router's ids and weights into alpha ``[M, E]`` and the list of active experts; its H and I are 0.
    ``route`` sorts the router's choice by expert: one row a (token, expert) pair, ``M·k`` of them at most, and tiles of up to ``group_tile`` rows
    of one expert. ``groupedfc1`` and ``groupedfc2`` are FC1 and FC2 over those rows; what stands between them is ``[M·k, I]``, of which only the
    pairs' rows are written. Both read bf16, over tiles of 32 rows and more in K 64 order (``in_k64_order``): of NVFP4 the values that codes and
    scales stand for, which bf16 holds exactly. FC1 writes such values where its output dtype is NVFP4, and FC1 over all tokens where it is
    ``rounded``. Where ``x_dtype`` is given ``prepare`` and ``route`` bring the activations ``x`` ``[M, H]`` so besides, NVFP4 ones decoded, others
    rounded to NVFP4 where ``x_rounded``.
    ``quantize`` (section 2) turns activations ``[M, H]`` into NVFP4; its E and I are 0.

    Attributes:
        op: one of ``ALL_OPS``.
        m: tokens. 0 is legal: nothing is launched.
        experts: E.
        hidden: H, a multiple of 64.
        intermediate: I held by this rank, a multiple of 64.
        a_dtype: ``nvfp4`` or ``bf16``; of the ids of ``prepare`` and ``route`` ``i32`` or ``i64``; of what is quantised ``bf16``, ``f16`` or ``f32``.
        c_dtype: an output dtype that the contract allows for the op.
        alpha_post: FC1 multiplies by a per-token-per-expert scale after SwiGLU.
        scalar_alpha: FC2's alpha is one f32 scalar instead of ``[M, E]``.
        active_list: only listed experts are computed (contract section 5): the tensor ``active_experts`` holds their count and ids.
        top_k: ``prepare``, ``route`` and the grouped ops: experts of a token, 1 to 32. Of FC1 and FC2 with a list of active experts, where it is
            known: at most ``M·k`` are then listed, and FC1 of sm_90a has no CTAs for more; else 0.
        first_expert: ``prepare``, ``route`` and what ``routes``: id of this rank's first expert.
        elsewhere: of the same: ids outside this rank's experts belong to other ranks; else such an id makes its token NaN.
        group_tile: ``route`` and the grouped ops: most rows of a tile; the kernels' tile_m.
        x_dtype: ``prepare`` and ``route``: one of ``X_FORMS``: the activations that it brings as bf16, with ``hidden`` columns; "": none, and H is 0.
        x_rounded: ``prepare`` and ``route``: it rounds them to NVFP4 (contract section 2); f16 and f32 always.
        rounded: ``fc1``: its output is NVFP4, written as the bf16 values that codes and scales stand for. Grouped FC1 always writes NVFP4 so.
        deterministic: ``groupedfc2`` adds a token's experts in the order of its choice, so that a launch gives the same bits every time, and
            ``route`` tells it where they stand (``places``). The other ops do so always.
        routes: the grouped ops are given the router's choice, ``ids`` and for FC2 ``router`` and ``w2_alpha``, and sort it themselves, as ``route``
            would; of 32 pairs at most.
        id_dtype: of these ids, ``i32`` or ``i64``; else "".

    Raises:
        ProblemError: a value that the contract's section 8 refuses.
    """

    op: str
    m: int
    experts: int
    hidden: int
    intermediate: int
    a_dtype: str = "bf16"
    c_dtype: str = "bf16"
    alpha_post: bool = False
    scalar_alpha: bool = False
    active_list: bool = False
    top_k: int = 0
    first_expert: int = 0
    elsewhere: bool = False
    group_tile: int = 0
    x_dtype: str = ""
    x_rounded: bool = False
    rounded: bool = False
    deterministic: bool = False
    routes: bool = False
    id_dtype: str = ""

    def __post_init__(self) -> None:
        if self.op not in ALL_OPS:
            raise ProblemError(f"op={self.op!r}: use one of {', '.join(ALL_OPS)}")
        gemm = self.op in (*OPS, *GROUPED_OPS)
        sorts = self.op in _SORTS
        hidden = int(not sorts or bool(self.x_dtype))
        least_of = {"m": 0, "experts": int(self.op != "quantize"), "hidden": hidden, "intermediate": int(gemm), "first_expert": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST_DIMENSION:
                raise ProblemError(f"{name}={value!r}: use an integer from {least} to {LARGEST_DIMENSION}")
        if sorts and self.experts > LARGEST_LISTED:
            raise ProblemError(f"experts={self.experts} for {self.op}: at most {LARGEST_LISTED}; use expert parallelism")
        for name in ("hidden", "intermediate"):
            value = getattr(self, name)
            if value % 64:
                raise ProblemError(f"{name}={value}: use a multiple of 64 (whole columns of the 128x4 scale tiles, contract section 8)")
        for name, value in (("E*2I", self.experts * 2 * self.intermediate), ("E*I", self.experts * self.intermediate)):
            if value > LARGEST_DIMENSION:
                raise ProblemError(f"{name}={value}: dimensions of 2**31 or more are refused (contract section 8)")
        if self.a_dtype not in A_DTYPES_OF[self.op]:
            raise ProblemError(f"a_dtype={self.a_dtype!r} for {self.op}: use one of {', '.join(A_DTYPES_OF[self.op])}")
        if self.c_dtype not in C_DTYPES[self.op]:
            raise ProblemError(f"c_dtype={self.c_dtype!r} for {self.op}: use one of {', '.join(C_DTYPES[self.op])}")
        if self.alpha_post and self.op != "fc1":
            raise ProblemError(f"alpha_post=True for {self.op}: only FC1 has alpha_post (contract section 3)")
        if self.scalar_alpha and self.op != "fc2":
            raise ProblemError(f"scalar_alpha=True for {self.op}: only FC2 has a scalar alpha (contract section 4)")
        chosen = int(sorts or self.op in GROUPED_OPS)
        if not chosen <= self.top_k <= max(chosen, int(self.active_list)) * LARGEST_TOP_K:
            raise ProblemError(
                f"top_k={self.top_k} for {self.op}: prepare, route and the grouped ops have 1 to {LARGEST_TOP_K}, FC1 and FC2 with a list of active"
                " experts 0 too, the others 0"
            )
        if self.m * self.top_k > LARGEST_DIMENSION:
            raise ProblemError(f"M*k={self.m * self.top_k}: dimensions of 2**31 or more are refused (contract section 8)")
        if (self.group_tile > 0) != (self.op in _ROUTED) or self.group_tile < 0:
            raise ProblemError(f"group_tile={self.group_tile} for {self.op}: route and the grouped ops have the rows of a tile, the others 0")
        if self.x_dtype not in (("", *X_FORMS) if sorts else ("",)):
            raise ProblemError(f"x_dtype={self.x_dtype!r} for {self.op}: prepare and route have {', '.join(X_FORMS)} or none, the others none")
        if self.x_rounded != (self.x_dtype in ("f16", "f32")) and self.x_dtype != "bf16":
            raise ProblemError(f"x_rounded={self.x_rounded} for x_dtype={self.x_dtype!r}: f16 and f32 are rounded to NVFP4, bf16 where asked for")
        if self.rounded and (self.op, self.c_dtype) != ("fc1", "nvfp4"):
            raise ProblemError(f"rounded=True for {self.op} with c_dtype={self.c_dtype!r}: only FC1 with NVFP4 output has a choice")
        if self.deterministic and self.op not in _IN_ANY_ORDER:
            raise ProblemError(f"deterministic=True for {self.op}: {' and '.join(_IN_ANY_ORDER)} have a choice; the others always give the same bits")
        if self.routes and (self.op not in GROUPED_OPS or self.deterministic or self.a_in_k64_order):
            raise ProblemError(
                f"routes=True for {self.op} over tiles of {self.group_tile} rows: the grouped ops of tiles below {K64_ORDER_FROM} rows sort the"
                " router's choice themselves, where they may add in any order"
            )
        if self.id_dtype not in (A_DTYPES_OF["route"] if self.routes else ("",)):
            raise ProblemError(f"id_dtype={self.id_dtype!r} with routes={self.routes}: {' or '.join(A_DTYPES_OF['route'])} where True, else none")
        if self.c_in_k64_order and self.c_dtype not in _BETWEEN:
            raise ProblemError(
                f"c_dtype={self.c_dtype!r} for {self.op} over tiles of {self.group_tile} rows: use {' or '.join(_BETWEEN)}, what FC2 reads"
            )
        if (self.active_list and not gemm) or (self.active_list and self.op in GROUPED_OPS):
            raise ProblemError(f"active_list=True for {self.op}: only FC1 and FC2 have a list of active experts (contract section 5)")

    @property
    def k(self) -> int:
        """Length of the reduction: H for FC1, E·I for FC2, I for grouped FC2."""
        if self.op == "groupedfc2":
            return self.intermediate
        return self.experts * self.intermediate if self.op == "fc2" else self.hidden

    @property
    def a_in_k64_order(self) -> bool:
        """Whether activations are ``a.k64``, ``[rows, ⌈K / 128⌉ · 128]`` in K 64 order, instead of ``a``."""
        return in_k64_order(self.op, self.group_tile)

    @property
    def c_in_k64_order(self) -> bool:
        """Whether the output is ``c.k64``, bf16 ``[rows, ⌈I / 128⌉ · 128]`` in K 64 order, zeros behind I, in place of ``c``."""
        return self.op == "groupedfc1" and in_k64_order(self.op, self.group_tile)

    @property
    def c_decoded(self) -> bool:
        """Whether NVFP4 output is written as the bf16 values that codes and scales stand for."""
        return self.c_dtype == "nvfp4" and (self.rounded or self.op == "groupedfc1")

    @property
    def a_rows(self) -> int:
        """Rows of the activations: M, and M·k between the grouped GEMMs."""
        return self.m * self.top_k if self.op == "groupedfc2" else self.m

    @property
    def c_rows(self) -> int:
        """Rows of the output: M, and M·k between the grouped GEMMs."""
        return self.m * self.top_k if self.op == "groupedfc1" else self.m

    @property
    def n_out(self) -> int:
        """Columns of the output: E·I for FC1, I for grouped FC1, H for FC2."""
        if self.op in _SORTS:
            return self.experts
        if self.op == "groupedfc1":
            return self.intermediate
        return self.experts * self.intermediate if self.op == "fc1" else self.hidden

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor of the problem but the packed weights (whose layout belongs to the architecture), by role.

        Roles: ``a`` or ``a.codes`` + ``a.scales``; ``alpha``; ``alpha_post``; ``active_experts`` (the
        count, then as many expert ids, ascending); ``output_multiplier``; ``c`` (NVFP4 decoded too) or ``c.codes`` + ``c.scales``.
        Of ``route`` and the grouped ops: ``tiles`` (a head [tiles, rows, 0, 0], then [expert, first row, rows, 0] each), ``rows`` (the token of each
        row), ``places`` (the row of each pair, -1 where it has none) and ``row_alpha`` (its scale in FC2); and ``a.k64`` and ``c.k64`` where they
        are in K 64 order (``a_in_k64_order``, ``c_in_k64_order``).
        """
        rows = _ceil_to(self.m, SCALE_ROWS)
        if self.op in _SORTS:
            return {spec.role: spec for spec in self._router_tensors()}
        if self.op == "quantize":
            quantised = (
                TensorSpec("a", self.a_dtype, (self.m, self.k), OTHER_ALIGNMENT),
                TensorSpec("output_multiplier", "f32", (1,), 4),
                TensorSpec("c.codes", "u8", (self.m, self.k // 2), CODES_ALIGNMENT, output=True),
                TensorSpec("c.scales", "u8", (rows, self.k // GROUP), OTHER_ALIGNMENT, output=True),
            )
            return {spec.role: spec for spec in quantised}
        specs: list[TensorSpec] = []
        if self.a_dtype == "nvfp4":
            specs.append(TensorSpec("a.codes", "u8", (self.a_rows, self.k // 2), CODES_ALIGNMENT))
            specs.append(TensorSpec("a.scales", "u8", (_ceil_to(self.a_rows, SCALE_ROWS), self.k // GROUP), OTHER_ALIGNMENT))
        else:
            role, width = ("a.k64", k64_width(self.k)) if self.a_in_k64_order else ("a", self.k)
            specs.append(TensorSpec(role, self.a_dtype, (self.a_rows, width), OTHER_ALIGNMENT))
        if self.op in GROUPED_OPS:
            routed = {spec.role: replace(spec, output=False) for spec in self._routed_tensors()}
            if self.routes:
                specs += self._choice_tensors(self.id_dtype)[: None if self.op == "groupedfc2" else 1]
            else:
                specs += [routed["tiles"], routed["places" if self.deterministic else "rows"]]
            if self.op == "groupedfc1":
                specs.append(TensorSpec("alpha", "f32", (self.experts,), 4))
            elif not self.routes:
                specs.append(routed["row_alpha"])
        elif self.op == "fc1":
            specs.append(TensorSpec("alpha", "f32", (self.experts,), 4))
            if self.alpha_post:
                specs.append(TensorSpec("alpha_post", "f32", (self.m, self.experts), 4))
        else:
            specs.append(TensorSpec("alpha", "f32", (1,) if self.scalar_alpha else (self.m, self.experts), 4))
        if self.active_list:
            specs.append(TensorSpec("active_experts", "i32", (1 + self.experts,), 4))
        if self.c_dtype == "nvfp4":
            specs.append(TensorSpec("output_multiplier", "f32", (1,), 4))
        if self.c_in_k64_order:
            specs.append(TensorSpec("c.k64", "bf16", (self.c_rows, k64_width(self.n_out)), OTHER_ALIGNMENT, output=True))
        elif self.c_decoded:
            specs.append(TensorSpec("c", "bf16", (self.c_rows, self.n_out), OTHER_ALIGNMENT, output=True))
        elif self.c_dtype == "nvfp4":
            scale_rows = _ceil_to(self.c_rows, SCALE_ROWS)
            specs.append(TensorSpec("c.codes", "u8", (self.c_rows, self.n_out // 2), CODES_ALIGNMENT, output=True))
            specs.append(TensorSpec("c.scales", "u8", (scale_rows, self.n_out // GROUP), OTHER_ALIGNMENT, output=True))
        else:
            specs.append(TensorSpec("c", self.c_dtype, (self.c_rows, self.n_out), OTHER_ALIGNMENT, output=True))
        return {spec.role: spec for spec in specs}

    def _routed_tensors(self) -> tuple[TensorSpec, ...]:
        """What ``route`` gives: a tile has at least one row, so there are at most as many as pairs."""
        pairs = self.m * self.top_k
        places = (TensorSpec("places", "i32", (self.m, self.top_k), 4, output=True),) if self.deterministic else ()
        return (
            TensorSpec("tiles", "i32", (1 + pairs, TILE_WORDS), OTHER_ALIGNMENT, output=True),
            TensorSpec("rows", "i32", (pairs,), 4, output=True),
            TensorSpec("row_alpha", "f32", (pairs,), 4, output=True),
            *places,
        )

    @property
    def brought(self) -> str:
        """The role of what ``prepare`` and ``route`` bring: ``x.k64`` where grouped FC1 reads K 64 order, else ``x.bf16``; "": nothing."""
        if not self.x_dtype:
            return ""
        return "x.k64" if self.group_tile >= K64_ORDER_FROM else "x.bf16"

    def _brought_tensors(self) -> tuple[TensorSpec, ...]:
        """``x``, of NVFP4 its codes and ``x.scales``, ``x.multiplier`` where it is rounded, and what is made of them."""
        if not self.x_dtype:
            return ()
        width = k64_width(self.hidden) if self.brought == "x.k64" else self.hidden
        made = TensorSpec(self.brought, "bf16", (self.m, width), OTHER_ALIGNMENT, output=True)
        if self.x_dtype == "nvfp4":
            scales = TensorSpec("x.scales", "u8", (_ceil_to(self.m, SCALE_ROWS), self.hidden // GROUP), OTHER_ALIGNMENT)
            return TensorSpec("x", "u8", (self.m, self.hidden // 2), CODES_ALIGNMENT), scales, made
        multiplier = (TensorSpec("x.multiplier", "f32", (1,), 4),) if self.x_rounded else ()
        return TensorSpec("x", self.x_dtype, (self.m, self.hidden), OTHER_ALIGNMENT), *multiplier, made

    def _choice_tensors(self, id_dtype: str) -> tuple[TensorSpec, ...]:
        """The router's choice, and the experts' scales in FC2."""
        shape = (self.m, self.top_k)
        return (
            TensorSpec("ids", id_dtype, shape, ELEMENT_BITS[id_dtype] // 8),
            TensorSpec("router", "f32", shape, 4),
            TensorSpec("w2_alpha", "f32", (self.experts,), 4),
        )

    def _router_tensors(self) -> tuple[TensorSpec, ...]:
        """``ids`` and ``router`` ``[M, k]``, ``w2_alpha`` ``[E]``; of ``prepare`` ``alpha_divisor`` ``[1]`` (1, or the fused form's alpha_max),
        ``alpha`` ``[M, E]`` and the list of active experts."""
        given = self._choice_tensors(self.a_dtype)
        if self.op == "route":
            return (*given, *self._routed_tensors(), *self._brought_tensors())
        return (
            *given,
            *self._brought_tensors(),
            TensorSpec("alpha_divisor", "f32", (1,), 4),
            TensorSpec("alpha", "f32", (self.m, self.experts), 4, output=True),
            TensorSpec("active_list", "i32", (1 + self.experts,), 4, output=True),
        )

    def names(self) -> dict[str, int]:
        """The integer names that a launch recipe's expressions may use, without the device's (``sm_count``)."""
        return {
            "M": self.m,
            "E": self.experts,
            "H": self.hidden,
            "I": self.intermediate,
            "K": self.k,
            "N_out": self.n_out,
            "has_alpha_post": int(self.alpha_post),
            "scalar_alpha": int(self.scalar_alpha),
            "has_active_list": int(self.active_list),
            # strides of FC2's alpha in elements: 0 makes one scalar serve every token and expert
            "alpha_stride_m": 0 if self.op != "fc2" or self.scalar_alpha else self.experts,
            "alpha_stride_e": 0 if self.scalar_alpha else 1,
            "top_k": self.top_k,
            "most_experts": min(self.experts, self.m * self.top_k) if self.active_list and self.top_k else self.experts,
            "first_expert": self.first_expert,
            "elsewhere": int(self.elsewhere),
            "group_tile": self.group_tile,
            "id_bytes": ELEMENT_BITS[self.id_dtype] // 8 if self.id_dtype else 0,
            "x_form": X_FORMS.index(self.x_dtype) if self.x_dtype else 0,
        }
