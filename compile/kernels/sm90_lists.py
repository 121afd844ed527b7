"""Tiles and rows of the grouped GEMMs of few tokens, sorted by each warp for itself in registers (variants with the option ``routes``).

Of up to 32 pairs (a token's choice of one expert) a launch of ``route`` takes longer than sorting them, and the launch behind it fetches no weights
until it knows its experts. Here every warp loads the router's choice and sorts it before it fetches weights, a lane a pair:

    key = expert · 32 + pair ──sorted──► a lane a place: its expert, its pair
    begins an expert? ──ballot──► begins a tile: every tile_m-th row of an expert ──ballot──► a lane a tile: its word

No warp waits for another, and what is looked up later is a shuffle away. What comes out is what ``route`` gives: those of one expert together, in the
order of pairs, cut into tiles. Ids off this rank are skipped where other ranks hold the rest, otherwise become rows of expert 0 whose scale is NaN;
without a pair one tile of no rows stands.
"""

from __future__ import annotations

from typing import Any, Final

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels.sm90_conversion import ballot, lowest_bit
from densemoe.compile.kernels.sm90_epilogue import multiply, select, shuffle_xor
from densemoe.compile.kernels.sm90_prepare import NAN_BITS, load_id
from densemoe.runtime.errors import VariantError
from densemoe.runtime.recipe import Parameter
from densemoe.runtime.rules import LARGEST_ROUTED
from densemoe.runtime.variant import Variant

PAIRS: Final = LARGEST_ROUTED  # a lane each
PAIR_BITS: Final = PAIRS.bit_length() - 1
TILE_M: Final = 8  # of up to 32 pairs an expert seldom has more
NO_PAIR: Final = 0x7FFFFFFF  # a key above all others
#: A tile's word: expert · 2**12 + first row · 2**6 + rows; experts are below ``rules.SORTED_EXPERTS``.
EXPERT_SHIFT: Final = 12
ROW_SHIFT: Final = 6
MASK: Final = (1 << ROW_SHIFT) - 1

#: What a launch is told of the router's choice; FC2 is told the router's weights and the experts' scales too.
CHOICE: Final = (
    Parameter("ids", "pointer", "ids"),
    Parameter("id_bytes", "u32", "id_bytes"),
    Parameter("first_expert", "u32", "first_expert"),
    Parameter("elsewhere", "u32", "elsewhere"),
)
SCALES: Final = (Parameter("router", "pointer", "router"), Parameter("w2_alpha", "pointer", "w2_alpha"))


def check(variant: Variant) -> None:
    """Raises VariantError where no kernel that sorts the router's choice itself can be ``variant``."""
    if variant.tile_m != TILE_M:
        raise VariantError(f"tile {variant.tile_m}x{variant.tile_n} of {variant.key}: what routes itself has tiles of {TILE_M} rows")


def tile_words(tiles: Any, index: Any, exists: Any) -> list[Any]:
    """[expert, first row, rows] of a tile, zeros where there is none.

    Args:
        tiles: of ``sort_choice``; index: the same in every lane.
    """
    word = common.shuffle_from(tiles, index) * exists
    return [word >> EXPERT_SHIFT, (word >> ROW_SHIFT) & MASK, word & MASK]


def expert_of_tile(tiles: Any, index: Any) -> Any:
    """The expert of a tile, 0 where there is none."""
    return common.shuffle_from(tiles, index) >> EXPERT_SHIFT


def tokens_of(tokens: Any, first_row: Any, places: list[Any], exists: list[Any]) -> list[Any]:
    """The tokens of rows ``first_row`` + places, 0 where ``exists`` is 0."""
    return [common.shuffle_from(tokens, first_row + place) * there for place, there in zip(places, exists, strict=True)]


def row_of(tokens: Any, weights: Any, of_experts: Any, words: list[Any], lane: Any) -> tuple[Any, Any]:
    """(scale, token) of row ``lane`` of a tile; 0 and -1 where the tile ends before."""
    exists, row = Int32(lane < words[2]), words[1] + lane
    scale = multiply(common.shuffle_from(weights, row), common.shuffle_from(of_experts, row))
    return select(exists, scale, Float32(0.0)), select(exists, common.shuffle_from(tokens, row), Int32(-1))


