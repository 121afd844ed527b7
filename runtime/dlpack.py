"""DLPack capsules read with the standard library: who lends memory by ``__dlpack__`` needs neither numpy nor torch here.

A capsule is taken over by renaming it, after which its own destructor does nothing; the lender's deleter is then called exactly once, when the
last reference to the ``Borrowed`` goes. Unversioned (``dltensor``) and versioned capsules of major version 1 (``dltensor_versioned``) are read.
Layouts and names are those of dlpack.h and of the Python array API's ``__dlpack__``.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, Final

from densemoe.runtime.errors import ProblemError

__all__ = ["CUDA_DEVICES", "FORMATS", "Borrowed", "borrow", "device_of"]

MAJOR_VERSION: Final = 1
READ_ONLY: Final = 1  # bit of DLManagedTensorVersioned.flags
#: Device types whose memory a kernel reaches: kDLCUDA, kDLCUDAManaged.
CUDA_DEVICES: Final = (2, 13)
_DEVICE_NAMES: Final = {1: "the CPU", 2: "a CUDA device", 3: "pinned host memory", 10: "a ROCm device", 13: "CUDA managed memory"}
#: DLDataType (code, bits) by our dtype. Owners without bf16 or fp8 show integers of the same size.
FORMATS: Final = {
    "u8": ((1, 8), (0, 8)),
    "e4m3": ((10, 8), (1, 8), (0, 8)),
    "e5m2": ((12, 8), (1, 8), (0, 8)),
    "bf16": ((4, 16), (1, 16), (0, 16)),
    "f16": ((2, 16),),
    "f32": ((2, 32),),
    "i32": ((0, 32),),
    "i64": ((0, 64),),
}
#: No synchronisation by the lender: work is ordered by the stream that the caller launches on, as with bare addresses.
_NO_SYNCHRONISATION: Final = -1


class _Tensor(ctypes.Structure):
    """``DLTensor``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """``DLManagedTensor``."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    """``DLManagedTensorVersioned``; everything before ``flags`` is the same in every version."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Python's functions are called with the interpreter's lock held, deleters too: those that take it themselves may do so again.
_NAME_OF = ctypes.pythonapi.PyCapsule_GetName
_NAME_OF.restype, _NAME_OF.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_POINTER_OF = ctypes.pythonapi.PyCapsule_GetPointer
_POINTER_OF.restype, _POINTER_OF.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_RENAME = ctypes.pythonapi.PyCapsule_SetName
_RENAME.restype, _RENAME.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_void_p)
_DELETER = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)

#: Name of a capsule, its structure, and its name once taken over; the capsule keeps the pointer to that name, hence the buffers.
_KINDS: Final = {
    b"dltensor": (_Managed, ctypes.create_string_buffer(b"used_dltensor")),
    b"dltensor_versioned": (_ManagedVersioned, ctypes.create_string_buffer(b"used_dltensor_versioned")),
}


def _release(deleter: int | None, address: int) -> None:
    if deleter:
        _DELETER(deleter)(address)


class Borrowed:
    """What a capsule lends. The lender's memory stays until this object goes, or ``release`` is called.

    Attributes:
        pointer: address of the first element in bytes, the tensor's byte offset included.
        shape: in elements.
        strides: in elements; those of a contiguous tensor where the lender gives none.
        format: (DLDataTypeCode, bits, lanes).
        device: (DLDeviceType, ordinal).
        read_only: the lender says so; unversioned capsules cannot.
    """

    def __init__(self, managed: Any, address: int) -> None:
        self._finalizer = weakref.finalize(self, _release, managed.deleter, address)
        self._finalizer.atexit = False  # at exit a lender's library may be gone
        tensor = managed.tensor
        self.pointer = int(tensor.data or 0) + int(tensor.byte_offset)
        self.shape = tuple(int(tensor.shape[i]) for i in range(tensor.ndim))
        self.strides = tuple(int(tensor.strides[i]) for i in range(tensor.ndim)) if tensor.strides else contiguous_strides(self.shape)
        self.format = (int(tensor.code), int(tensor.bits), int(tensor.lanes))
        self.device = (int(tensor.device_type), int(tensor.device_id))
        self.read_only = bool(getattr(managed, "flags", 0) & READ_ONLY)

    def release(self) -> None:
        """Gives the memory back now."""
        self._finalizer()


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a row-major tensor without gaps."""
    strides, size = [], 1
    for extent in reversed(shape):
        strides.append(size)
        size *= extent
    return tuple(reversed(strides))


def device_of(role: str, value: Any) -> tuple[int, int]:
    """(DLDeviceType, ordinal) of an exporter.

    Raises:
        ProblemError: its memory is not a CUDA device's.
    """
    kind, ordinal = (int(part) for part in value.__dlpack_device__())
    if kind not in CUDA_DEVICES:
        raise ProblemError(f"{role}: a tensor on {_DEVICE_NAMES.get(kind, f'DLPack device type {kind}')}: give one on the CUDA device")
    return kind, ordinal


def _export(value: Any) -> Any:
    """The exporter's capsule: a versioned one where it knows of versions."""
    try:
        return value.__dlpack__(stream=_NO_SYNCHRONISATION, max_version=(MAJOR_VERSION, 0))
    except TypeError:  # exporters before version 1.0 do not take max_version
        return value.__dlpack__(stream=_NO_SYNCHRONISATION)


def borrow(role: str, value: Any) -> Borrowed:
    """Takes over the memory that ``value.__dlpack__`` lends, on whatever device.

    Args:
        role: of the tensor, for messages.

    Raises:
        ProblemError: the exporter refuses, or gives something that is no unused DLPack capsule of a version that is known here.
    """
    try:
        capsule = _export(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ProblemError(f"{role}: {type(value).__name__}.__dlpack__ refused: {type(error).__name__}: {error}") from error
    return take(role, capsule)


def take(role: str, capsule: Any) -> Borrowed:
    """Takes over a capsule.

    Raises:
        ProblemError: as ``borrow``.
    """
    if type(capsule).__name__ != "PyCapsule":
        raise ProblemError(f"{role}: __dlpack__ gave {type(capsule).__name__}: a capsule is expected")
    name = _NAME_OF(capsule)
    if name not in _KINDS:
        raise ProblemError(f"{role}: a capsule named {name!r}: an unused 'dltensor' or 'dltensor_versioned' is expected; each can be used once")
    structure, used = _KINDS[name]
    address = int(_POINTER_OF(capsule, name))
    managed = structure.from_address(address)
    version = getattr(managed, "major", MAJOR_VERSION)
    _RENAME(capsule, ctypes.addressof(used))
    if version != MAJOR_VERSION:
        _release(managed.deleter, address)  # of another version nothing else may be read
        raise ProblemError(f"{role}: a DLPack capsule of version {version}: version {MAJOR_VERSION} is read here; use __cuda_array_interface__")
    return Borrowed(managed, address)
