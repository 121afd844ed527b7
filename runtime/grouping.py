"""Which form of a layer runs: every active expert over all tokens, or each expert over the tokens that chose it.

The first form (``fc1``, ``fc2`` with a list of active experts) adds experts up in registers and decodes weights once a tile of tokens: best while all
tokens fit one tile. The second (``route``, ``groupedfc1``, ``groupedfc2``) reads and decodes an expert's weights once for up to ``group_tile`` of its
own tokens, whatever M is, and adds up through memory.

Modelled: the bounds follow from counts of decoded superblocks, which is where the time of the sm_90a kernels goes (docs/h200.md).
"""

from __future__ import annotations

from typing import Final

__all__ = ["GROUP_TILES", "group_tile"]

GROUP_TILES: Final = (8, 16, 32)  # tile_m of the grouped kernels
LARGEST_DENSE: Final = 16  # tokens up to which the first form decodes an expert's weights once in a tile that is not slower than the grouped ones


def group_tile(m: int, top_k: int, experts: int) -> int:
    """Rows of a tile of the grouped form, or 0 where the form over all tokens is taken.

    Args:
        m: tokens; top_k: experts of each; experts: E of this rank.
    """
    if m <= LARGEST_DENSE:
        return 0
    share = m * top_k / experts  # rows of an expert, were all chosen alike
    return next((tile for tile in GROUP_TILES if share <= tile * 3 / 4), GROUP_TILES[-1])
