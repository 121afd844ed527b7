"""Compile-time parameters of the sm_90a kernels of 256 weight rows a CTA: tiles, how they multiply, what lies in shared memory (``sm90_wgmma``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from densemoe.compile.kernels import sm90_common as common
from densemoe.runtime.variant import DETERMINISTIC, Variant

WARPGROUP_WARPS: Final = 4
GROUP_ROWS: Final = WARPGROUP_WARPS * common.SUPERBLOCK_ROWS  # weight rows of a CTA's unit
ROW_BYTES: Final = 128  # of a token in a K 64 half
TOKEN_STRIDE: Final = 2 * ROW_BYTES + 16  # from a token's K 128 to the next's, for ``mma.sync``: lanes that load together then meet in no bank
TABLE_SLOTS: Final = 3  # tiles whose rows stand in shared memory: the one that is multiplied, the one that is loaded, the next


@dataclass(frozen=True)
class Shape:
    """What was measured best for a tile (docs/tried.md), by tile_m.

    Attributes:
        warpgroups: of a CTA.
        weight_stages: superblocks in the ring of a superblock row.
        resident_ctas: CTAs meant to be resident on one SM.
        widths: tokens that the kernel has a loop for, ascending: a tile takes the smallest that holds its rows.
        staged_rows: rows that a warp of FC2 hands through shared memory at a time (``sm90_workspace``), as that has room; 0: adds them from its
            registers, since of two warpgroups each has half of a row.
        warp_products: each warp multiplies by itself (``mma.sync``), instead of four together (``wgmma``).
    """

    warpgroups: int
    weight_stages: int
    resident_ctas: int
    widths: tuple[int, ...]
    staged_rows: int
    warp_products: bool = False


SHAPES: Final = {
    16: Shape(1, 2, 4, (8, 16), 4, warp_products=True),
    32: Shape(1, 2, 3, (24, 32), 8),
    48: Shape(1, 3, 2, (32, 40, 48), 8),
    64: Shape(1, 3, 2, (48, 64), 8),
    96: Shape(2, 3, 1, (80, 96), 0),
    128: Shape(2, 3, 1, (112, 128), 0),
    160: Shape(2, 3, 1, (160,), 0),
}
#: (op, tile_m) → widths other than the shape's: those that were measured better, or do not spill.
OTHER_WIDTHS: Final = {("groupedfc1", 160): (144, 160), ("groupedfc2", 64): (40, 64)}
#: tile_m up to which other rows in the places of those that a tile lacks cost less than zeros.
LARGEST_FILLED: Final = 64


@dataclass(frozen=True)
class Config:
    """Compile-time parameters of one kernel.

    Attributes:
        op: ``groupedfc1`` or ``groupedfc2``.
        tile_m: tokens of a tile.
        c_dtype: output dtype; ``nvfp4``: FC1 writes the bf16 values that codes and scales stand for.
        ordered: FC2 adds in one order.
    """

    op: str
    tile_m: int
    c_dtype: str
    ordered: bool = False

    @property
    def shape(self) -> Shape:
        """Warpgroups, stages and residency."""
        return SHAPES[self.tile_m]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of ``wgmma`` that the kernel has a loop for: those of the shape, or of OTHER_WIDTHS."""
        return OTHER_WIDTHS.get((self.op, self.tile_m), self.shape.widths)

    @property
    def warp_products(self) -> bool:
        """Whether each warp multiplies by itself."""
        return self.shape.warp_products

    @property
    def activation_stages(self) -> int:
        """K 128 blocks of tokens in shared memory: one is multiplied and one is brought; of a third one group of ``wgmma`` may still be read."""
        return 2 if self.warp_products else 3

    @property
    def staged_rows(self) -> int:
        """Rows that a warp of FC2 hands through shared memory at a time."""
        return self.shape.staged_rows if self.op == "groupedfc2" else 0

    @property
    def warps(self) -> int:
        """Warps of a CTA."""
        return self.shape.warpgroups * WARPGROUP_WARPS

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return self.warps * 32

    @property
    def blocks(self) -> int:
        """m16 blocks of a superblock that one warp multiplies."""
        return common.M16_BLOCKS // self.shape.warpgroups

    @property
    def token_blocks(self) -> int:
        """Columns of eight tokens."""
        return self.tile_m // common.MMA_TOKENS

    @property
    def accumulators(self) -> int:
        """float32 registers of a lane's accumulators: ``[m16 block][token block][4]``."""
        return self.blocks * self.token_blocks * common.ACCUMULATORS

    @property
    def product_scale(self) -> float:
        """What an accumulator is multiplied by to undo the factor of decoded weights."""
        return float(2**8)

    @property
    def half_bytes(self) -> int:
        """Shared memory of a K 64 half of the tile's tokens."""
        return self.tile_m * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a K 128 of the tile's tokens."""
        return self.tile_m * TOKEN_STRIDE if self.warp_products else self.half_bytes * common.K64_HALVES

    @property
    def k64_order(self) -> bool:
        """Whether activations come as bf16 in K 64 order (``runtime.layout``), as ``wgmma`` wants them, and FC1 writes so what FC2 reads."""
        return not self.warp_products

    @property
    def fills_with_others(self) -> bool:
        """Whether other rows are brought in the places of rows that a tile does not have, instead of zeros."""
        return self.k64_order and self.tile_m <= LARGEST_FILLED

    @property
    def table_words(self) -> int:
        """Words of a row in the table of rows: its token, and for FC2 its alpha; the alpha alone where each row's sums are its own."""
        return 2 if self.op == "groupedfc2" and not self.ordered else 1

    @property
    def alphas_at(self) -> int:
        """Where the alphas of a tile stand in its part of the table, in bytes."""
        return (self.table_words - 1) * self.tile_m * 4


def config_of(variant: Variant) -> Config:
    """The compile-time parameters of ``variant``."""
    return Config(variant.op, variant.tile_m, variant.c_dtype, bool(variant.option(DETERMINISTIC)))


def check_tile(variant: Variant) -> None:
    """Raises VariantError where the family has no such tile, cluster or option."""
    common.check_tile(variant, SHAPES, GROUP_ROWS, (DETERMINISTIC,) if variant.op == "groupedfc2" else ())
