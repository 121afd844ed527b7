"""Host-side pieces that every kernel module uses."""

from __future__ import annotations

from typing import Any

import cutlass.cute as cute
from cutlass.cute.runtime import make_ptr


def pointer(dtype: Any, alignment: int) -> Any:
    """An example global-memory pointer for ``cute.compile``: element type and alignment in bytes, no address."""
    return make_ptr(dtype, 0, cute.AddressSpace.gmem, assumed_align=alignment)
