"""A Plan: one kernel bound to one problem and its tensors, ready to be launched many times.

Making a Plan checks everything, owns the kernel's workspaces, encodes tensor maps and packs the parameter block. Launching it is one driver
call: no allocation, no check that could have been made before, no synchronisation, so it may be captured into a CUDA graph. A Plan belongs to
the process and device that made it. Concurrent launches of one Plan on several streams would share its workspace: make one Plan a stream.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime.errors import PlanError, ProblemError, RecipeError, SelectionError
from densemoe.runtime.memory import DeviceTensor, check_tensor
from densemoe.runtime.problem import GROUP, SCALE_ROWS, Problem
from densemoe.runtime.recipe import Parameter, Recipe, evaluate
from densemoe.runtime.rules import can_implement

if TYPE_CHECKING:
    from densemoe.runtime.driver import Driver, LaunchConfig
    from densemoe.runtime.manifest import ManifestVariant

__all__ = ["OPTIONAL_ROLES", "WEIGHT_LAYOUTS", "PackedLaunch", "Plan", "pack", "packed_weight_bytes", "weight_parts"]

#: (address, dtype, sizes, strides, box, swizzle, l2_promotion) → the 128 bytes of a tensor map
TensorMapEncoder = Callable[[int, str, tuple[int, ...], tuple[int, ...], tuple[int, ...], str, str], bytes]

LARGEST_GRID_X: Final = 2**31 - 1
LARGEST_GRID_YZ: Final = 65535
WORKSPACE_ALIGNMENT: Final = 128
WEIGHT_ALIGNMENT: Final = 128  # sources of bulk copies; whole 128-byte lines besides
_SUPERBLOCK: Final = (64, 128, 4608)  # rows, K and bytes of sm90a-superblock/2
WEIGHT_LAYOUTS: Final = ("sm90a-superblock/2", "sm100-interchange/1", "none")  # none: the kernel reads no weights
#: Optional tensors: a kernel that points to one that the problem lacks is given a null pointer.
OPTIONAL_ROLES: Final = ("alpha_post", "active_experts", "x", "x.scales", "x.multiplier", "x.bf16", "x.k64", "places")


def _interchange_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of the codes and of the tiled scales of sm100-interchange/1 (contract sections 2 to 4)."""
    rows = 2 * problem.experts * problem.intermediate if problem.op == "fc1" else problem.hidden
    return rows * problem.k // 2, -(-rows // SCALE_ROWS) * SCALE_ROWS * (problem.k // GROUP)


