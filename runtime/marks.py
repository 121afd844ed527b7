"""The pass marks of the implementation that the contract was read from (contract section 9): loose, reported beside our bounds."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.runtime.arrays import Array, namespace, to_host
from densemoe.runtime.bounds import Report
from densemoe.runtime.nvfp4 import quantise_rows

__all__ = ["fc1_mark", "fc2_mark", "layer_mark"]

FC1_SHARE: Final = 0.95  # of codes, and of scale bytes, within 1
FC2_SHARE: Final = 0.90
LAYER_SHARE: Final = 0.97


def _mark(close: Array, least: float, name: str) -> Report:
    """A Report whose ``worst`` is the share that missed, divided by the share that may."""
    count = int(close.reshape(-1).shape[0])
    within = int(close.sum())
    missed = count - within
    share = within / count if count else 1.0
    return Report(count, (1 - share) / (1 - least), missed if share < least else 0, detail=f"{share:.4%} within", name=name)


def _ordinal(codes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Place of an e2m1 code on the number line, -7 … 7."""
    magnitude = codes.astype(np.int64) & 7
    return np.where(codes >= 8, -magnitude, magnitude)


def fc1_mark(codes: Array, scales: Array, exact: Array, multiplier: float) -> list[Report]:
    """At least 95 % of codes, and of scale bytes, within ±1 of the exact output's.

    Args:
        codes: one code a byte ``[M, N]``.
        scales: row-major ``[M, N/16]``.
        exact: float64 ``[M, N]``.
        multiplier: ``output_multiplier``.
    """
    expected_codes, expected_scales = quantise_rows(to_host(exact).astype(np.float32), np.float32(multiplier))
    code_distance = np.abs(_ordinal(to_host(codes)) - _ordinal(expected_codes))
    scale_distance = np.abs(to_host(scales).astype(np.int64) - expected_scales.astype(np.int64))
    return [
        _mark(code_distance <= 1, FC1_SHARE, "codes within 1 of the reference"),
        _mark(scale_distance <= 1, FC1_SHARE, "scale bytes within 1 of the reference"),
    ]


def _close(actual: Array, expected: Array, relative: float, absolute: float) -> Array:
    xp = namespace(expected)
    return xp.abs(actual - expected) <= absolute + relative * xp.abs(expected)


def fc2_mark(actual: Array, exact: Array) -> Report:
    """At least 90 % within rtol 0.1 / atol 0.05; float64 ``[M, H]``."""
    return _mark(_close(actual, exact, 0.1, 0.05), FC2_SHARE, "within 10 % + 0.05 of the reference")


def layer_mark(actual: Array, unquantised: Array) -> Report:
    """At least 97 % within 0.15 + 1 % of the unquantised layer; float64 ``[M, H]``."""
    return _mark(_close(actual, unquantised, 0.01, 0.15), LAYER_SHARE, "within 0.15 + 1 % of the unquantised layer")
