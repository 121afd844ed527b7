"""Device memory of any owner: raw pointers, torch tensors, ``__cuda_array_interface__``, DLPack; checked against a TensorSpec.

Nobody is synchronised with: work on a tensor is ordered by the stream that the caller launches on, whoever owns the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from densemoe.runtime.errors import ProblemError
from densemoe.runtime.problem import TensorSpec

__all__ = ["DeviceTensor", "check_tensor"]

#: typestr of __cuda_array_interface__ by our dtype. bf16 and fp8 have no typestr: their owners show integers or void of the same size.
_TYPES: Final = {
    "u8": ("|u1", "|i1"),
    "e4m3": ("|u1", "|i1", "|V1"),
    "e5m2": ("|u1", "|i1", "|V1"),
    "bf16": ("<u2", "<i2", "<V2", "|V2"),
    "f16": ("<f2",),
    "f32": ("<f4",),
    "i32": ("<i4",),
    "i64": ("<i8",),
}
_TORCH_NAMES: Final = {
    "u8": "uint8",
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "i32": "int32",
    "i64": "int64",
}


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous piece of device memory.

    Attributes:
        pointer: address in bytes.
        nbytes: size, or None where the caller gave a bare pointer.
        owner: kept alive by the Plan.
    """

    pointer: int
    nbytes: int | None = None
    owner: object = None


def _from_torch(role: str, value: Any, spec: TensorSpec | None) -> DeviceTensor:
    if not value.is_cuda:
        raise ProblemError(f"{role}: a tensor on {value.device}: give one on the CUDA device")
    if not value.is_contiguous():
        raise ProblemError(f"{role}: strides {tuple(value.stride())} of shape {tuple(value.shape)}: give a contiguous tensor")
    name = str(value.dtype).removeprefix("torch.")
    if spec is not None and name != _TORCH_NAMES[spec.dtype]:
        raise ProblemError(f"{role}: dtype {name}: use {_TORCH_NAMES[spec.dtype]}")
    if spec is not None and tuple(value.shape) != spec.shape:
        raise ProblemError(f"{role}: shape {tuple(value.shape)}: use {spec.shape}")
    return DeviceTensor(value.data_ptr(), value.numel() * value.element_size(), value)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], unit: int) -> bool:
    """Row-major without gaps; the stride of a dimension of one element says nothing, nor does any of an empty tensor."""
    if 0 in shape:
        return True
    size = unit
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != size:
            return False
        size *= extent
    return True


def _from_interface(role: str, value: Any, spec: TensorSpec | None) -> DeviceTensor:
    interface = value.__cuda_array_interface__
    shape, typestr = tuple(interface["shape"]), interface["typestr"]
    itemsize = int(typestr[2:])
    strides = interface.get("strides")
    if strides is not None and not _is_contiguous(shape, tuple(strides), itemsize):
        raise ProblemError(f"{role}: strides {tuple(strides)} of shape {shape}: give a contiguous array")
    if spec is not None and typestr not in _TYPES[spec.dtype]:
        raise ProblemError(f"{role}: typestr {typestr!r}: use {' or '.join(_TYPES[spec.dtype])} for {spec.dtype}")
    if spec is not None and shape != spec.shape:
        raise ProblemError(f"{role}: shape {shape}: use {spec.shape}")
    pointer, read_only = interface["data"]
    if read_only and spec is not None and spec.output:
        raise ProblemError(f"{role}: the array is read-only: give one that the kernel may write")
    count = 1
    for extent in shape:
        count *= extent
    return DeviceTensor(int(pointer or 0), count * itemsize, value)


def _from_dlpack(role: str, value: Any, spec: TensorSpec | None) -> DeviceTensor:
    from densemoe.runtime import dlpack

    dlpack.device_of(role, value)
    lent = dlpack.borrow(role, value)
    try:
        code, bits, lanes = lent.format
        if lent.device[0] not in dlpack.CUDA_DEVICES:
            raise ProblemError(f"{role}: its capsule holds memory of DLPack device type {lent.device[0]}: give a tensor on the CUDA device")
        if not _is_contiguous(lent.shape, lent.strides, 1):
            raise ProblemError(f"{role}: strides {lent.strides} of shape {lent.shape}: give a contiguous tensor")
        if spec is not None and ((code, bits) not in dlpack.FORMATS[spec.dtype] or lanes != 1):
            allowed = " or ".join(map(str, dlpack.FORMATS[spec.dtype]))
            given = f"DLPack type (code {code}, {bits} bits, {lanes} lanes)"
            raise ProblemError(f"{role}: {given}: use (code, bits) {allowed}, one lane, for {spec.dtype}")
        if spec is not None and lent.shape != spec.shape:
            raise ProblemError(f"{role}: shape {lent.shape}: use {spec.shape}")
        if lent.read_only and spec is not None and spec.output:
            raise ProblemError(f"{role}: the tensor is read-only: give one that the kernel may write")
    except ProblemError:
        lent.release()
        raise
    count = 1
    for extent in lent.shape:
        count *= extent
    return DeviceTensor(lent.pointer, count * bits * lanes // 8, lent)


def check_tensor(role: str, value: Any, spec: TensorSpec | None, nbytes: int, alignment: int) -> DeviceTensor:
    """The memory behind ``value``.

    Args:
        value: an address (int), a DeviceTensor, a torch tensor, or anything with ``__cuda_array_interface__`` or ``__dlpack__``.
        spec: dtype and shape that the contract asks for; None for opaque memory (packed weights, workspaces).
        nbytes: size that the kernel uses.
        alignment: in bytes.

    Raises:
        ProblemError: dtype, shape, strides, size or alignment differ, or it is no device memory at all.
    """
    if isinstance(value, bool) or value is None:
        raise ProblemError(f"{role}: {value!r}: give a device tensor, an address, or anything with __cuda_array_interface__ or __dlpack__")
    if isinstance(value, int):
        tensor = DeviceTensor(value)
    elif isinstance(value, DeviceTensor):
        tensor = value
    elif type(value).__module__.split(".")[0] == "torch" and hasattr(value, "data_ptr"):
        tensor = _from_torch(role, value, spec)
    elif hasattr(value, "__cuda_array_interface__"):
        tensor = _from_interface(role, value, spec)
    elif hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        tensor = _from_dlpack(role, value, spec)
    else:
        raise ProblemError(
            f"{role}: {type(value).__name__} is no device memory that densemoe knows: give an address, a torch tensor,"
            " or an object with __cuda_array_interface__ or __dlpack__"
        )
    if tensor.nbytes is not None and tensor.nbytes < nbytes:
        raise ProblemError(f"{role}: {tensor.nbytes} bytes: the problem needs {nbytes}")
    if nbytes and tensor.pointer <= 0:
        raise ProblemError(f"{role}: address {tensor.pointer}: give device memory of {nbytes} bytes")
    if tensor.pointer % alignment:
        raise ProblemError(f"{role}: address {tensor.pointer:#x} is not aligned to {alignment} bytes")
    return tensor