def packed_weight_bytes(layout: str, problem: Problem) -> int:
    """Bytes of the packed weights of ``problem`` in ``layout``.

    Raises:
        RecipeError: the layout is not known to this version.
    """
    if layout not in WEIGHT_LAYOUTS:
        known = " and ".join(WEIGHT_LAYOUTS)
        raise RecipeError(f"weight layout {layout!r} is not known: this densemoe knows {known}; update densemoe or rebuild the artifacts")
    if layout == "none":
        return 0
    if layout == "sm100-interchange/1":
        return sum(_interchange_bytes(problem))
    rows, k, size = _SUPERBLOCK
    weight_rows, depth = (problem.hidden, problem.intermediate)
    if problem.op in ("fc1", "groupedfc1"):
        weight_rows, depth = 2 * problem.intermediate, problem.hidden
    return problem.experts * (weight_rows // rows) * -(-depth // k) * size


def weight_parts(layout: str, problem: Problem) -> Mapping[str, int]:
    """Roles that a kernel of ``layout`` may point to inside the packed weights, and where each begins, in bytes.

    Raises:
        RecipeError: the layout is not known to this version.
    """
    packed_weight_bytes(layout, problem)
    if layout == "sm100-interchange/1":
        return {"b": 0, "b.codes": 0, "b.scales": _interchange_bytes(problem)[0]}
    return {} if layout == "none" else {"b": 0}


_WORD: Final = 8  # bytes of an address
_KEPT_MAPS: Final = 64  # encoded tensor maps of one parameter; torch's allocator gives the same few addresses again and again


@dataclass(frozen=True)
class PackedLaunch:
    """What the driver is given for one launch.

    Attributes:
        parameters: the parameter block's bytes.
        offsets: (offset, size) of each parameter in it.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    parameters: bytearray
    offsets: tuple[tuple[int, int], ...]


def pack(recipe: Recipe, names: Mapping[str, int], addresses: Mapping[str, int], encode: TensorMapEncoder | None = None) -> PackedLaunch:
    """Evaluates a recipe: pure, needs no device. The launch oracle and the emulator use it too.

    Args:
        names: integers that its expressions use: ``Problem.names()`` and ``sm_count``.
        addresses: of every role that it points to; 0 for an absent optional tensor.
        encode: makes tensor maps; needed only by recipes that have some.

    Raises:
        RecipeError: an expression, role or size that the recipe has no right to.
    """
    bound = recipe.bind(names)
    offsets = recipe.offsets()
    block = bytearray(max((offset + size for offset, size in offsets), default=0))
    for parameter, (offset, size) in zip(recipe.parameters, offsets, strict=True):
        block[offset : offset + size] = _parameter_bytes(parameter, bound, addresses, size, encode)
    grid = tuple(evaluate(expression, bound) for expression in recipe.grid)
    if any(not 1 <= extent <= largest for extent, largest in zip(grid, (LARGEST_GRID_X, LARGEST_GRID_YZ, LARGEST_GRID_YZ), strict=True)):
        raise RecipeError(f"grid {grid}: each extent must be at least 1 and at most {LARGEST_GRID_X}, {LARGEST_GRID_YZ}, {LARGEST_GRID_YZ}")
    return PackedLaunch((grid[0], grid[1], grid[2]), recipe.block, recipe.cluster, recipe.dynamic_smem, block, offsets)


def _parameter_bytes(
    parameter: Parameter, names: Mapping[str, int], addresses: Mapping[str, int], size: int, encode: TensorMapEncoder | None
) -> bytes:
    if parameter.kind in ("pointer", "tensor_map") and parameter.value not in addresses:
        raise RecipeError(f"parameter {parameter.name!r} needs the tensor {parameter.value!r}: the given ones are {', '.join(sorted(addresses))}")
    if parameter.kind == "pointer":
        return struct.pack("<Q", addresses[parameter.value])
    if parameter.kind == "tensor_map":
        spec = parameter.tensor_map
        if spec is None or encode is None:
            raise RecipeError(f"parameter {parameter.name!r} is a tensor map: give an encoder")
        sizes, strides, box = (tuple(evaluate(each, names) for each in part) for part in (spec.sizes, spec.strides, spec.box))
        return encode(addresses[parameter.value], spec.dtype, sizes, strides, box, spec.swizzle, spec.l2_promotion)
    value = evaluate(parameter.value, names)
    if not -(1 << (8 * size - 1)) <= value < 1 << (8 * size):
        raise RecipeError(f"parameter {parameter.name!r} = {value}: it has {size} bytes")
    return (value % (1 << (8 * size))).to_bytes(size, "little")


class Plan:
    """One kernel, one problem, its tensors; made by ``Loader.plan``.

    Args:
        tensors: device memory by role: those of ``Problem.tensors()`` and ``b``, the packed weights. ``alpha_post`` is given exactly where the
            problem has it. Anything with ``__cuda_array_interface__``, a torch tensor, or an address.
        workspace: device memory for the kernel's workspaces by role, zeroed by the caller where the recipe says so; allocated where absent.
        settings: run-time tuning switches by name, those of the kernel's recipe; its defaults where absent.

    Raises:
        RecipeError: a setting that the kernel lacks or a value that it does not have.
        SelectionError: the variant cannot run the problem.
        ProblemError: a tensor is missing, not asked for, or not what the contract says.
    """

    def __init__(
        self,
        driver: Driver,
        entry: ManifestVariant,
        kernel: Any,
        problem: Problem,
        tensors: Mapping[str, Any],
        ordinal: int,
        workspace: Mapping[str, Any] | None = None,
        settings: Mapping[str, int] | None = None,
    ) -> None:
        accepted, reason = can_implement(entry.variant, problem)
        if not accepted:
            raise SelectionError(f"{entry.key} cannot run this problem: {reason}")
        self.problem, self.entry, self.ordinal = problem, entry, ordinal
        self._driver = driver
        self._owned: list[int] = []
        self._closed = False
        self._update = threading.Lock()
        self._prepared: LaunchConfig | None = None
        self._movable: list[tuple[Parameter, int, int]] | None = None
        self._maps: dict[int, dict[int, bytes]] = {}  # parameter's offset → address → encoded
        self._launch: Callable[[int], None] = self._launch_nothing
        self._tensors = self._check(tensors)
        if problem.m == 0:
            return
        recipe = entry.recipe
        unknown = sorted({*(settings or {})} - {name for name, _ in recipe.settings})
        if unknown:
            known = ", ".join(name for name, _ in recipe.settings) or "none"
            raise RecipeError(f"settings {unknown} are not those of {entry.key}: it has {known}")
        self._names = {**problem.names(), "sm_count": driver.sm_count(ordinal), **(settings or {})}
        if recipe.cluster != (1, 1, 1):
            held = driver.resident_clusters(kernel, recipe.block, recipe.cluster, recipe.dynamic_smem)
            if held < 1:
                raise PlanError(
                    f"{entry.key} launches clusters of {recipe.cluster[0]} CTAs, and the device has room for none (a partition of a device, or"
                    " another process's limits): force a variant with a smaller cluster"
                )
            self._names["resident_clusters"] = held
        try:
            self._addresses = dict.fromkeys(OPTIONAL_ROLES, 0)
            self._addresses.update({role: tensor.pointer for role, tensor in self._tensors.items()})
            self._place_weights()
            self._addresses.update(self._workspaces(recipe, workspace or {}))
            self._packed = pack(recipe, self._names, self._addresses, driver.encode_tensor_map)
            self._prepared = driver.launch_config(
                kernel,
                self._packed.grid,
                self._packed.block,
                self._packed.cluster,
                self._packed.dynamic_smem,
                self._packed.parameters,
                self._packed.offsets,
                recipe.programmatic_launch,
            )
            self._launch = driver.launcher(self._prepared)
        except BaseException:
            self.close()
            raise

    @property
    def key(self) -> str:
        """Key of the variant that this Plan launches."""
        return self.entry.key

    @property
    def prepared(self) -> LaunchConfig:
        """What the driver is given: for callers that launch several Plans at once.

        Raises:
            PlanError: the Plan is closed, or M = 0.
        """
        if self._prepared is None:
            raise PlanError(f"the Plan of {self.key} is closed, or launches nothing: make a new one")
        return self._prepared

    def _place_weights(self) -> None:
        """Addresses of the parts of the packed weights."""
        for role, offset in weight_parts(self.entry.layout, self.problem).items():
            self._addresses[role] = self._tensors["b"].pointer + offset

    def _check(self, tensors: Mapping[str, Any]) -> dict[str, DeviceTensor]:
        specs = self.problem.tensors()
        weights = packed_weight_bytes(self.entry.layout, self.problem)
        has_weights = bool(weight_parts(self.entry.layout, self.problem))
        wanted = {*specs, "b"} if has_weights else {*specs}
        for role in tensors:
            if role not in wanted:
                raise ProblemError(f"tensor {role!r} is not part of this problem: give {', '.join(sorted(wanted))}")
        for role in sorted(wanted):
            if role not in tensors:
                raise ProblemError(f"tensor {role!r} is missing: give {', '.join(sorted(wanted))}")
        checked = {role: check_tensor(role, tensors[role], spec, spec.nbytes, spec.alignment) for role, spec in specs.items()}
        if has_weights:
            checked["b"] = check_tensor("b", tensors["b"], None, weights, WEIGHT_ALIGNMENT)
        if self.problem.m == 0:
            return checked
        sizes = {**{role: spec.nbytes for role, spec in specs.items()}, "b": weights}
        for role, tensor in checked.items():
            owner = self._driver.pointer_device(tensor.pointer)
            if owner is not None and owner != self.ordinal:
                raise ProblemError(f"{role} lies on device {owner}, the Plan is for device {self.ordinal}: put every tensor on one device")
        for role, spec in specs.items():
            if not spec.output:
                continue
            start, end = checked[role].pointer, checked[role].pointer + spec.nbytes
            for other, tensor in checked.items():
                if other != role and tensor.pointer < end and start < tensor.pointer + sizes[other]:
                    raise ProblemError(f"{role} (output) overlaps {other}: give each memory of its own")
        return checked

    def _workspaces(self, recipe: Recipe, given: Mapping[str, Any]) -> dict[str, int]:
        bound = recipe.bind(self._names)
        unknown = set(given) - {each.role for each in recipe.workspaces}
        if unknown:
            raise ProblemError(f"workspace {sorted(unknown)} is not one of {self.key}: it has {[each.role for each in recipe.workspaces]}")
        addresses = {}
        for each in recipe.workspaces:
            nbytes = evaluate(each.nbytes, bound)
            if each.role in given:
                addresses[each.role] = check_tensor(each.role, given[each.role], None, nbytes, WORKSPACE_ALIGNMENT).pointer
                continue
            pointer = self._driver.allocate(nbytes)
            self._owned.append(pointer)
            if each.zeroed:
                self._driver.zero(pointer, nbytes)
            addresses[each.role] = pointer
        return addresses

    def launch(self, stream: int = 0) -> None:
        """Launches the kernel on ``stream`` (a CUstream's address; 0 is the legacy default stream). M = 0 launches nothing.

        Raises:
            PlanError: the Plan is closed.
            DriverError: the launch failed.
        """
        self._launch(stream)

    def _launch_nothing(self, stream: int) -> None:
        """M = 0."""

    def _launch_closed(self, stream: int) -> None:
        raise self._gone()

    def _gone(self) -> PlanError:
        return PlanError(f"the Plan of {self.key} is closed: make a new one")

    def update(self, role: str, value: Any) -> None:
        """Points ``role`` to other memory of the same shape; launches that follow use it. Kernels with tensor maps have them encoded again.

        Raises:
            PlanError: the Plan is closed.
            ProblemError: no such tensor, or it is not what the contract says.
        """
        if self._closed:
            raise self._gone()
        self._driver.check_process()
        if role not in self._tensors:
            raise ProblemError(f"tensor {role!r} is not part of this problem: use one of {', '.join(sorted(self._tensors))}")
        with self._update:
            checked = self._check({**self._tensors, role: value})
            self._tensors = checked
            if self.problem.m == 0:
                return
            self._addresses[role] = checked[role].pointer
            self._place_weights()
            packed = pack(self.entry.recipe, self._names, self._addresses, self._driver.encode_tensor_map)
            self._packed.parameters[:] = packed.parameters

    def words(self) -> tuple[memoryview, dict[str, tuple[tuple[int, int], ...]]] | None:
        """The parameter block as 64-bit words, and (index, offset from its address) of each role's words: for callers that write addresses
        themselves, unchecked, under a lock that no launch passes. None where addresses stand in tensor maps, which ``rebind`` encodes."""
        if self._prepared is None or any(each.kind == "tensor_map" for each in self.entry.recipe.parameters):
            return None
        parts = weight_parts(self.entry.layout, self.problem)
        found: dict[str, list[tuple[int, int]]] = {}
        for each, (offset, _) in zip(self.entry.recipe.parameters, self.entry.recipe.offsets(), strict=True):
            if each.kind == "pointer":
                found.setdefault("b" if each.value in parts else each.value, []).append((offset // _WORD, parts.get(each.value, 0)))
        block = memoryview(self._packed.parameters)
        return block[: len(block) // _WORD * _WORD].cast("Q"), {role: tuple(places) for role, places in found.items()}

    def rebind(self, addresses: Mapping[str, int]) -> None:
        """Points roles to other memory, unchecked: for callers that have checked shapes, dtypes, alignment and device themselves, on every call.

        Raises:
            PlanError: the Plan is closed.
        """
        if self._closed:
            raise self._gone()
        moved = {role: address for role, address in addresses.items() if self._addresses.get(role) != address}
        if "b" in moved:
            moved.update({role: moved["b"] + offset for role, offset in weight_parts(self.entry.layout, self.problem).items()})
        if not moved:
            return
        if self._movable is None:
            recipe = self.entry.recipe
            places = zip(recipe.parameters, self._packed.offsets, strict=True)
            self._movable = [(each, offset, size) for each, (offset, size) in places if each.kind in ("pointer", "tensor_map")]
            for each, offset, size in self._movable:
                if each.kind == "tensor_map":
                    self._maps[offset] = {self._addresses[each.value]: bytes(self._packed.parameters[offset : offset + size])}
        self._addresses.update(moved)
        for parameter, offset, size in self._movable:
            if parameter.value in moved:
                self._packed.parameters[offset : offset + size] = self._address_bytes(parameter, offset, size)

    def _address_bytes(self, parameter: Parameter, offset: int, size: int) -> bytes:
        """A pointer or tensor map for the role's present address."""
        address = self._addresses[parameter.value]
        if parameter.kind == "pointer":
            return address.to_bytes(size, "little")
        known = self._maps[offset]
        if address not in known:
            if len(known) >= _KEPT_MAPS:
                known.clear()
            bound = self.entry.recipe.bind(self._names)
            known[address] = _parameter_bytes(parameter, bound, self._addresses, size, self._driver.encode_tensor_map)
        return known[address]

    def feeds(self, second: Plan) -> None:
        """Checks that this FC1 Plan may feed the FC2 Plan ``second``: it reads this one's output, and where this one skips idle experts it skips
        by the same list, since their columns are unwritten (contract section 5).

        Raises:
            PlanError: it may not, or one of them is closed.
        """
        for each in (self, second):
            if each._closed:
                raise each._gone()
        pairs = {"a": "c", "a.codes": "c.codes", "a.scales": "c.scales"}
        sources = {into: outof for into, outof in pairs.items() if into in second._tensors}
        if (self.problem.op, second.problem.op) != ("fc1", "fc2"):
            raise PlanError(f"{self.key} cannot feed {second.key}: an FC1 Plan feeds an FC2 Plan")
        for into, outof in sources.items():
            if outof not in self._tensors or self._tensors[outof].pointer != second._tensors[into].pointer:
                raise PlanError(f"{second.key} does not read the output of {self.key}: its {into} is other memory than that one's {outof}")
        if not self.problem.active_list:
            return
        if not second.problem.active_list:
            raise PlanError(f"{self.key} skips idle experts and leaves their columns unwritten: give {second.key} the same list of active experts")
        if self._tensors["active_experts"].pointer != second._tensors["active_experts"].pointer:
            raise PlanError(f"{self.key} and {second.key} skip by different lists of active experts: give both the same memory")

    def close(self) -> None:
        """Frees the workspaces and lets go of the tensors' owners. The caller makes sure that no launch still runs."""
        if self._closed:
            return
        self._closed = True
        self._launch = self._launch_closed
        self._prepared = None
        self._tensors = {}
        while self._owned:
            self._driver.free(self._owned.pop())

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
