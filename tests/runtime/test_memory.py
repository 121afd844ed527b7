"""Owners of device memory: addresses, ``__cuda_array_interface__``, DLPack of either kind, with what each check refuses."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np
import pytest
import torch
from exporter import ADDRESS, Exporter

from densemoe.runtime import dlpack
from densemoe.runtime.errors import ProblemError
from densemoe.runtime.memory import DeviceTensor, check_tensor
from densemoe.runtime.problem import TensorSpec

SPEC = TensorSpec("a", "bf16", (4, 64), 16)
OUTPUT = TensorSpec("c", "bf16", (4, 64), 16, output=True)

# ---- DLPack


@pytest.mark.parametrize("changes", [{}, {"versioned": False}, {"knows_versions": False}, {"strides": None}, {"device": (13, 0)}])
def test_a_lent_tensor_is_taken_and_given_back_once(changes: dict[str, Any]) -> None:
    exporter = Exporter(**changes)
    tensor = check_tensor("a", exporter, SPEC, SPEC.nbytes, 16)
    assert (tensor.pointer, tensor.nbytes) == (ADDRESS, 512)
    assert exporter.released == 0
    assert exporter.asked[-1]["stream"] == -1
    del tensor
    gc.collect()
    assert exporter.released == 1


def test_a_version_that_is_known_is_asked_for() -> None:
    exporter = Exporter()
    check_tensor("a", exporter, SPEC, SPEC.nbytes, 16)
    assert exporter.asked == [{"stream": -1, "max_version": (1, 0)}]


def test_the_byte_offset_counts() -> None:
    assert check_tensor("a", Exporter(byte_offset=4096), SPEC, SPEC.nbytes, 16).pointer == ADDRESS + 4096
    with pytest.raises(ProblemError, match="aligned"):
        check_tensor("a", Exporter(byte_offset=8), SPEC, SPEC.nbytes, 16)


def test_strides_of_single_elements_say_nothing() -> None:
    spec = TensorSpec("a", "bf16", (1, 64), 16)
    assert check_tensor("a", Exporter(shape=(1, 64), strides=(7, 1)), spec, spec.nbytes, 16).nbytes == 128


def test_an_empty_tensor_needs_no_memory() -> None:
    spec = TensorSpec("a", "bf16", (0, 64), 16)
    assert check_tensor("a", Exporter(shape=(0, 64), strides=(3, 5), data=None), spec, 0, 16).nbytes == 0


@pytest.mark.parametrize(
    ("dtype", "format_"),
    [
        ("u8", (1, 8, 1)),
        ("u8", (0, 8, 1)),
        ("bf16", (1, 16, 1)),
        ("f16", (2, 16, 1)),
        ("f32", (2, 32, 1)),
        ("e4m3", (10, 8, 1)),
        ("e5m2", (12, 8, 1)),
    ],
)
def test_types_of_the_right_size_are_taken(dtype: str, format_: tuple[int, int, int]) -> None:
    spec = TensorSpec("a", dtype, (4, 64), 16)
    assert check_tensor("a", Exporter(format=format_), spec, spec.nbytes, 16).nbytes == spec.nbytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": (1, 0)}, "a tensor on the CPU"),
        ({"device": (10, 0)}, "a ROCm device"),
        ({"device": (99, 0)}, "DLPack device type 99"),
        ({"in_capsule": (1, 0)}, "capsule holds memory of DLPack device type 1"),
        ({"format": (2, 16, 1)}, r"code 2, 16 bits, 1 lanes.*bf16"),
        ({"format": (4, 16, 2)}, "one lane"),
        ({"shape": (4, 32), "strides": (32, 1)}, r"shape \(4, 32\): use \(4, 64\)"),
        ({"strides": (1, 4)}, r"strides \(1, 4\).*contiguous"),
        ({"strides": (128, 1)}, "contiguous"),
        ({"major": 2}, "version 2: version 1 is read"),
    ],
)
def test_what_does_not_fit_is_refused_and_given_back(changes: dict[str, Any], said: str) -> None:
    exporter = Exporter(**changes)
    with pytest.raises(ProblemError, match=said):
        check_tensor("a", exporter, SPEC, SPEC.nbytes, 16)
    gc.collect()
    assert exporter.released == len(exporter.asked) <= 1


def test_a_read_only_tensor_is_refused_as_an_output_only() -> None:
    exporter = Exporter(flags=dlpack.READ_ONLY)
    check_tensor("a", exporter, SPEC, SPEC.nbytes, 16)
    with pytest.raises(ProblemError, match="read-only"):
        check_tensor("c", exporter, OUTPUT, OUTPUT.nbytes, 16)
    assert exporter.released == 2


def test_a_small_tensor_is_refused_where_only_bytes_are_asked_for() -> None:
    with pytest.raises(ProblemError, match="512 bytes: the problem needs 4096"):
        check_tensor("b", Exporter(), None, 4096, 16)


def test_a_capsule_is_used_once() -> None:
    capsule = Exporter().__dlpack__()
    lent = dlpack.take("a", capsule)
    with pytest.raises(ProblemError, match=r"used_dltensor_versioned.*each can be used once"):
        dlpack.take("a", capsule)
    lent.release()
    lent.release()


def test_an_exporter_that_refuses_is_named() -> None:
    class Refuses(Exporter):
        def __dlpack__(self, **arguments: Any) -> Any:
            raise BufferError("conjugated")

    with pytest.raises(ProblemError, match=r"Refuses.__dlpack__ refused: BufferError: conjugated"):
        check_tensor("a", Refuses(), SPEC, SPEC.nbytes, 16)


def test_what_is_no_capsule_is_refused() -> None:
    with pytest.raises(ProblemError, match="gave int"):
        dlpack.take("a", 5)


@pytest.mark.parametrize("version", [None, (1, 0)])
def test_numpys_capsules_are_read(version: tuple[int, int] | None) -> None:
    """A real lender on the CPU: the capsule's content, and that the array lives as long as it is lent."""
    array = np.arange(96, dtype=np.float32).reshape(8, 12)[2:, 3:7]
    lent = dlpack.take("a", array.__dlpack__(**({} if version is None else {"max_version": version})))
    assert (lent.pointer, lent.shape, lent.strides) == (array.ctypes.data, (6, 4), (12, 1))
    assert (lent.format, lent.device, lent.read_only) == ((2, 32, 1), (1, 0), False)
    assert list((ctypes.c_float * 4).from_address(lent.pointer)) == [27.0, 28.0, 29.0, 30.0]
    del array
    gc.collect()
    assert list((ctypes.c_float * 4).from_address(lent.pointer)) == [27.0, 28.0, 29.0, 30.0]