def highest_bit(mask: Any) -> Any:
    """The place of the highest bit that is set."""
    return pr.inline_ptx_hl("bfind.u32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[mask])


def population(mask: Any) -> Any:
    """Bits that are set."""
    return pr.inline_ptx_hl("popc.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[mask])


def sort_lanes(key: Any, bits: int, sorted_bits: int, lane: Any) -> Any:
    """Keys of every 2**``bits`` lanes in ascending order, given that those of every 2**``sorted_bits`` are: bitonic, a comparison a lane and step."""
    for stage in range(sorted_bits + 1, bits + 1):
        for step in range(stage, 0, -1):
            mask = (1 << stage) - 1 if step == stage else 1 << (step - 1)  # blocks meet back to back, then distances halve
            key = smaller_if(key, shuffle_xor(key, mask), lane & (1 << (step - 1)))
    return key


def smaller_if(own: Any, other: Any, upper: Any) -> Any:
    """The smaller of two keys where ``upper`` is 0, else the larger."""
    return pr.inline_ptx_hl(
        "{ .reg .pred p, q; setp.ne.b32 q, {$r2}, 0; setp.lt.xor.s32 p, {$r1}, {$r0}, q; selp.b32 {$w0}, {$r1}, {$r0}, p; }",
        write_only_types=[Int32],
        read_only_args=[own, other, upper],
    )


def place_of_bit(mask: Any, index: Any) -> Any:
    """The place of the ``index``-th bit that is set, counted from 0; some place where fewer are."""
    place = Int32(0)
    for width in (16, 8, 4, 2, 1):
        below = population((mask >> Uint32(place)) & Uint32((1 << width) - 1))
        beyond = Int32(index >= below)
        index = index - below * beyond
        place = place + width * beyond
    return place


@cute.jit
def sort_choice(tile_m: cutlass.Constexpr, scales: cutlass.Constexpr, choice, pairs, top_k, experts, lane):
    """A warp sorts the router's choice.

    Args:
        scales: whether rows have scales.
        choice: what a launch is told of ``CHOICE`` and, where rows have scales, of ``SCALES``.
        pairs: ``M`` · ``top_k``; experts: here.

    Returns:
        How many tiles there are; the word of tile ``lane``; token of row ``lane``; its weight and its expert's scale, whose product is the row's
        (loads that nobody has waited for).
    """
    ids, id_bytes, first_expert, elsewhere, router, w2_alpha = choice
    exists = Int32(lane < pairs)
    local = load_id(ids + Int64(lane) * Int64(id_bytes), exists) - first_expert
    here = exists & Int32(local >= 0) & Int32(local < experts)
    bad = exists & (here ^ 1) & Int32(elsewhere == 0)
    key = select(here | bad, local * here * PAIRS + lane, Int32(NO_PAIR))

    # from here on a lane has a place instead of a pair
    own = sort_lanes(key, 3, 0, lane)
    if pairs > 8:
        own = sort_lanes(own, 4, 3, lane)
        if pairs > 16:
            own = sort_lanes(own, 5, 4, lane)
    held = Int32(own != NO_PAIR)
    pair = (own & (PAIRS - 1)) * held
    expert = own >> PAIR_BITS
    weight, of_expert = Float32(0.0), Float32(0.0)
    if cutlass.const_expr(scales):
        strange = (common.shuffle_from(bad, pair)) & held
        weight = select(strange, Uint32(NAN_BITS).bitcast(Float32), common.load_global_f32_if(router + Int64(pair) * 4, held))
        of_expert = common.load_global_f32_if(w2_alpha + Int64(expert) * 4, held)
    token = Int32(Uint32(pair) // Uint32(top_k))

    before = common.shuffle_from(expert, lane - 1)
    begun = ballot(Int32((lane == 0) | (expert != before)))  # the first place without a row begins something too
    from_here = Uint32(0xFFFFFFFF) << Uint32(lane)
    above = from_here << Uint32(1)
    first_row = highest_bit(begun & ~above)
    beyond = begun & above
    end = select(Int32(beyond != 0), lowest_bit(beyond), Int32(PAIRS))
    begins_tile = held & Int32(((lane - first_row) & (tile_m - 1)) == 0)
    word = (expert << EXPERT_SHIFT) | (lane << ROW_SHIFT) | min(end - lane, Int32(tile_m))

    # from here on a lane has a tile too
    begun_tiles = ballot(begins_tile)
    count = population(begun_tiles)
    place = place_of_bit(begun_tiles, lane)
    words = common.shuffle_from(word, place) * Int32(lane < count)
    return max(count, Int32(1)), words, token, weight, of_expert
