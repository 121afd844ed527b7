"""The emulator against what a GPU gave (``tests/gpu/hardware_evidence.py`` wrote the files of ``hardware/``): bit for bit where data are exact, the
largest difference where they are not, and every tensor map byte for byte. The tool and the checks are tested on evidence that the emulator made."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hardware_cases
import hardware_evidence
import hardware_tensor_maps
import numpy as np
import pytest
from hardware_tensor_maps import Arguments

from densemoe.compile.emulate.driver import EmulatedDriver, texts_of
from densemoe.compile.emulator.tensor_map import HOPPER_FORM, DataType, Interleave, L2Promotion, OobFill, Swizzle, TensorMap
from densemoe.runtime.errors import EmulatorError
from densemoe.runtime.loader import ArtifactSet, Loader
from densemoe.runtime.problem import in_k64_order
from densemoe.runtime.variant import Variant

EVIDENCE = Path(__file__).with_name("hardware")
ABSENT = "no device has made {} yet: run tests/gpu/hardware_evidence.py on one and commit its files"
#: Of the largest value in its row. Sums of 512 rounded products and approximate exponentials stay far below; another operand, scale or row does not.
ROW_LIMIT = 2.0**-16
NVFP4_LIMIT = 50 / 10_000  # bytes that differ: what the contract's rule 3 exempts


@cache
def evidence(folder: Path, name: str) -> Any:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None


def a_few(keys: Sequence[str]) -> list[str]:
    """One variant of each op, activation and output dtype, of FC2 in one order of each output dtype; the tiles in turn."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for key in sorted(keys):
        variant = Variant.parse(key)
        groups[variant.op, variant.options or variant.a_dtype, variant.c_dtype].append(key)
    return [keys[i % len(keys)] for i, keys in enumerate(groups.values())]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, name, section in (("exact_key", hardware_evidence.DIGESTS, "exact"), ("normal_key", hardware_evidence.OUTPUTS, "normal")):
        if fixture not in metafunc.fixturenames:
            continue
        found = evidence(EVIDENCE, name)
        if found is None:
            metafunc.parametrize(fixture, [pytest.param("", marks=pytest.mark.skip(reason=ABSENT.format(name)))])
            continue
        keys = sorted({key for shape in found[section].values() for key in shape})
        few = set(a_few(keys))
        metafunc.parametrize(fixture, [pytest.param(key, marks=() if key in few else pytest.mark.full) for key in keys])


@pytest.fixture(scope="module")
def compiled() -> Any:
    from compiled import CompiledLoader

    about = evidence(EVIDENCE, hardware_evidence.DIGESTS) or {}
    return CompiledLoader(about.get("sm_count", 132))


def launched(loader: Any, key: str, kind: str, shapes: Sequence[hardware_cases.Shape]) -> Iterator[tuple[str, hardware_cases.Arrays]]:
    for _, shape, made in hardware_cases.cases([key], shapes, kind):
        yield shape.name, hardware_cases.launch(loader, key, made)


# ---- the checks


def wrong_digests(loader: Any, folder: Path, key: str) -> list[str]:
    stored = evidence(folder, hardware_evidence.DIGESTS)["exact"]
    found = {shape: hardware_cases.digest(outputs) for shape, outputs in launched(loader, key, "exact", hardware_cases.EXACT)}
    assert found
    return [f"{key} {shape}" for shape in found if stored[shape][key] != found[shape]]


