"""Compile-time parameters of the sm_90a kernels of 256 weight rows a CTA: tiles, how they multiply, what lies in shared memory (``sm90_wgmma``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from densemoe.compile.kernels import sm90_common as common
from densemoe.runtime.variant import Variant

WARPGROUP_WARPS: Final = 4
GROUP_ROWS: Final = WARPGROUP_WARPS * common.SUPERBLOCK_ROWS  # weight rows of a CTA's unit
ROW_BYTES: Final = 128  # of a token in a K 64 half
TOKEN_STRIDE: Final = 2 * ROW_BYTES + 16  # from a token's K 128 to the next's, for ``mma.sync``: lanes that load together then meet in no bank
LARGEST_PORTION: Final = 4  # pieces of 16 bytes that a thread has on their way beside 128 accumulators
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
    64: Shape(1, 3, 2, (32, 48, 64), 8),
    96: Shape(2, 3, 1, (80, 96), 0),
    128: Shape(2, 3, 1, (64, 128), 0),
    160: Shape(2, 3, 1, (160,), 0),
}
#: (op, tile_m, activations, outputs, widths): kernels that would spill with those of the shape, or gain nothing by them; "" stands for each.
OTHER_WIDTHS: Final = (
    ("groupedfc1", 64, "", "nvfp4", (32, 64)),
    ("groupedfc1", 128, "", "nvfp4", (128,)),
    ("groupedfc2", 64, "", "", (40, 64)),
)
#: tile_m up to which bf16 tokens that are not in K 64 order are copied past the registers (beyond, copies of four bytes cost more than they
#: save), and up to which other rows in the places of those that a tile lacks cost less than zeros.
LARGEST_COPIED: Final = 64


@dataclass(frozen=True)
class Config:
    """Compile-time parameters of one kernel.

    Attributes:
        op: ``groupedfc1`` or ``groupedfc2``.
        tile_m: tokens of a tile.
        nvfp4_activations: activations are NVFP4 codes and scales instead of bf16.
        c_dtype: output dtype.
    """

    op: str
    tile_m: int
    nvfp4_activations: bool
    c_dtype: str

    @property
    def shape(self) -> Shape:
        """Warpgroups, stages and residency."""
        return SHAPES[self.tile_m]

    @property
    def widths(self) -> tuple[int, ...]:
        """Columns of ``wgmma`` that the kernel has a loop for: those of the shape, or of OTHER_WIDTHS."""
        for op, tile_m, activations, outputs, other in OTHER_WIDTHS:
            if (op, tile_m) == (self.op, self.tile_m) and activations in ("", self.activations) and outputs in ("", self.c_dtype):
                return other
        return self.shape.widths

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
    def activations(self) -> str:
        """Their dtype."""
        return "nvfp4" if self.nvfp4_activations else "bf16"

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
        """What an accumulator is multiplied by to undo the factors of the decoded operands."""
        return float(2**16 if self.nvfp4_activations else 2**8)

    @property
    def half_bytes(self) -> int:
        """Shared memory of a K 64 half of the tile's tokens."""
        return self.tile_m * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a K 128 of the tile's tokens."""
        return self.tile_m * TOKEN_STRIDE if self.warp_products else self.half_bytes * common.K64_HALVES

    @property
    def rows_a_thread(self) -> int:
        """Rows of which a thread brings one piece: 16 bytes of bf16, or a group of 16 codes of one half."""
        pieces = self.tile_m * (8 if self.nvfp4_activations else 16)
        return pieces // self.threads

    @property
    def k64_order(self) -> bool:
        """Whether activations come in K 64 order (``runtime.layout``), as ``wgmma`` wants them: FC1's bf16 ones, which ``route`` brings to it."""
        return self.op == "groupedfc1" and not self.nvfp4_activations and not self.warp_products

    @property
    def copies_tokens(self) -> bool:
        """Whether tokens go from global to shared memory past the registers."""
        return not self.nvfp4_activations and (self.k64_order or self.tile_m <= LARGEST_COPIED)

    @property
    def fills_with_others(self) -> bool:
        """Whether other rows are brought in the places of rows that a tile does not have, instead of zeros."""
        return self.copies_tokens and not self.warp_products and self.tile_m <= LARGEST_COPIED

    @property
    def warps_bring_halves(self) -> bool:
        """Whether a warp that brings tokens through registers has one K 64 half of several rows, which no two lanes store to one bank, or two whole
        rows, as FC2 of 160 rows of bf16, which has no registers for the other."""
        return self.nvfp4_activations or (self.op, self.tile_m) != ("groupedfc2", 160)

    @property
    def portions(self) -> int:
        """Parts in which a thread brings its rows of a K 128, one a K 64 half of the block before: what is on its way lies in registers."""
        return 2 if not self.nvfp4_activations and self.rows_a_thread > LARGEST_PORTION else 1

    @property
    def table_words(self) -> int:
        """Words of a row in the table of rows: its token, and for FC2 its alpha."""
        return 2 if self.op == "groupedfc2" else 1


def config_of(variant: Variant) -> Config:
    """The compile-time parameters of ``variant``."""
    return Config(variant.op, variant.tile_m, variant.a_dtype == "nvfp4", variant.c_dtype)


def check_tile(variant: Variant) -> None:
    """Raises VariantError where the family has no such tile, cluster or option."""
    common.check_tile(variant, SHAPES, GROUP_ROWS)
