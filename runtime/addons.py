"""Add-on wheels: further artifact roots, found through the entry-point group ``densemoe.artifacts``.

An entry names a package and, after a colon, the folder in it that holds ``index.json`` (``built`` where none is named)::

    [project.entry-points."densemoe.artifacts"]
    blackwell = "densemoe_blackwell:built"

The package is found, not imported: an add-on is data, and none of its code runs. It fits by the schema and the content of what it holds, never
by its version. Looked for only where the installed package's own root does not serve: reading every installed package's metadata takes milliseconds.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from densemoe.runtime.manifest import INDEX_NAME

__all__ = ["GROUP", "AddOn", "find"]

GROUP: Final = "densemoe.artifacts"
_FOLDER: Final = "built"


@dataclass(frozen=True)
class AddOn:
    """One entry of the group.

    Attributes:
        name: of the entry.
        root: its artifact root, None where there is none.
        fault: why there is none.
    """

    name: str
    root: Path | None
    fault: str = ""


def find() -> list[AddOn]:
    """Every add-on of this environment, by name; those that hold no artifact root with the reason."""
    found = importlib.metadata.entry_points(group=GROUP)
    return [_locate(entry.name, entry.module, entry.attr or _FOLDER) for entry in sorted(found, key=lambda each: (each.name, each.value))]


def _locate(name: str, module: str, folder: str) -> AddOn:
    if "." in module:
        return AddOn(name, None, f"{module!r} is inside a package, whose code would run: name a top-level package")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return AddOn(name, None, f"package {module!r} cannot be found: {error}")
    for place in (spec.submodule_search_locations if spec else None) or ():
        root = Path(place) / folder
        if root.is_relative_to(place) and ".." not in root.parts and (root / INDEX_NAME).is_file():
            return AddOn(name, root)
    return AddOn(name, None, f"package {module!r} has no {folder}/{INDEX_NAME}")
