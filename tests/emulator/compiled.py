"""A Loader's stand-in: any variant of the matrix, compiled when it is first asked for; the runtime's Plans on the emulator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from densemoe.compile import kernels, matrix, toolchain
from densemoe.compile.emulate.driver import EmulatedDriver
from densemoe.runtime.manifest import ManifestVariant
from densemoe.runtime.plan import Plan
from densemoe.runtime.problem import Problem


class CompiledLoader:
    """``plan`` as ``runtime.loader.Loader`` has it.

    Attributes:
        driver: the emulator, with ``sm_count`` multiprocessors.
    """

    def __init__(self, sm_count: int = 132, schedule: str = "eager") -> None:
        self._texts: dict[str, str] = {}
        self._kernels: dict[str, tuple[ManifestVariant, Any]] = {}
        self.planned = {each.variant.key: each for each in matrix.load().profile("full")}
        self.driver = EmulatedDriver(self._texts.__getitem__, sm_count=sm_count, schedule=schedule)

    def entry(self, key: str) -> ManifestVariant:
        """What a manifest would hold of a variant."""
        return self._compiled(key)[0]

    def _compiled(self, key: str) -> tuple[ManifestVariant, Any]:
        if key not in self._kernels:
            planned = self.planned[key]
            compiled = toolchain.compile_variant(planned.variant, planned.kernel, options=planned.compiler_options)
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
