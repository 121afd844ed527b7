"""The emulator as a driver: a Loader made with it gives the runtime's own Plans, whose launches run on the emulator, unchanged.

```python
loader = Loader(artifacts, driver=EmulatedDriver(texts_of(artifacts)))
with loader.plan(problem, tensors, 0) as plan:  # tensors: addresses of `EmulatedDriver.allocate`
    plan.launch()
```

Memory is what ``allocate`` gave, with red zones around every piece; bytes that nobody wrote must not be read. A launch runs at once, whatever its
stream. A cubin is found by its digest; what runs is the PTX that it was assembled from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from densemoe.compile import matrix
from densemoe.compile.elf import Cubin, read_cubin
from densemoe.compile.emulate.verify import regenerate
from densemoe.compile.emulator.device import SM_COUNT, encode_tensor_map
from densemoe.compile.emulator.execution import Launch, Report, run
from densemoe.compile.emulator.memory import Buffer, GlobalMemory
from densemoe.runtime.driver import LaunchConfig
from densemoe.runtime.errors import ArchitectureMismatch, ArtifactError, DriverError
from densemoe.runtime.loader import ArtifactSet

__all__ = ["EmulatedDriver", "texts_of"]

_CUDA: Final = 13000
_SM: Final[Mapping[tuple[int, int], int]] = {(9, 0): 90, (10, 0): 100, (10, 3): 103}
_TENSOR_ALIGNMENT: Final = 256


def texts_of(artifacts: ArtifactSet) -> Callable[[str], str]:
    """PTX by the sha256 of a cubin of ``artifacts``: the variant is compiled again, and must give that cubin.

    The function raises ArtifactError for a cubin that the sets do not hold, CompileError where the sources give another one.
    """
    planned = {each.variant.key: each for each in matrix.load().profile("full")}
    kept: dict[str, str] = {}

    def text(sha256: str) -> str:
        if sha256 not in kept:
            entries = [e for arch in artifacts.architectures for e in artifacts.manifest(arch).variants.values() if e.sha256 == sha256]
            if not entries or entries[0].key not in planned:
                raise ArtifactError(f"no variant of the matrix has the cubin {sha256[:12]}…: build again")
            kept[sha256] = regenerate((planned[entries[0].key], sha256))
        return kept[sha256]

    return text


class EmulatedDriver:
    """What ``runtime.driver.Driver`` is to a Loader and its Plans.

    Args:
        texts: PTX by the sha256 of a cubin, `texts_of` or a caller's own.
        capability: of the only device.
        sm_count: its multiprocessors; the grids of persistent kernels follow.
        schedule: of every launch, as ``emulator.run`` takes it.

    Attributes:
        reports: of every launch, in order.
    """

    def __init__(
        self, texts: Callable[[str], str], *, capability: tuple[int, int] = (9, 0), sm_count: int = SM_COUNT, schedule: str = "eager"
    ) -> None:
        self._texts, self._capability, self._sm_count, self.schedule = texts, capability, sm_count, schedule
        self._memory = GlobalMemory()
        self._pieces: dict[int, Buffer] = {}
        self._made = 0
        self.reports: list[Report] = []

    # ---- the device

    def check_process(self) -> None:
        """Any process may use it."""

    def version(self) -> int:
        """CUDA version, as the driver numbers it."""
        return _CUDA

    def device_count(self) -> int:
        """One."""
        return 1

    def device_name(self, ordinal: int) -> str:
        """Says that nothing of it is hardware."""
        return f"PTX emulator, compute capability {self._capability[0]}.{self._capability[1]}"

    def pci_bus_id(self, ordinal: int) -> str:
        """None."""
        return "emulated"

    def capability(self, ordinal: int) -> tuple[int, int]:
        """(major, minor)."""
        return self._capability

    def sm_count(self, ordinal: int) -> int:
        """Multiprocessors."""
        return self._sm_count

    def attribute(self, name: str, ordinal: int) -> int:
        """A device attribute, by its name without ``CU_DEVICE_ATTRIBUTE_``.

        Raises:
            DriverError: one that the emulator does not have.
        """
        known = {"MULTIPROCESSOR_COUNT": self._sm_count, "L2_CACHE_SIZE": 0}
        if name not in known:
            raise DriverError(f"attribute {name}: the emulator has {', '.join(known)} alone")
        return known[name]

    def use_device(self, ordinal: int) -> None:
        """Makes the device current.

        Raises:
            DriverError: there is no such device.
        """
        if ordinal:
            raise DriverError(f"device {ordinal}: the emulator has device 0 alone")

    def synchronize(self) -> None:
        """Launches are done when they return."""

    # ---- kernels

    def load(self, image: bytes, *, file: str, arch: str, ordinal: int) -> tuple[Cubin, str]:
        """(what the cubin says, its PTX).

        Raises:
            ArchitectureMismatch: a cubin for another device.
        """
        cubin = read_cubin(image)
        if cubin.sm != _SM.get(self._capability):
            raise ArchitectureMismatch(f"{file} was built for {arch}, the device is a {self.device_name(ordinal)}")
        return cubin, self._texts(hashlib.sha256(image).hexdigest())

    def kernel(self, library: tuple[Cubin, str], symbol: str) -> tuple[Cubin, str]:
        """The only kernel of a cubin.

        Raises:
            DriverError: it has another name.
        """
        if library[0].symbol != symbol:
            raise DriverError(f"there is no kernel {symbol}: the cubin holds {library[0].symbol}")
        return library

    def unload(self, library: tuple[Cubin, str]) -> None:
        """Nothing is held."""

    def parameters(self, kernel: tuple[Cubin, str]) -> tuple[tuple[int, int], ...]:
        """(offset, size) of each parameter, as the cubin states them."""
        return kernel[0].parameters

    def prepare(self, kernel: tuple[Cubin, str], ordinal: int, dynamic_smem: int, carveout: int) -> None:
        """Shared memory is checked at a launch."""

    def resident_clusters(
        self, kernel: tuple[Cubin, str], block: tuple[int, int, int], cluster: tuple[int, int, int], dynamic_smem: int
    ) -> int:
        """Clusters at once: one CTA a multiprocessor."""
        return self._sm_count // (cluster[0] * cluster[1] * cluster[2])

    def launch_config(
        self,
        kernel: tuple[Cubin, str],
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        block_of_parameters: bytearray,
        offsets: tuple[tuple[int, int], ...],
        programmatic: bool,
    ) -> LaunchConfig:
        """A launch to be made; ``block_of_parameters`` is read at every launch."""
        return LaunchConfig(kernel, (grid, block, cluster, dynamic_smem), 0, (block_of_parameters,))

    def launcher(self, *prepared: LaunchConfig) -> Callable[[int], None]:
        """A function that runs each of ``prepared`` to its end, in turn; it raises EmulatorError where a kernel has a fault."""

        def launch(stream: int) -> None:
            for each in prepared:
                cubin, ptx = each.function
                grid, block, cluster, dynamic_smem = each.config
                (parameters,) = each.keep
                given = Launch(cubin.symbol, grid, block, cluster, dynamic_smem, bytes(parameters))  # type: ignore[call-overload]
                self.reports.append(run(ptx, given, self._memory, self.schedule, sm_count=self._sm_count))

        return launch

    def encode_tensor_map(
        self,
        address: int,
        dtype: str,
        sizes: tuple[int, ...],
        strides: tuple[int, ...],
        box: tuple[int, ...],
        swizzle: str,
        l2_promotion: str,
    ) -> bytes:
        """The 128 bytes of a tensor map, checked as the driver checks them."""
        return encode_tensor_map(address, dtype, sizes, strides, box, swizzle, l2_promotion)

    # ---- memory

    def allocate(self, nbytes: int) -> int:
        """Memory that nobody wrote yet, aligned to 256 bytes."""
        self._made += 1
        pointer = self._memory.add(f"allocation {self._made}", np.zeros(max(nbytes, 1), np.uint8), written=False)
        assert pointer % _TENSOR_ALIGNMENT == 0
        self._pieces[pointer] = self._memory[f"allocation {self._made}"]
        return pointer

    def free(self, pointer: int) -> None:
        """Frees what ``allocate`` gave.

        Raises:
            DriverError: it gave no such address.
        """
        if pointer not in self._pieces:
            raise DriverError(f"{pointer:#x} was not allocated, or is free already")
        self._memory.remove(self._pieces.pop(pointer).name)

    def pointer_device(self, pointer: int) -> int | None:
        """0 for an address inside of allocated memory, else None."""
        return 0 if any(p <= pointer < p + piece.data.size for p, piece in self._pieces.items()) else None

    def _at(self, pointer: int, nbytes: int, mark: bool) -> npt.NDArray[np.uint8]:
        buffer = self._memory.find(pointer, nbytes)
        start = pointer - buffer.address
        if mark and buffer.written is not None:
            buffer.written[start : start + nbytes] = 0xFF
        view: npt.NDArray[np.uint8] = buffer.data[start : start + nbytes]
        return view

    def fill(self, pointer: int, value: int, nbytes: int) -> None:
        """Sets bytes to ``value``. EmulatorError where they are not all of one allocation, as for the others below."""
        if nbytes:
            self._at(pointer, nbytes, True)[:] = value

    def zero(self, pointer: int, nbytes: int) -> None:
        """Sets bytes to 0."""
        self.fill(pointer, 0, nbytes)

    def to_device(self, pointer: int, data: Any) -> None:
        """Copies a contiguous buffer to the device."""
        source = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        if source.nbytes:
            self._at(pointer, source.nbytes, True)[:] = source

    def to_host(self, data: Any, pointer: int) -> None:
        """Copies device memory into a writable contiguous buffer."""
        target = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        if target.nbytes:
            target[:] = self._at(pointer, target.nbytes, False)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copies device memory to device memory."""
        if nbytes:
            self._at(target, nbytes, True)[:] = self._at(source, nbytes, False)
