"""What the reference and the bounds do to numpy arrays and torch tensors alike: spelled once here, where the two differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Indices", "constants", "indices", "long", "namespace", "power_of_two", "sigmoid", "to_host", "unpack", "untile"]

Array = Any  # numpy array or torch tensor, float64 unless said otherwise
Indices = Sequence[int] | npt.NDArray[np.integer[Any]]

_LEAST_POWER: Final = -320
_POWERS: Final = 2.0 ** np.arange(_LEAST_POWER, 321.0)


def namespace(x: Array) -> Any:
    """numpy or torch, whichever made ``x``."""
    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def indices(like: Array, values: npt.ArrayLike) -> Array:
    """int64 indices that ``like`` can be indexed with."""
    array = np.ascontiguousarray(values, dtype=np.int64)
    xp = namespace(like)
    return array if xp is np else xp.from_numpy(array).to(like.device)


def constants(like: Array, values: npt.ArrayLike) -> Array:
    """float64 constants where ``like`` lies."""
    array = np.asarray(values, dtype=np.float64)
    xp = namespace(like)
    return array if xp is np else xp.tensor(array, dtype=xp.float64, device=like.device)


def long(x: Array) -> Array:
    """``x`` as int64."""
    return x.astype(np.int64) if isinstance(x, np.ndarray) else x.long()


def to_host(x: Array) -> npt.NDArray[Any]:
    """``x`` as a numpy array."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) without overflow on either side."""
    xp = namespace(x)
    small = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1 / (1 + small), small / (1 + small))


def power_of_two(exponent: Array) -> Array:
    """2**exponent of integers from -320 to 320, exact: torch's ldexp goes through float32."""
    return constants(exponent, _POWERS)[long(exponent) - _LEAST_POWER]


def unpack(codes: Array) -> Array:
    """Codes ``[R, K]``, one a byte, of code bytes ``[R, K/2]``."""
    return namespace(codes).stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)


def untile(tiled: Array, rows: int) -> Array:
    """Row-major scale bytes ``[rows, C]`` of tiled ones ``[⌈rows/128⌉·128, C]``."""
    blocks = tiled.reshape(-1, tiled.shape[1] // 4, 32, 4, 4)
    blocks = blocks.transpose(0, 3, 2, 1, 4) if isinstance(tiled, np.ndarray) else blocks.permute(0, 3, 2, 1, 4)
    return blocks.reshape(tiled.shape)[:rows]
