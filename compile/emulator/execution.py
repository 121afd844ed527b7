"""Running a kernel: `run` and what it takes and gives."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from densemoe.compile.emulator.machine import Machine, Schedule
from densemoe.compile.emulator.memory import GlobalMemory
from densemoe.compile.emulator.translation import load_program
from densemoe.runtime.errors import EmulatorError

__all__ = ["Launch", "Report", "run"]

_LARGEST_SMEM = 232448  # 227 KiB: what one CTA may have on sm_90 and sm_100


@dataclass(frozen=True)
class Launch:
    """What a driver is given for a launch.

    Attributes:
        kernel: name of the entry; "" where the PTX has only one.
        grid: CTAs in x, y, z.
        block: threads of a CTA.
        cluster: CTAs of a cluster.
        dynamic_smem: bytes.
        parameters: the parameter block.
        programmatic: with programmatic stream serialisation: launches before may still run until ``griddepcontrol.wait``.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int] = (1, 1, 1)
    dynamic_smem: int = 0
    parameters: bytes = b""
    programmatic: bool = False


@dataclass
class Report:
    """What a run did.

    Attributes:
        instructions: warp instructions by family (the opcode up to its first dot).
        bytes: moved, by path.
        products: matrix instructions by kind.
        waits: barrier waits by kind.
        bank_conflicts: extra cycles of shared-memory accesses.
        lints: remarks that are no errors.
        schedule: as it was given.
        digest: of the kernel's instructions.
        seconds: wall time.
    """

    instructions: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    products: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    bank_conflicts: int = 0
    lints: list[str] = field(default_factory=list)
    schedule: str = "eager"
    digest: str = ""
    seconds: float = 0.0

    def as_dict(self) -> Mapping[str, object]:
        """For JSON."""
        return dict(self.__dict__)


def run(
    ptx: str,
    launch: Launch,
    memory: GlobalMemory,
    schedule: str = "eager",
    *,
    races: bool = True,
    sm_count: int = 132,
    tensor_fences: bool = True,
) -> Report:
    """Executes a kernel; global memory is changed in place.

    Args:
        ptx: text of a module.
        launch: grid and parameters.
        memory: the buffers that the parameters point to.
        schedule: ``eager``, ``lazy``, ``random:SEED`` or ``pct:SEED:DEPTH``.
        races: detect data races and missing proxy fences.
        sm_count: what ``%nsmid`` says.
        tensor_fences: accesses of tensor memory without the ``tcgen05.fence`` that the ISA asks for are errors; else, where something orders
            them at all, remarks among the report's ``lints``, for kernels of others that leave the fences out.

    Raises:
        EmulatorError: an instruction that is not modelled (before anything runs), or the first fault that the run meets: out of bounds,
            uninitialised, misaligned, a race, a barrier error, a deadlock; with CTA, warp and PTX line.
    """
    started = time.perf_counter()
    grid, block, cluster = launch.grid, launch.block, launch.cluster
    if any(n < 1 for n in (*grid, *block, *cluster)) or any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise EmulatorError(f"grid {grid}, block {block}, cluster {cluster}: positive, and the grid a multiple of the cluster")
    if int(np.prod(block)) > 1024 or int(np.prod(cluster)) > 16:
        raise EmulatorError(f"block {block} and cluster {cluster}: at most 1024 threads and 16 CTAs")
    program = load_program(ptx, launch.kernel, block, int(np.prod(cluster)) > 1)
    if len(launch.parameters) < program.kernel.parameter_bytes:
        raise EmulatorError(f"{len(launch.parameters)} bytes of parameters: {program.kernel.name} has {program.kernel.parameter_bytes}")
    if launch.dynamic_smem < 0 or program.static_bytes + launch.dynamic_smem > _LARGEST_SMEM:
        raise EmulatorError(f"{program.static_bytes} + {launch.dynamic_smem} bytes of shared memory: at most {_LARGEST_SMEM}")
    if program.kernel.cluster is not None and tuple(program.kernel.cluster) != tuple(cluster):
        raise EmulatorError(f"cluster {cluster}: {program.kernel.name} demands {program.kernel.cluster}")
    memory.begin_launch()
    machine = Machine(
        program, grid, block, cluster, launch.dynamic_smem, bytes(launch.parameters), memory, Schedule.parse(schedule), races, sm_count,
        tensor_fences, launch.programmatic,
    )
    with np.errstate(all="ignore"):
        machine.run()
    report = Report(
        bytes=dict(machine.moved),
        products=dict(machine.products),
        waits=dict(machine.waits),
        bank_conflicts=machine.conflicts.cycles,
        lints=list(machine.lints),
        schedule=schedule,
        digest=program.digest,
        seconds=time.perf_counter() - started,
    )
    for version, times in machine.executed.items():
        for family, count in version.counts:
            report.instructions[family] = report.instructions.get(family, 0) + count * times
    return report
