"""Whether the outputs of ``route`` are the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np

from densemoe.runtime import reference


def same_routes(tiles: Any, rows: Any, row_alpha: Any, expected: reference.Routes, places: Any = None) -> None:
    """Asserts that they are, bit for bit; a token's choices of one expert twice are rows in any order (`sm90_route`)."""
    count, total = len(expected.tiles), len(expected.rows)
    assert tiles[0].tolist() == [count, total, 0, 0]
    assert np.array_equal(tiles[1 : 1 + count, :3], expected.tiles)
    assert np.array_equal(rows[:total], expected.rows)
    np.testing.assert_array_equal(expected.in_one_order(row_alpha[:total]), expected.in_one_order(expected.row_alpha))
    if places is not None:
        assert expected.misplaced(places, rows, row_alpha) == 0
