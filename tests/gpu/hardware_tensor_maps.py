"""Arguments of ``cuTensorMapEncodeTiled``: every map of the shipped kernels, and a wide product of all that the call takes; and the call itself.

Numbers are those of the driver's enumerations (CUtensorMapDataType and so on), so that a file of them reads without this module.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.plan import OPTIONAL_ROLES, pack, weight_parts
from densemoe.runtime.problem import Problem
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.rules import can_implement
from densemoe.runtime.variant import Variant

#: bits of an element in global memory by CUtensorMapDataType; the last three are packed 4- and 6-bit types
BITS = (8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6)
FLOATS = (6, 7, 8, 9, 10, 11, 12)
PACKED, UNPACKED = (13, 14, 15), (14, 15)
SWIZZLES = 7  # none, 32 B, 64 B, 128 B, 128 B in atoms of 32 B, of 32 B with 8 B flip, of 64 B
SPANS = {1: 32, 2: 64}  # bytes that a box may be wide under a swizzle; 128 under the others
INTERLEAVES = 3  # none, 16 B, 32 B
ILLEGAL = 48
UNKNOWN = -1  # instead of a CUresult
_SEED = 4
_TYPES = {"u8": 0, "u16": 1, "u32": 2, "f16": 6, "f32": 7, "bf16": 9}
_SWIZZLES = {"none": 0, "32B": 1, "64B": 2, "128B": 3}
_PROMOTIONS = {"none": 0, "64B": 1, "128B": 2, "256B": 3}


class Arguments(NamedTuple):
    """One call; sizes and boxes innermost first, strides in bytes from dimension 1 on."""

    dtype: int
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_strides: tuple[int, ...]
    interleave: int = 0
    swizzle: int = 0
    promotion: int = 0
    fill: int = 0


#: Arguments → (CUresult, the 128 bytes; empty where it is not 0)
Encode = Callable[[Arguments], tuple[int, bytes]]


# ---- the maps of the kernels


def _problems(variant: Variant) -> list[Problem]:
    base: dict[str, Any] = {"a_dtype": variant.a_dtype, "c_dtype": variant.c_dtype}
    if variant.op.startswith("grouped"):
        base.update(top_k=2, group_tile=variant.tile_m)
    shapes = ((1, 1, 256, 256), (37, 5, 320, 768), (511, 32, 7168, 2048))
    return [Problem(variant.op, *shape, **base) for shape in shapes]


def of_kernels(artifacts: ArtifactSet) -> Iterator[Arguments]:
    """Arguments of every tensor map that the built variants are launched with, at three problems each; equal ones once."""
    seen: set[Arguments] = set()
    for arch in artifacts.architectures:
        for key, entry in sorted(artifacts.manifest(arch).variants.items()):
            if not any(each.kind == "tensor_map" for each in entry.recipe.parameters):
                continue
            for problem in _problems(Variant.parse(key)):
                if can_implement(entry.variant, problem)[0]:
                    for found in _of_launch(entry.recipe, entry.layout, problem):
                        if found not in seen:
                            seen.add(found)
                            yield found


def _of_launch(recipe: Recipe, layout: str, problem: Problem) -> list[Arguments]:
    made: list[Arguments] = []

    def note(
        address: int, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: str, promotion: str
    ) -> bytes:
        ones = (1,) * len(sizes)
        made.append(Arguments(_TYPES[dtype], address, sizes, strides, box, ones, 0, _SWIZZLES[swizzle], _PROMOTIONS[promotion], 0))
        return bytes(128)

    roles = {each.value for each in recipe.parameters if each.kind in ("pointer", "tensor_map")} | set(weight_parts(layout, problem))
    addresses = {role: 0x7F0000000000 + (index << 32) for index, role in enumerate(sorted(roles))}
    addresses.update(dict.fromkeys(OPTIONAL_ROLES, 0))
    pack(recipe, {**problem.names(), "sm_count": 132}, addresses, note)
    return made


# ---- a wide product


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _legal(rng: random.Random, dtype: int, interleave: int, swizzle: int, rank: int) -> Arguments:
    bits, unit = BITS[dtype], 32 if dtype in UNPACKED or interleave == 2 else 16
    if dtype in PACKED:
        inner = 128 if dtype in UNPACKED else 2 * rng.randint(1, SPANS.get(swizzle, 128) // 16) * 16
    else:
        widest = SPANS.get(swizzle, 128) if swizzle else min(256 * bits // 8, 1024)
        inner = 16 * rng.randint(1, widest // 16) * 8 // bits
    inner = min(inner, 256)
    box = [inner]
    for _ in range(rank - 1):
        box.append(rng.choice((1, 2, 3, 5, 8, 16)))
    sizes = [rng.randint(1, 1 << rng.choice((4, 8, 12))) for _ in range(rank)]
    sizes[0] = _round_up(sizes[0] + 1, 128 if dtype in PACKED else 1)
    strides, width = [], sizes[0] * bits // 8
    for size in sizes[1:]:
        strides.append(_round_up(width, unit) + unit * rng.choice((0, 0, 1, 9)))
        width = strides[-1] * size
        if width >= 1 << 40:
            width = unit
    steps = [rng.choice((1, 1, 1, 2, 8)) for _ in range(rank)] if rng.random() < 0.2 and dtype not in PACKED else [1] * rank
    address = (0x7000_0000_0000 + rng.randrange(1 << 34)) // 128 * 128 + unit * rng.randint(0, 3)
    fill = int(dtype in FLOATS and rng.random() < 0.3)
    return Arguments(dtype, address, tuple(sizes), tuple(strides), tuple(box), tuple(steps), interleave, swizzle, rng.randint(0, 3), fill)


def _broken(rng: random.Random, whole: Arguments) -> Arguments:
    """One argument made illegal."""
    sizes, strides, box, steps = whole.sizes, whole.strides, whole.box, whole.element_strides
    choices = [
        whole._replace(address=whole.address + 8),
        whole._replace(sizes=(0, *sizes[1:])),
        whole._replace(strides=tuple(s + 8 for s in strides)),
        whole._replace(strides=tuple(s | 1 << 40 for s in strides)),
        whole._replace(box=(*box[:-1], 257)),
        whole._replace(box=(*box[:-1], 0)),
        whole._replace(element_strides=(*steps[:-1], 9)),
        whole._replace(element_strides=(*steps[:-1], 0)),
        whole._replace(box=(box[0] + 1, *box[1:])),
        whole._replace(swizzle=1, box=(64 * 8 // BITS[whole.dtype], *box[1:])),
        whole._replace(interleave=2, swizzle=3),
        whole._replace(fill=1),
    ]
    return rng.choice([each for each in choices if each != whole])


def wide_product() -> list[Arguments]:
    """Every dtype with every interleave and swizzle, twice; ranks, boxes, strides, promotions and fills dealt over them by a fixed seed. Then each
    dtype in every rank, and `ILLEGAL` calls with one argument that the documentation forbids."""
    rng = random.Random(_SEED)
    found = []
    ranks = {False: itertools.cycle((1, 2, 3, 4, 5)), True: itertools.cycle((3, 4, 5))}
    for dtype, interleave, swizzle, _ in itertools.product(range(len(BITS)), range(INTERLEAVES), range(SWIZZLES), range(2)):
        if (interleave and dtype in UNPACKED) or (interleave == 2 and swizzle not in (1, 3)):
            continue  # refused: 32 B interleave goes with the 32 B swizzle alone
        found.append(_legal(rng, dtype, interleave, swizzle, next(ranks[interleave > 0])))
    found += [_legal(rng, dtype, 0, 0, rank) for dtype, rank in itertools.product(range(len(BITS)), (1, 2, 3, 4, 5))]
    largest = Arguments(6, 1 << 40, (1 << 32, 1 << 32), ((1 << 40) - 16,), (64, 256), (1, 1), 0, 3, 2, 0)
    found += [largest, largest._replace(sizes=((1 << 32) + 1, 8))]
    plain = [each for each in found if each.dtype not in PACKED and not each.interleave and len(each.sizes) > 1]
    return found + [_broken(rng, rng.choice(plain)) for _ in range(ILLEGAL)]


# ---- the call


def driver_encode(cuda: Any) -> Encode:
    """``cuTensorMapEncodeTiled`` of ``cuda.bindings.driver``; `UNKNOWN` where the binding is older than a type or swizzle."""

    def encode(given: Arguments) -> tuple[int, bytes]:
        try:
            arguments = driver_arguments(cuda, given)
        except ValueError:
            return UNKNOWN, b""
        code, *made = cuda.cuTensorMapEncodeTiled(*arguments)
        return int(code), b"" if int(code) else ctypes.string_at(int(made[0].getPtr()), 128)

    return encode


def driver_arguments(cuda: Any, given: Arguments) -> tuple[Any, ...]:
    """The call's arguments as the binding takes them."""
    return (
        cuda.CUtensorMapDataType(given.dtype),
        len(given.sizes),
        given.address,
        [cuda.cuuint64_t(size) for size in given.sizes],
        [cuda.cuuint64_t(stride) for stride in given.strides],
        [cuda.cuuint32_t(size) for size in given.box],
        [cuda.cuuint32_t(step) for step in given.element_strides],
        cuda.CUtensorMapInterleave(given.interleave),
        cuda.CUtensorMapSwizzle(given.swizzle),
        cuda.CUtensorMapL2promotion(given.promotion),
        cuda.CUtensorMapFloatOOBfill(given.fill),
    )


def record(encode: Encode, arguments: Sequence[Arguments]) -> list[list[Any]]:
    """One list a call: its arguments, the CUresult, and the bytes in hexadecimal without the zeros at the end."""
    rows = []
    for given in arguments:
        code, encoded = encode(given)
        rows.append([*given, code, encoded.rstrip(b"\0").hex()])
    return rows


def read_row(row: Sequence[Any]) -> tuple[Arguments, int, bytes]:
    """(arguments, CUresult, the 128 bytes or nothing) of a row of `record`."""
    *given, code, text = row
    whole = Arguments(*(tuple(each) if isinstance(each, list) else each for each in given))
    return whole, int(code), b"" if code else bytes.fromhex(text).ljust(128, b"\0")
