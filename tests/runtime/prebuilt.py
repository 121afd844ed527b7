"""Variants that ``make test`` has built before the tests run, so that these need not compile them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from densemoe.compile.build import LOG_NAME
from densemoe.runtime.errors import ArtifactError
from densemoe.runtime.manifest import Index, IndexEntry, Manifest


def seed_with_built(root: Path, keys: Collection[str]) -> None:
    """Puts these variants into an artifact root as far as the build that ``make test`` begins with has them, without records of what has run them
    since. A build in ``root`` takes them where they are of the present sources and toolchain, and compiles the others."""
    sets = {}
    for path in sorted((Path(__file__).parents[2] / "artifacts" / "built").glob("*/manifest.json")):
        try:
            manifest = Manifest.from_bytes(path.read_bytes(), str(path))
        except ArtifactError:  # of an older checkout
            continue
        kept = {key: replace(entry, verification=()) for key, entry in manifest.variants.items() if key in keys}
        if kept:
            folder = root / path.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            for entry in kept.values():
                shutil.copyfile(path.parent / entry.file, folder / entry.file)
            document = replace(manifest, variants=kept).to_bytes()
            (folder / path.name).write_bytes(document)
            log = json.loads((path.parent / LOG_NAME).read_text())["compile_seconds"]
            (folder / LOG_NAME).write_text(json.dumps({"compile_seconds": {key: log[key] for key in kept if key in log}}))
            sets[manifest.arch] = IndexEntry.of(manifest.arch, document, len(kept))
    if sets:
        (root / "index.json").write_bytes(Index(sets).to_bytes())
