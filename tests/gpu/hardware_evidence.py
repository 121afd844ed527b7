"""What a GPU gave, kept in files that the emulator is compared with on every machine: run once on a device, then commit the files.

    python3 tests/gpu/hardware_evidence.py --out tests/emulator/hardware

Needs cuda-bindings, numpy, and artifacts for the device; some seconds. ``digests.json`` has a sha256 a variant and problem of outputs that must be
exact, ``outputs.json`` the outputs themselves where order of additions and approximate functions show, ``tensor_maps.json`` the arguments and
results of ``cuTensorMapEncodeTiled``. ``tests/emulator/test_hardware.py`` reads them.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import hardware_cases
import hardware_tensor_maps

from densemoe.runtime.errors import DensemoeError
from densemoe.runtime.loader import ArtifactSet, Loader

DIGESTS, OUTPUTS, TENSOR_MAPS = "digests.json", "outputs.json", "tensor_maps.json"


def device_of(loader: Any) -> dict[str, Any]:
    """What the evidence was made on."""
    driver = loader.driver
    return {
        "device": driver.device_name(0),
        "capability": list(driver.capability(0)),
        "sm_count": driver.sm_count(0),
        "driver": driver.version(),
        "arch": loader.manifest(0).arch,
    }


def _cubins(loader: Any, keys: Sequence[str]) -> dict[str, str]:
    return {key: loader.manifest(0).variants[key].sha256[:16] for key in sorted(keys)}


def digests(loader: Any, keys: Sequence[str]) -> dict[str, dict[str, str]]:
    """By shape and variant: sha256 of the outputs on exact data."""
    found: dict[str, dict[str, str]] = {}
    for key, shape, made in hardware_cases.cases(keys, hardware_cases.EXACT, "exact"):
        first, second = (hardware_cases.digest(hardware_cases.launch(loader, key, made, times)) for times in (1, 2))
        if first != second:
            print(f"FAILED {key} {shape.name}: two launches gave different bytes on exact data")
        found.setdefault(shape.name, {})[key] = second
    return found


def pack_array(array: np.ndarray[Any, Any]) -> dict[str, Any]:
    """An array for JSON."""
    data = base64.b85encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()
    return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}


def unpack_array(packed: Any) -> np.ndarray[Any, Any]:
    """The array of `pack_array`."""
    raw = zlib.decompress(base64.b85decode(packed["data"]))
    return np.frombuffer(raw, np.dtype(packed["dtype"])).reshape(packed["shape"])


def outputs(loader: Any, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By shape and variant: the outputs on normal data."""
    found: dict[str, dict[str, Any]] = {}
    for key, shape, made in hardware_cases.cases(keys, hardware_cases.GENERAL, "normal"):
        got = hardware_cases.launch(loader, key, made)
        found.setdefault(shape.name, {})[key] = {role: pack_array(array) for role, array in got.items()}
    return found


def tensor_maps(artifacts: ArtifactSet, encode: hardware_tensor_maps.Encode) -> dict[str, Any]:
    """Rows of ``hardware_tensor_maps.record``."""
    return {
        "fields": [*hardware_tensor_maps.Arguments._fields, "result", "bytes"],
        "kernels": hardware_tensor_maps.record(encode, list(hardware_tensor_maps.of_kernels(artifacts))),
        "product": hardware_tensor_maps.record(encode, hardware_tensor_maps.wide_product()),
    }


def write(path: Path, content: Any) -> None:
    """JSON with one line for each entry of the second level: small differences stay small."""
    parts = []
    for name, value in content.items():
        if isinstance(value, dict) and value and all(isinstance(each, dict) for each in value.values()):
            inner = ",\n".join(f"  {json.dumps(key)}: {json.dumps(each, separators=(',', ':'))}" for key, each in value.items())
            parts.append(f"{json.dumps(name)}: {{\n{inner}}}")
        elif isinstance(value, list) and value and isinstance(value[0], list):
            inner = ",\n".join(f"  {json.dumps(each, separators=(',', ':'))}" for each in value)
            parts.append(f"{json.dumps(name)}: [\n{inner}]")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def collect(loader: Any, keys: Sequence[str], out: Path, encode: hardware_tensor_maps.Encode) -> None:
    """Writes the three files; each is complete before the next is begun."""
    out.mkdir(parents=True, exist_ok=True)
    about = {**device_of(loader), "cubins": _cubins(loader, keys)}
    for name, make in (
        (DIGESTS, lambda: {"exact": digests(loader, keys)}),
        (TENSOR_MAPS, lambda: tensor_maps(loader.artifacts, encode)),
        (OUTPUTS, lambda: {"normal": outputs(loader, keys)}),
    ):
        started = time.perf_counter()
        content = make()
        write(out / name, {**about, **content})
        entries = sum(len(part) for part in content.values()) if name == TENSOR_MAPS else sum(map(len, next(iter(content.values())).values()))
        print(f"{name}: {entries} entries, {(out / name).stat().st_size} bytes, {time.perf_counter() - started:.1f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs on device 0; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--artifacts", help="artifact root, by default the installed one")
    given = parser.parse_args(arguments)
    try:
        from cuda.bindings import driver as cuda

        loader = Loader(given.artifacts)
        loader.driver.use_device(0)
        collect(loader, sorted(loader.manifest(0).variants), given.out, hardware_tensor_maps.driver_encode(cuda))
    except DensemoeError as error:
        print(f"hardware_evidence: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
