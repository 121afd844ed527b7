"""A driver with devices, memory and kernels that exist only in Python: behaves as ``densemoe.runtime.driver.Driver`` does, faults included."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from densemoe.compile.elf import read_cubin
from densemoe.runtime.driver import LaunchConfig
from densemoe.runtime.errors import ArchitectureMismatch, DriverError

ARCHITECTURE_OF = {(9, 0): 90, (10, 0): 100, (10, 3): 103}


class FakeDriver:
    """``capabilities`` are the devices; ``loads`` and ``launches`` say what was done."""

    def __init__(self, capabilities: tuple[tuple[int, int], ...] = ((9, 0),), version: int = 13000) -> None:
        self.capabilities, self._version = capabilities, version
        self.process = os.getpid()
        self.loads: list[str] = []
        self.prepared: list[tuple[Any, int, int, int]] = []
        self.launches: list[tuple[Any, int, bytes]] = []
        self.memory: dict[int, int] = {}
        self.zeroed: list[tuple[int, int]] = []
        self.next_pointer = 1 << 20
        self.change_parameters: Callable[[tuple[tuple[int, int], ...]], tuple[tuple[int, int], ...]] = lambda found: found
        self.owners: dict[int, int] = {}
        self.contents: dict[int, bytes] = {}
        self.context: int | None = 0
        self.capture = 1

    def check_process(self) -> None:
        if os.getpid() != self.process:
            raise DriverError(f"CUDA was initialised in process {self.process}, this is its fork {os.getpid()}")

    def version(self) -> int:
        return self._version

    def device_count(self) -> int:
        return len(self.capabilities)

    def device_name(self, ordinal: int) -> str:
        return f"Fake {ordinal}"

    def capability(self, ordinal: int) -> tuple[int, int]:
        return self.capabilities[ordinal]

    def sm_count(self, ordinal: int) -> int:
        return 132

    def load(self, image: bytes, *, file: str, arch: str, ordinal: int) -> Any:
        cubin = read_cubin(image)
        if cubin.sm != ARCHITECTURE_OF[self.capabilities[ordinal]]:
            raise ArchitectureMismatch(f"{file} was built for {arch}, the device is {self.device_name(ordinal)}")
        self.loads.append(file)
        return cubin

    def kernel(self, library: Any, symbol: str) -> Any:
        assert library.symbol == symbol
        return library

    def unload(self, library: Any) -> None:
        self.loads.append(f"unload {library.symbol}")

    def parameters(self, kernel: Any) -> tuple[tuple[int, int], ...]:
        return self.change_parameters(kernel.parameters)

    def prepare(self, kernel: Any, ordinal: int, dynamic_smem: int, carveout: int) -> None:
        self.prepared.append((kernel, ordinal, dynamic_smem, carveout))

    def resident_clusters(self, kernel: Any, block: Any, cluster: Any, dynamic_smem: int) -> int:
        """GPCs of 18 SMs: two are lost to clusters of four."""
        size = int(cluster[0]) * int(cluster[1]) * int(cluster[2])
        gpcs, rest = divmod(self.sm_count(0), 18)
        return gpcs * (18 // size) + rest // size

    def launch_config(
        self, kernel: Any, grid: Any, block: Any, cluster: Any, smem: int, parameters: bytearray, offsets: Any, programmatic: bool
    ) -> LaunchConfig:
        return LaunchConfig(kernel, (grid, block, cluster, smem, programmatic), 0, (parameters,))

    def launcher(self, *prepared: LaunchConfig) -> Callable[[int], None]:
        return lambda stream: self.launches.extend((each.config, stream, bytes(each.keep[0])) for each in prepared)  # type: ignore[call-overload]

    def allocate(self, nbytes: int) -> int:
        pointer = self.next_pointer
        self.next_pointer += -(-nbytes // 256) * 256 + 256
        self.memory[pointer] = nbytes
        return pointer

    def allocate_apart(self, nbytes: int, content: bytes = b"") -> int:
        pointer = self.allocate(nbytes)
        self.contents[pointer] = content
        return pointer

    def use_device(self, ordinal: int) -> None:
        self.context = ordinal

    def current_device(self) -> int | None:
        return self.context

    def capture_id(self, stream: int) -> int:
        return self.capture

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def zero(self, pointer: int, nbytes: int) -> None:
        self.zeroed.append((pointer, nbytes))

    def pointer_device(self, pointer: int) -> int | None:
        return self.owners.get(pointer)

    def encode_tensor_map(self, *arguments: Any) -> bytes:
        raise AssertionError("these kernels have no tensor maps")
