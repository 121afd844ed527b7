"""Any variant of the matrix as the compiler gives it, from the build that ``make test`` begins with or compiled now; and a Loader's stand-in that
makes the runtime's Plans of it on the emulator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from densemoe.compile import build, kernels, matrix, toolchain
from densemoe.compile.elf import read_cubin
from densemoe.compile.emulate.driver import EmulatedDriver
from densemoe.runtime.errors import ArtifactError
from densemoe.runtime.manifest import Manifest, ManifestVariant
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem
from densemoe.runtime.variant import Variant

ROOT = Path(__file__).resolve().parents[2]
BUILT, TEXTS = ROOT / "artifacts" / "built", ROOT / "build" / "ptx"


@cache
def planned() -> Mapping[str, matrix.Planned]:
    """The matrix, by key."""
    return {each.variant.key: each for each in matrix.load().profile("full")}


@cache
def built(arch: str) -> Mapping[str, ManifestVariant]:
    """Entries of the set that stands in artifacts/built."""
    path = BUILT / arch / "manifest.json"
    try:
        return Manifest.from_bytes(path.read_bytes(), str(path)).variants
    except (OSError, ArtifactError):
        return {}


@cache
def compiled_variant(key: str, kernel: str = "") -> toolchain.Compiled:
    """A variant of the matrix, or another one of ``kernel``. What was built is taken where it is of the present sources and toolchain."""
    each = planned().get(key)
    if each is None:
        return toolchain.compile_variant(Variant.parse(key), kernel)
    return _of_build(each) or toolchain.compile_variant(each.variant, each.kernel, options=each.compiler_options)


def _of_build(each: matrix.Planned) -> toolchain.Compiled | None:
    variant, digest = each.variant, build.source_digest(each)
    entry = built(variant.arch).get(variant.key)
    if entry is None or entry.source_digest != digest:
        return None
    try:
        head, _, text = (TEXTS / f"{variant.key}.ptx").read_text().partition("\n")
        cubin = (BUILT / variant.arch / entry.file).read_bytes()
    except OSError:
        return None
    if head != build.ptx_head(digest) or hashlib.sha256(cubin).hexdigest() != entry.sha256:
        return None
    return toolchain.Compiled(cubin, text, read_cubin(cubin))


class CompiledLoader:
    """``plan`` as ``runtime.loader.Loader`` has it.

    Attributes:
        driver: the emulator, with ``sm_count`` multiprocessors.
    """

    def __init__(self, sm_count: int = 132, schedule: str = "eager") -> None:
        self._texts: dict[str, str] = {}
        self._kernels: dict[str, tuple[ManifestVariant, Any]] = {}
        self.planned = planned()
        self.driver = EmulatedDriver(self._texts.__getitem__, sm_count=sm_count, schedule=schedule)

    def entry(self, key: str) -> ManifestVariant:
        """What a manifest would hold of a variant."""
        return self._compiled(key)[0]

    def _compiled(self, key: str) -> tuple[ManifestVariant, Any]:
        if key not in self._kernels:
            planned, compiled = self.planned[key], compiled_variant(key)
            module, sha256 = kernels.load(planned.kernel), hashlib.sha256(compiled.cubin).hexdigest()
            recipe = module.recipe(planned.variant)
            facts = compiled.facts
            entry = ManifestVariant(
                variant=planned.variant,
                kernel=planned.kernel,
                sha256=sha256,
                size=len(compiled.cubin),
                layout=module.WEIGHT_LAYOUT,
                recipe=recipe,
                static_smem=facts.static_smem,
                dynamic_smem=recipe.dynamic_smem,
                smem_carveout=recipe.smem_carveout,
                registers=facts.registers,
                stack=facts.stack,
                parameters=facts.parameters,
                parameter_bytes=facts.parameter_bytes,
                source_digest="",
                audit={},
            )
            self._texts[sha256] = compiled.ptx
            library = self.driver.load(compiled.cubin, file=key, arch=planned.variant.arch, ordinal=0)
            self._kernels[key] = entry, self.driver.kernel(library, entry.symbol)
        return self._kernels[key]

    def plan(self, problem: Problem, tensors: Mapping[str, Any], device: int, variant: str) -> Plan:
        """A Plan of ``variant``, whose launches run on the emulator."""
        entry, kernel = self._compiled(variant)
        return Plan(self.driver, entry, kernel, problem, tensors, device)  # type: ignore[arg-type]
