"""Compiles named variants of the source tree that this file lies in, and writes what came out: ``densemoe reproduce`` runs it elsewhere.

Run as a file, not as a module, so that the tree need not be installed and no installed densemoe is taken instead::

    python TREE/compile/rebuild.py OUT < job.json     {"keys": […], "profile": "full"}

OUT gets ``<key>.cubin`` and ``<key>.ptx`` of each, in the job's order, and ``facts.json``: what compiled them, and errors by key.
"""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class _ThisTree(MetaPathFinder):
    """Finds densemoe's modules in this tree, before the finder of an editable install of another one."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, path, target) if fullname.startswith("densemoe.") else None


def use_this_tree() -> None:
    """Makes ``densemoe`` in this process the package that this tree is."""
    package = types.ModuleType("densemoe")
    package.__path__ = [str(ROOT)]
    sys.modules["densemoe"] = package
    sys.meta_path.insert(0, _ThisTree())


def rebuild(keys: Sequence[str], profile: str, out: Path) -> dict[str, Any]:
    """Compiles ``keys`` in their order into ``out``; what compiled them, and errors by key."""
    from densemoe.compile import build, matrix, toolchain
    from densemoe.runtime.errors import DensemoeError

    planned = {each.variant.key: each for each in matrix.load().profile(profile)}
    errors: dict[str, str] = {}
    for key in keys:
        if key not in planned:
            errors[key] = f"the sources' matrix does not give it in profile {profile!r}"
            continue
        each = planned[key]
        try:
            compiled = toolchain.compile_variant(each.variant, each.kernel, options=each.compiler_options)
        except DensemoeError as error:
            errors[key] = f"{type(error).__name__}: {error}"
            continue
        (out / f"{key}.cubin").write_bytes(compiled.cubin)
        (out / f"{key}.ptx").write_text(compiled.ptx)
    return {
        "python": ".".join(map(str, sys.version_info[:3])),
        "distributions": {each.name: each.version for each in toolchain.distributions()},
        "flavour": toolchain.loaded_flavour(),
        "kernels": {each.kernel: build.kernel_digest(each.kernel) for key, each in planned.items() if key in keys},
        "options": {key: planned[key].compiler_options for key in keys if key in planned},
        "errors": errors,
    }


if __name__ == "__main__":
    use_this_tree()
    job = json.load(sys.stdin)
    folder = Path(sys.argv[1])
    (folder / "facts.json").write_text(json.dumps(rebuild(job["keys"], job["profile"], folder), indent=2, sort_keys=True))