def ulps(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest distance in units of the last place of ``expected``."""
    return float((np.abs(got.astype(np.float64) - expected) / np.spacing(np.abs(expected).astype(np.float32))).max())


def differences(loader: Any, folder: Path, key: str) -> tuple[str, list[str]]:
    """(the measured differences in words, those beyond the limits)."""
    stored = evidence(folder, hardware_evidence.OUTPUTS)["normal"]
    said, wrong = [], []
    for shape, outputs in launched(loader, key, "normal", hardware_cases.GENERAL):
        for role, got in outputs.items():
            expected = hardware_evidence.unpack_array(stored[shape][key][role])
            if expected.dtype == np.float32:
                row = np.abs(expected).max(axis=1, keepdims=True)
                relative = float((np.abs(got.astype(np.float64) - expected) / row).max())
                equal = float((got == expected).mean())
                text = f"{key} {role}: {equal:.1%} equal, largest difference {ulps(got, expected):.0f} ulp, {relative:.2e} of its row's largest"
                failed = not relative <= ROW_LIMIT
            else:
                share = float((got != expected).mean())
                text = f"{key} {role}: {share:.2%} of bytes differ"
                failed = share > NVFP4_LIMIT
            said.append(text)
            wrong += [text] if failed else []
    assert said
    return "\n".join(said), wrong


def as_map(given: Arguments) -> TensorMap:
    return TensorMap(
        given.address,
        DataType(given.dtype),
        given.sizes,
        given.strides,
        given.box,
        given.element_strides,
        Interleave(given.interleave),
        Swizzle(given.swizzle),
        L2Promotion(given.promotion),
        OobFill(given.fill),
    )


def emulated_encode(given: Arguments) -> tuple[int, bytes]:
    """What the driver is to the tool, by the emulator: 1 is CUDA_ERROR_INVALID_VALUE."""
    try:
        return 0, as_map(given).encode(HOPPER_FORM)
    except EmulatorError:
        return 1, b""


def wrong_maps(rows: Sequence[Any]) -> list[str]:
    """Calls on which the emulator and the driver disagree: accepted or not, decoded fields, encoded bytes.

    A type or swizzle that all calls of the product were refused for is one that the device or its driver does not have.
    """
    parsed = [hardware_tensor_maps.read_row(row) for row in rows]
    had = {("dtype", given.dtype) for given, code, _ in parsed if code == 0} | {("swizzle", given.swizzle) for given, code, _ in parsed if code == 0}
    wrong = []
    for given, code, data in parsed:
        ours, encoded = emulated_encode(given)
        if not {("dtype", given.dtype), ("swizzle", given.swizzle)} <= had:
            continue
        if not given.strides:
            continue  # the binding hands an empty list on as a null pointer, which the driver refuses whatever the map is
        if (ours == 0) != (code == 0):
            wrong.append(f"{given}: the driver says {code}, the emulator {'accepts' if ours == 0 else 'refuses'} it")
        elif code == 0 and TensorMap.decode(data) != as_map(given):
            wrong.append(f"{given}: read back as {TensorMap.decode(data)}")
        elif code == 0 and encoded[:64] != data[:64]:  # what a driver writes behind, compilers leave out
            wrong.append(f"{given}: the driver encodes {data.hex()}, the emulator {encoded.hex()}")
    return wrong


# ---- hardware


@pytest.mark.sampled(2)
def test_exact_outputs_are_those_of_hardware_bit_for_bit(compiled: Any, exact_key: str) -> None:
    assert not wrong_digests(compiled, EVIDENCE, exact_key)


def test_the_largest_difference_to_hardware_on_general_data(compiled: Any, normal_key: str) -> None:
    said, wrong = differences(compiled, EVIDENCE, normal_key)
    print(said)
    assert not wrong


def test_variants_agree_on_hardware_in_what_is_exact() -> None:
    """Tiles and activation dtypes change nothing of exact sums."""
    found = evidence(EVIDENCE, hardware_evidence.DIGESTS)
    if found is None:
        pytest.skip(ABSENT.format(hardware_evidence.DIGESTS))
    for shape, by_key in found["exact"].items():
        classes: dict[tuple[str, str, bool], set[str]] = defaultdict(set)
        for key, digest in by_key.items():
            variant = Variant.parse(key)
            if variant.op.endswith(("fc1", "fc2")):
                ordered = variant.op == "groupedfc1" and in_k64_order(variant.op, variant.tile_m)  # other places of the same values
                classes[variant.op, variant.c_dtype, ordered].add(digest)
        assert all(len(digests) == 1 for digests in classes.values()), (shape, classes)


@pytest.mark.parametrize("section", ["kernels", "product"])
def test_tensor_maps_are_those_of_the_driver_byte_for_byte(section: str) -> None:
    found = evidence(EVIDENCE, hardware_evidence.TENSOR_MAPS)
    if found is None:
        pytest.skip(ABSENT.format(hardware_evidence.TENSOR_MAPS))
    rows = found[section]
    assert rows
    wrong = wrong_maps(rows)
    assert not wrong, f"{len(wrong)} of {len(rows)}:\n" + "\n".join(wrong[:10])
    if section == "kernels":
        assert all(hardware_tensor_maps.read_row(row)[1] == 0 for row in rows)


# ---- the tool, on the emulator in the device's place


@pytest.fixture(scope="module")
def emulated(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loader, Path]:
    """(a Loader of the quick profile on the emulator, the evidence that it gave)."""
    out = tmp_path_factory.mktemp("evidence")
    loader = Loader(artifacts, driver=EmulatedDriver(texts_of(ArtifactSet(artifacts)), sm_count=7))  # type: ignore[arg-type]
    hardware_evidence.collect(loader, sorted(loader.manifest(0).variants), out, emulated_encode)
    return loader, out


def test_the_tool_writes_what_the_checks_read(emulated: tuple[Loader, Path]) -> None:
    loader, out = emulated
    keys = sorted(loader.manifest(0).variants)
    exact = evidence(out, hardware_evidence.DIGESTS)
    assert exact["device"].startswith("PTX emulator")
    assert sorted(exact["cubins"]) == keys
    checked = [key for key in keys if any(key in shape for shape in exact["exact"].values())]
    assert {Variant.parse(key).op for key in checked} == {"fc1", "fc2", "prepare", "quantize"}
    for key in checked:
        assert not wrong_digests(loader, out, key)
    for key in {key for shape in evidence(out, hardware_evidence.OUTPUTS)["normal"].values() for key in shape}:
        said, wrong = differences(loader, out, key)
        assert not wrong
        assert "0.00% of bytes differ" in said
    assert sum(path.stat().st_size for path in out.iterdir()) < 1_000_000


def test_the_checks_find_another_output(emulated: tuple[Loader, Path], tmp_path: Path) -> None:
    loader, out = emulated
    key = "fc2.sm90a.t8x64.c1x1.bf16-bf16"
    changed: dict[str, Any] = json.loads(json.dumps(evidence(out, hardware_evidence.DIGESTS)))
    shape = hardware_cases.EXACT[1].name
    changed["exact"][shape][key] = "0" * 64
    hardware_evidence.write(tmp_path / hardware_evidence.DIGESTS, changed)
    assert wrong_digests(loader, tmp_path, key) == [f"{key} {shape}"]


def test_differences_are_counted() -> None:
    one = np.array([[1.0, -2.0]], np.float32)
    assert ulps(one, one) == 0
    assert ulps(np.nextafter(one, np.float32(9)), one) == 1
    packed = hardware_evidence.pack_array(one)
    np.testing.assert_array_equal(hardware_evidence.unpack_array(json.loads(json.dumps(packed))), one)


def rows_of_product() -> list[list[Any]]:
    return hardware_tensor_maps.record(emulated_encode, hardware_tensor_maps.wide_product())


def test_the_product_of_tensor_maps_is_wide() -> None:
    rows = [hardware_tensor_maps.read_row(row) for row in rows_of_product()]
    accepted = [given for given, code, _ in rows if code == 0]
    assert {given.dtype for given in accepted} == set(range(16))
    assert {given.swizzle for given in accepted} == set(range(7))
    assert {given.interleave for given in accepted} == {0, 1, 2}
    assert {(given.dtype, len(given.sizes)) for given in accepted} == set(itertools.product(range(16), range(1, 6)))
    assert {given.promotion for given in accepted} == {0, 1, 2, 3}
    assert {given.fill for given in accepted} == {0, 1}
    assert sum(code != 0 for _, code, _ in rows) >= hardware_tensor_maps.ILLEGAL // 2


@pytest.mark.parametrize("change", [{"box": (16, 9)}, {"sizes": (300, 8)}, {"promotion": 3}, {"dtype": 9}])
def test_the_checks_find_another_tensor_map(change: Mapping[str, Any]) -> None:
    rows = rows_of_product()
    assert not wrong_maps(rows)
    given = Arguments(6, 1 << 40, (256, 8), (512,), (16, 8), (1, 1))
    code, data = emulated_encode(given._replace(**change))
    assert code == 0
    assert wrong_maps([*rows, [*given, code, data.hex()]])
    assert wrong_maps([*rows, [*given, 1, ""]])


def test_the_binding_takes_the_arguments() -> None:
    """Its enumerations and vectors; the call itself needs a driver."""
    cuda = pytest.importorskip("cuda.bindings.driver")
    for given in hardware_tensor_maps.wide_product():
        dtype, rank, address, sizes, strides, *_ = hardware_tensor_maps.driver_arguments(cuda, given)
        assert (int(dtype), rank, address) == (given.dtype, len(given.sizes), given.address)
        assert (tuple(map(int, sizes)), tuple(map(int, strides))) == (given.sizes, given.strides)
    unknown = Arguments(99, 0, (16,), (), (16,), (1,))
    assert hardware_tensor_maps.driver_encode(cuda)(unknown) == (hardware_tensor_maps.UNKNOWN, b"")