def test_numpy_on_the_cpu_is_refused() -> None:
    with pytest.raises(ProblemError, match="a tensor on the CPU"):
        check_tensor("a", np.zeros((4, 64), dtype=np.uint16), SPEC, SPEC.nbytes, 16)


def test_numpy_frees_what_was_lent() -> None:
    import weakref

    class Tracked(np.ndarray):
        pass

    array = np.zeros(8, dtype=np.float32).view(Tracked)
    gone = weakref.ref(array)
    lent = dlpack.take("a", array.__dlpack__())
    del array
    gc.collect()
    assert gone() is not None
    lent.release()
    gc.collect()
    assert gone() is None


def test_torchs_capsules_are_read() -> None:
    tensor = torch.arange(64, dtype=torch.bfloat16).reshape(4, 16)[1:]
    lent = dlpack.take("a", tensor.__dlpack__())
    assert (lent.pointer, lent.shape, lent.strides) == (tensor.data_ptr(), (3, 16), (16, 1))
    assert (lent.format, lent.device) == ((4, 16, 1), (1, 0))
    lent.release()
    assert tensor[0, 0] == 16


# ---- other owners


class Interface:
    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {"shape": (4, 64), "typestr": "<u2", "data": (ADDRESS, False), "version": 3, **changes}


def test_an_array_interface_is_preferred_over_dlpack() -> None:
    class Both(Interface, Exporter):
        def __init__(self) -> None:
            Exporter.__init__(self, data=ADDRESS + 4096)
            Interface.__init__(self)

    assert check_tensor("a", Both(), SPEC, SPEC.nbytes, 16).pointer == ADDRESS


def test_a_read_only_interface_is_refused_as_an_output_only() -> None:
    value = Interface(data=(ADDRESS, True))
    check_tensor("a", value, SPEC, SPEC.nbytes, 16)
    with pytest.raises(ProblemError, match="read-only"):
        check_tensor("c", value, OUTPUT, OUTPUT.nbytes, 16)


def test_a_torch_tensor_on_the_cpu_is_refused() -> None:
    with pytest.raises(ProblemError, match="a tensor on cpu"):
        check_tensor("a", torch.zeros((4, 64), dtype=torch.bfloat16), SPEC, SPEC.nbytes, 16)


def test_a_device_tensor_says_its_size() -> None:
    assert check_tensor("a", DeviceTensor(ADDRESS, 512), SPEC, SPEC.nbytes, 16).pointer == ADDRESS
    with pytest.raises(ProblemError, match="511 bytes: the problem needs 512"):
        check_tensor("a", DeviceTensor(ADDRESS, 511), SPEC, SPEC.nbytes, 16)


@pytest.mark.parametrize("value", [True, False, None, "text", 1.5, object()])
def test_what_is_no_memory_is_refused(value: object) -> None:
    with pytest.raises(ProblemError, match="give"):
        check_tensor("a", value, SPEC, SPEC.nbytes, 16)


@pytest.mark.parametrize("value", [0, -16])
def test_null_is_refused_where_bytes_are_needed(value: int) -> None:
    with pytest.raises(ProblemError, match="give device memory of 512 bytes"):
        check_tensor("a", value, SPEC, SPEC.nbytes, 16)
