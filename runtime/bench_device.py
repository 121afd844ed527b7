"""What a measurement was made on and with: device, driver, clocks, power, versions, the artifact set. Standard library and cuda-bindings.

Clocks and power come from NVML through cuda-bindings, else from ``nvidia-smi``; where neither is there they are None, never a guess.
"""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.driver import version_text
from densemoe.runtime.manifest import Manifest

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver

__all__ = ["Sensors", "describe", "set_digest"]

_QUERY: Final = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu", "driver_version")
_FIELDS: Final = ("sm_mhz", "memory_mhz", "power_w", "power_limit_w", "temperature_c", "nvidia_driver")
_SMI_SECONDS: Final = 10
_DISTRIBUTIONS: Final = ("densemoe", "cuda-bindings", "numpy", "torch", "triton", "humming-kernels")


def set_digest(manifest: Manifest) -> str:
    """sha256 over the keys and cubin hashes of a set: another kernel gives another one, another verification record does not."""
    lines = "".join(f"{key} {manifest.variants[key].sha256}\n" for key in sorted(manifest.variants))
    return hashlib.sha256(lines.encode()).hexdigest()


def _number(text: str) -> float | str | None:
    try:
        return float(text)
    except ValueError:
        return text if text[:1].isdigit() else None


class Sensors:
    """Clocks, power and temperature of one device; ``read`` takes some tens of microseconds through NVML, milliseconds else."""

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self._bus = driver.pci_bus_id(ordinal)
        self._nvml: Any = None
        self._handle: Any = None
        try:
            from cuda.bindings import nvml

            nvml.init_v2()
            self._handle = nvml.device_get_handle_by_pci_bus_id_v2(self._bus)
            self._nvml = nvml
        except Exception:  # NVML is absent, refuses, or this cuda-bindings has none: nvidia-smi is asked instead
            self._nvml = None

    def read(self) -> dict[str, Any]:
        """sm_mhz, memory_mhz, power_w, power_limit_w, temperature_c, nvidia_driver, and ``source``; None for what cannot be read."""
        if self._nvml is not None:
            return self._from_nvml()
        try:
            command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "-i", self._bus]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SMI_SECONDS)
            values = [part.strip() for part in done.stdout.strip().split(",")] if done.returncode == 0 else []
        except (OSError, subprocess.TimeoutExpired):
            values = []
        if len(values) != len(_FIELDS):
            return {**dict.fromkeys(_FIELDS), "source": None}
        found: dict[str, Any] = {name: _number(value) for name, value in zip(_FIELDS, values, strict=True)}
        return {**found, "nvidia_driver": values[-1], "source": "nvidia-smi"}

    def _from_nvml(self) -> dict[str, Any]:
        nvml, handle = self._nvml, self._handle

        def value(call: Any, scale: float = 1.0) -> float | None:
            try:
                return float(call()) * scale
            except Exception:  # a sensor that this device or this user lacks
                return None

        def driver() -> str | None:
            try:
                return str(nvml.system_get_driver_version())
            except Exception:
                return None

        return {
            "sm_mhz": value(lambda: nvml.device_get_clock_info(handle, nvml.ClockType.CLOCK_SM)),
            "memory_mhz": value(lambda: nvml.device_get_clock_info(handle, nvml.ClockType.CLOCK_MEM)),
            "power_w": value(lambda: nvml.device_get_power_usage(handle), 1e-3),
            "power_limit_w": value(lambda: nvml.device_get_enforced_power_limit(handle), 1e-3),
            "temperature_c": value(lambda: nvml.device_get_temperature_v(handle, 0)),
            "nvidia_driver": driver(),
            "source": "NVML",
        }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe(driver: Driver, ordinal: int, manifest: Manifest, date: str) -> dict[str, Any]:
    """Provenance of what is measured on a device with a set.

    Args:
        date: UTC, ISO 8601; the caller's clock.
    """
    return {
        "device": driver.device_name(ordinal),
        "capability": list(driver.capability(ordinal)),
        "sm_count": driver.sm_count(ordinal),
        "l2_bytes": driver.attribute("L2_CACHE_SIZE", ordinal),
        "cuda_driver": version_text(driver.version()),
        "arch": manifest.arch,
        "set_sha256": set_digest(manifest),
        "variants": len(manifest.variants),
        "ptxas": str(manifest.toolchain.get("ptxas", "")),
        "date": date,
        "python": platform.python_version(),
        "versions": {name: version for name in _DISTRIBUTIONS if (version := _version(name)) is not None},
        "host": f"{platform.system()} {platform.machine()}, {sys.implementation.name}",
    }
