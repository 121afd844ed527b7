"""Which form of a layer runs: every active expert over all tokens, or each expert over the tokens that chose it.

The first form (``fc1``, ``fc2`` with a list of active experts) adds experts up in registers and decodes weights once a tile of tokens: best while all
tokens fit one tile. The second (``route``, ``groupedfc1``, ``groupedfc2``) reads and decodes an expert's weights once for up to ``group_tile`` of its
own tokens, whatever M is, and adds up through memory.

Of few pairs (a token's choice of one expert) the second form's GEMMs sort the router's choice themselves, which spares a bf16 layer the launch of
``route``.

The bounds are data: the part ``grouping`` of an architecture's selection table (docs/selection.md).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["group_tile", "sorts_itself"]


def group_tile(grouping: Mapping[str, Any] | None, tiles: Collection[int], m: int, top_k: int, experts: int) -> int:
    """Rows of a tile of the grouped form, or 0 where the form over all tokens is taken.

    Args:
        grouping: of the selection table: ``dense_to``, the most tokens of the first form, and ``tiles``, each a ``tile_m`` with the most rows an
            expert would have, were all chosen alike, up to which it is taken; the last has none. None: the first form always.
        tiles: what the device's set has variants for.
        m: tokens; top_k: experts of each; experts: E of this rank.
    """
    if grouping is None or not tiles or m <= grouping["dense_to"]:
        return 0
    share = m * top_k / experts
    wanted = next(int(each["tile_m"]) for each in grouping["tiles"] if share <= each.get("share_to", share))
    return min(tiles, key=lambda tile: (abs(tile - wanted), tile))


def sorts_itself(grouping: Mapping[str, Any] | None, tiles: Collection[int], m: int, top_k: int) -> int:
    """Rows of a tile of the grouped form whose GEMMs sort the router's choice themselves, or 0 where another form is taken.

    Args:
        grouping: of the selection table: ``sorts_to``, the most pairs of this form, which comes before all others; absent: never.
        tiles: what the device's set has such variants for.
        m: tokens; top_k: experts of each.
    """
    if grouping is None or m * top_k > grouping.get("sorts_to", 0):
        return 0
    return min(tiles, default=0)
