"""What the tcgen05 kernels' sizes are held against: numbers of the devices that they are for. Nothing here was measured by this project."""

from __future__ import annotations

from typing import Final

B200_BANDWIDTH: Final = 7.7e12  # bytes a second of device memory, as published
B200_SM_COUNT: Final = 148
#: Nanoseconds from a copy's issue to its last byte under load: an assumption, on the long side of what is reported for HBM3e.
MEMORY_LATENCY_NS: Final = 1000
LARGEST_SMEM: Final = 232_448  # bytes of shared memory a CTA
TMEM_COLUMNS: Final = 512


def latency_bandwidth_bytes() -> int:
    """Bytes that one SM of a B200 must have in flight to draw its share of the bandwidth: latency x bandwidth / SMs (Little's law)."""
    return round(MEMORY_LATENCY_NS * 1e-9 * B200_BANDWIDTH / B200_SM_COUNT)
