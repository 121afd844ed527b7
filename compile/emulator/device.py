"""The emulator as a device: a launch recipe of the runtime on numpy tensors.

What a GPU is given by a Plan (``runtime.plan.pack``: grid, parameters, tensor maps) the emulator is given here, from the same recipe, names
and packers; only addresses differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from densemoe.compile.emulator.execution import Launch, Report, run
from densemoe.compile.emulator.memory import GlobalMemory
from densemoe.compile.emulator.tensor_map import DataType, L2Promotion, Swizzle, TensorMap
from densemoe.runtime.plan import PackedLaunch, pack
from densemoe.runtime.recipe import Recipe, evaluate

__all__ = ["EARLY", "SM_COUNT", "early_roles", "encode_tensor_map", "launch_of", "launch_recipe"]

#: multiprocessors of the device that is emulated; few, so that small problems give every CTA several tiles
SM_COUNT = 4
#: Weights: they are there before the first launch.
EARLY: Final = ("b", "b.codes", "b.scales")
#: What ``prepare``, ``route`` or the router write: ``early_list`` says that it was complete before the launch before the kernel's began.
_LISTS: Final = ("active_experts", "tiles", "rows", "row_alpha", "ids", "router", "w2_alpha")
_TYPES = {
    "u8": DataType.UINT8,
    "u16": DataType.UINT16,
    "u32": DataType.UINT32,
    "bf16": DataType.BFLOAT16,
    "f16": DataType.FLOAT16,
    "f32": DataType.FLOAT32,
}
_SWIZZLES = {"none": Swizzle.NONE, "32B": Swizzle.BYTES_32, "64B": Swizzle.BYTES_64, "128B": Swizzle.BYTES_128}
_PROMOTIONS = {"none": L2Promotion.NONE, "64B": L2Promotion.BYTES_64, "128B": L2Promotion.BYTES_128, "256B": L2Promotion.BYTES_256}


def early_roles(op: str, architecture: str, settings: Mapping[str, int]) -> tuple[str, ...]:
    """Roles that a kernel may read before ``griddepcontrol.wait`` under the given settings; ``prepare``'s alphas are part of its list on sm_90a."""
    if not settings.get("early_list"):
        return EARLY
    return (*EARLY, *_LISTS, *(("alpha",) if (op, architecture) == ("fc2", "sm_90a") else ()))


def encode_tensor_map(
    address: int, dtype: str, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: str, l2_promotion: str
) -> bytes:
    """What ``runtime.plan.pack`` wants of a tensor map encoder: the 128 bytes, checked as the driver checks them."""
    ones = (1,) * len(sizes)
    promotion = _PROMOTIONS[l2_promotion]
    return TensorMap(address, _TYPES[dtype], sizes, strides, box, ones, swizzle=_SWIZZLES[swizzle], l2_promotion=promotion).encode()


def launch_of(packed: PackedLaunch, kernel: str = "", programmatic: bool = False) -> Launch:
    """A `Launch` from what the runtime packs for the driver."""
    return Launch(kernel, packed.grid, packed.block, packed.cluster, packed.dynamic_smem, bytes(packed.parameters), programmatic)


def launch_recipe(
    ptx: str,
    recipe: Recipe,
    names: Mapping[str, int],
    tensors: Mapping[str, NDArray[Any]],
    outputs: Iterable[str] = (),
    *,
    workspaces: dict[str, NDArray[np.uint8]] | None = None,
    schedule: str = "eager",
    sm_count: int = SM_COUNT,
    races: bool = True,
    kernel: str = "",
    early: Iterable[str] = EARLY,
    rewritten: Iterable[str] = (),
) -> Report:
    """Runs a kernel by its launch recipe, a programmatic one as if launches before it were still running.

    Args:
        ptx: text of the kernel's module.
        recipe: of the variant.
        names: ``Problem.names()``.
        tensors: numpy arrays by role, packed weights (``b``) among them; outputs are written in place. A role that the recipe points to and
            that is missing is a null pointer.
        outputs: roles that the kernel writes: reading them before they are written is an error; the other tensors are read-only.
        workspaces: by role; filled with those that were made, so that a second launch can use them again.
        schedule, races, kernel: as `run`.
        sm_count: multiprocessors of the emulated device.
        early: roles that no launch before writes: they may be read before ``griddepcontrol.wait``.
        rewritten: outputs whose bytes the kernel may write more than once; of the others that is an error.

    Raises:
        RecipeError: the recipe does not fit.
        EmulatorError: as `run`.
    """
    bound = {**names, "sm_count": sm_count}
    memory = GlobalMemory()
    written, known, once = set(outputs), set(early), set(outputs) - set(rewritten)
    addresses: dict[str, int] = {}
    for role, array in tensors.items():
        addresses[role] = memory.add(
            role, array, written=role not in written, writable=role in written, once=role in once, early=role in known
        )
    kept = {} if workspaces is None else workspaces
    expressions = recipe.bind(bound)
    for each in recipe.workspaces:
        size = evaluate(each.nbytes, expressions)
        fresh = each.role not in kept
        if fresh:
            kept[each.role] = np.zeros(size, np.uint8)
        addresses[each.role] = memory.add(each.role, kept[each.role], written=each.zeroed) if size else 0
    for parameter in recipe.parameters:
        if parameter.kind == "pointer":
            addresses.setdefault(parameter.value, 0)
    packed = pack(recipe, bound, addresses, encode_tensor_map)
    return run(ptx, launch_of(packed, kernel, recipe.programmatic_launch), memory, schedule, races=races, sm_count=sm_count)
