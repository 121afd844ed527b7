"""The manifest: what lies in an artifact set, with sizes, hashes and launch recipes; reader, checks and canonical writer.

A set is one directory per architecture with ``manifest.json`` and its cubins; ``index.json`` above names each set with its manifest's sha256.
JSON is canonical (canonical.py: sorted names, one line a variant), so equal sets have equal bytes. Reading checks every type and every name:
a manifest comes from outside, and nothing in it is trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from densemoe.runtime.canonical import Lines, canonical, parse_line, split_lines
from densemoe.runtime.errors import ManifestError, RecipeError, VariantError
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.variant import Variant, architecture

__all__ = ["INDEX_NAME", "LARGEST_CUBIN", "LARGEST_MANIFEST", "MANIFEST_NAME", "SCHEMA", "Index", "IndexEntry", "Manifest", "ManifestVariant"]

SCHEMA: Final = 1
MANIFEST_NAME: Final = "manifest.json"
INDEX_NAME: Final = "index.json"
#: A full set is some hundred variants of about 1.5 KB each; a file of this size is no manifest, and is not parsed.
LARGEST_MANIFEST: Final = 64 << 20
LARGEST_CUBIN: Final = 16 << 20


_MISSING: Final = object()


class _Fields:
    """Typed access to one JSON object; every fault names its path in the document."""

    def __init__(self, value: Any, path: str) -> None:
        if not isinstance(value, (dict, Lines)):
            raise ManifestError(f"{path}: {_shown(value)} stands where an object belongs")
        self.value, self.path = value, path

    def get(self, name: str, kind: type, check: Callable[[Any], bool] | None = None, allowed: str = "") -> Any:
        found = self.value.get(name, _MISSING)
        if type(found) is not kind and not (kind is dict and isinstance(found, Lines)):  # so a bool is no int
            if found is _MISSING:
                raise ManifestError(f"{self.path}.{name} is missing")
            raise ManifestError(f"{self.path}.{name}: {_shown(found)} stands where a {kind.__name__} belongs")
        if check is not None and not check(found):
            raise ManifestError(f"{self.path}.{name}: {_shown(found)} is not allowed{': ' + allowed if allowed else ''}")
        return found

    def size(self, name: str, largest: int = 2**63 - 1) -> int:
        return int(self.get(name, int, lambda value: 0 <= value <= largest, f"0 to {largest}"))

    def sha256(self, name: str) -> str:
        return str(self.get(name, str, _is_sha256, "64 lower-case hexadecimal digits"))

    def triple(self, name: str) -> tuple[int, int, int]:
        found = self.get(name, list, lambda v: len(v) == 3 and all(type(i) is int and 1 <= i <= 2**31 for i in v), "three positive integers")
        return (found[0], found[1], found[2])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def _is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


@dataclass(frozen=True)
class ManifestVariant:
    """One cubin and how it is launched. Sizes in bytes.

    Attributes:
        variant: what it is; ``file`` is ``<key>.cubin`` beside the manifest.
        kernel: the kernel module that it was compiled from.
        layout: name and version of the packed weights that it reads.
        parameters: (offset, size) in the parameter block, as the cubin states them.
        source_digest: sha256 over everything that decides its bytes; a build reuses the cubin while it stays equal.
        audit: numbers of the static audit.
        verification: records of what ran it, each with ``kind`` ``oracle``, ``emulated`` or ``device``.
    """

    variant: Variant
    kernel: str
    sha256: str
    size: int
    layout: str
    recipe: Recipe
    static_smem: int
    registers: int
    stack: int
    parameters: tuple[tuple[int, int], ...]
    parameter_bytes: int
    source_digest: str
    audit: Mapping[str, Any] = field(default_factory=dict)
    verification: tuple[Mapping[str, Any], ...] = ()

    @property
    def key(self) -> str:
        """The variant's key."""
        return self.variant.key

    @property
    def file(self) -> str:
        """Name of the cubin, beside the manifest."""
        return f"{self.key}.cubin"

    def to_json(self, recipe_id: str) -> dict[str, Any]:
        """As it stands in the manifest under its key, its recipe by reference."""
        return {
            "kernel": self.kernel,
            "symbol": self.variant.symbol,
            "file": self.file,
            "sha256": self.sha256,
            "size": self.size,
            "arch_kind": architecture(self.variant.arch).kind,
            "layout": self.layout,
            "recipe": recipe_id,
            "static_smem": self.static_smem,
            "registers": self.registers,
            "stack": self.stack,
            "parameters": [list(pair) for pair in self.parameters],
            "parameter_bytes": self.parameter_bytes,
            "source_digest": self.source_digest,
            "audit": dict(self.audit),
            "verification": [dict(record) for record in self.verification],
        }

    @classmethod
    def from_json(cls, key: str, value: Any, path: str, arch: str, recipes: Mapping[str, Recipe]) -> ManifestVariant:
        """Checks and reads the entry of ``key``. Raises ManifestError."""
        fields = _Fields(value, path)
        try:
            variant = Variant.parse(key)
        except VariantError as error:
            raise ManifestError(f"{path}: {error}") from None
        if variant.arch != arch:
            raise ManifestError(f"{path}: {key} is for {variant.arch}, the set is for {arch}")
        fields.get("symbol", str, lambda s: s == variant.symbol, f"{variant.symbol} belongs to this key")
        fields.get("file", str, lambda s: s == f"{key}.cubin", f"{key}.cubin belongs to this key")
        fields.get("arch_kind", str, lambda s: s == architecture(arch).kind, architecture(arch).kind)
        recipe_id = fields.get("recipe", str, lambda s: s in recipes, "an id of recipes")
        pairs = fields.get(
            "parameters",
            list,
            lambda v: all(isinstance(p, list) and len(p) == 2 and all(type(i) is int and 0 <= i <= 1 << 16 for i in p) for p in v),
            "pairs of offset and size",
        )
        recipe = recipes[recipe_id]
        parameters = tuple((pair[0], pair[1]) for pair in pairs)
        if parameters != recipe.offsets():
            raise ManifestError(f"{path}.parameters: {list(parameters)} are not those of recipe {recipe_id}: {list(recipe.offsets())}")
        verification = fields.get("verification", list, lambda v: all(isinstance(r, dict) for r in v), "objects")
        return cls(
            variant=variant,
            kernel=fields.get("kernel", str),
            sha256=fields.sha256("sha256"),
            size=fields.size("size", LARGEST_CUBIN),
            layout=fields.get("layout", str),
            recipe=recipe,
            static_smem=fields.size("static_smem", 1 << 20),
            registers=fields.size("registers", 255),
            stack=fields.size("stack", 1 << 20),
            parameters=parameters,
            parameter_bytes=fields.size("parameter_bytes", 1 << 16),
            source_digest=fields.sha256("source_digest"),
            audit=fields.get("audit", dict),
            verification=tuple(verification),
        )


class _Recipes(Mapping[str, Recipe]):
    """Recipes of a manifest, each checked when it is first asked for."""

    def __init__(self, documents: Mapping[str, Any], source: str) -> None:
        self._documents, self._source = documents, source
        self._read: dict[str, Recipe] = {}

    def __getitem__(self, recipe_id: str) -> Recipe:
        if recipe_id not in self._read:
            path = f"{self._source}.recipes.{recipe_id}"
            self._read[recipe_id] = _recipe(_parsed(self._documents[recipe_id], path), path)
        return self._read[recipe_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __contains__(self, recipe_id: object) -> bool:
        return recipe_id in self._documents

    def check(self) -> None:
        """Reads all of them, and parses every expression: a Plan would find a bad one only when it is made."""
        for recipe_id in self._documents:
            try:
                self[recipe_id].check()
            except RecipeError as error:
                raise ManifestError(f"{self._source}.recipes.{recipe_id}: {error}") from None


class _Entries(Mapping[str, ManifestVariant]):
    """Entries of a manifest by key, each checked when it is first asked for: a cold start pays for the kernels that it uses."""

    def __init__(self, values: Mapping[str, Any], source: str, arch: str, recipes: _Recipes) -> None:
        self._values, self._source, self._arch, self.recipes = values, source, arch, recipes
        self._read: dict[str, ManifestVariant] = {}

    def __getitem__(self, key: str) -> ManifestVariant:
        if key not in self._read:
            path = f"{self._source}.variants.{key}"
            self._read[key] = ManifestVariant.from_json(key, _parsed(self._values[key], path), path, self._arch, self.recipes)
        return self._read[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class Manifest:
    """One architecture's set.

    Attributes:
        builder: ``version`` of densemoe, ``dirty`` where its sources were not those of a commit, ``source_digest``.
        toolchain: ``distributions`` (name, version, sha256), ``flavour`` actually loaded, ``ptxas``.
        minimum_driver: CUDA version that the driver must support, as ``cuDriverGetVersion`` counts (13000 is 13.0).
        variants: by key, in key order.
    """

    arch: str
    builder: Mapping[str, Any]
    toolchain: Mapping[str, Any]
    minimum_driver: int
    variants: Mapping[str, ManifestVariant]

    def to_bytes(self) -> bytes:
        """Canonical JSON. Equal recipes stand once."""
        recipes: dict[str, Any] = {}
        entries: dict[str, Any] = {}
        for key in sorted(self.variants):
            entry = self.variants[key]
            document = entry.recipe.to_json()
            recipe_id = hashlib.sha256(canonical(document)).hexdigest()[:16]
            recipes[recipe_id] = document
            entries[key] = entry.to_json(recipe_id)
        return canonical(
            {
                "schema": SCHEMA,
                "arch": self.arch,
                "builder": dict(self.builder),
                "toolchain": dict(self.toolchain),
                "minimum_driver": self.minimum_driver,
                "recipes": recipes,
                "variants": entries,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, source: str, *, full: bool = True) -> Manifest:
        """Checks and reads a manifest.

        Args:
            source: where the bytes came from, for messages.
            full: parse all of it and check every entry now, names that stand twice and the canonical form included. Otherwise entries are
                parsed and checked when they are asked for: a cold start reads a manifest whose sha256 the index states.

        Raises:
            ManifestError: anything that is not a manifest of this schema.
        """
        fields = _document(data, source) if full else _lines(data, source)
        arch = fields.get("arch", str)
        try:
            architecture(arch)
        except VariantError as error:
            raise ManifestError(f"{source}.arch: {error}") from None
        recipes = _Recipes(fields.get("recipes", dict), source)
        variants = _Entries(fields.get("variants", dict), source, arch, recipes)
        toolchain = _Fields(fields.get("toolchain", dict), f"{source}.toolchain")
        toolchain.get("flavour", str)
        toolchain.get("ptxas", str)
        for position, value in enumerate(toolchain.get("distributions", list)):
            distribution = _Fields(value, f"{source}.toolchain.distributions[{position}]")
            distribution.get("name", str)
            distribution.get("version", str)
            distribution.sha256("sha256")
        builder = _Fields(fields.get("builder", dict), f"{source}.builder")
        builder.get("version", str)
        builder.get("dirty", bool)
        manifest = cls(arch, builder.value, toolchain.value, fields.size("minimum_driver", 10**6), variants)
        if full:
            manifest.check()
            if canonical(fields.value) != data:
                raise ManifestError(f"{source} is not in canonical form: edited by hand? Build or install the set again")
        return manifest

    def check(self) -> None:
        """Reads every entry and recipe; opening a manifest reads only those that are used.

        Raises:
            ManifestError: the first fault.
        """
        for key in self.variants:
            self.variants[key]
        if isinstance(self.variants, _Entries):
            self.variants.recipes.check()


def _recipe(document: Any, path: str) -> Recipe:
    fields = _Fields(document, path)
    fields.get("parameters", list, lambda v: 0 < len(v) <= 256 and all(isinstance(p, dict) for p in v), "1 to 256 objects")
    fields.get("grid", list, lambda v: len(v) == 3 and all(type(e) in (int, str) for e in v), "three expressions")
    fields.triple("block")
    for position, parameter in enumerate(document["parameters"]):
        if all(type(parameter.get(name)) is str for name in ("name", "kind", "value")):
            continue
        each = _Fields(parameter, f"{path}.parameters[{position}]")
        for name in ("name", "kind", "value"):
            each.get(name, str)
    try:
        recipe = Recipe.from_json(document)
    except RecipeError as error:
        raise ManifestError(f"{path}: {error}") from None
    return recipe


def _parsed(value: Any, path: str) -> Any:
    return parse_line(value, path) if isinstance(value, memoryview) else value


def _checked_size(data: bytes, source: str) -> None:
    if len(data) > LARGEST_MANIFEST:
        raise ManifestError(f"{source}: {len(data)} bytes; a manifest has at most {LARGEST_MANIFEST}")


def _checked_schema(fields: _Fields) -> _Fields:
    schema = fields.get("schema", int)
    if schema != SCHEMA:
        raise ManifestError(
            f"{fields.path}: schema {schema}; this densemoe reads schema {SCHEMA}: install the densemoe that made the set, or rebuild it"
        )
    return fields


def _lines(data: bytes, source: str) -> _Fields:
    """The document's top level, with its schema checked; recipes and variants are left unparsed."""
    _checked_size(data, source)
    value = split_lines(data, source, lazy=("recipes", "variants"))
    return _checked_schema(_Fields(value, source))


def _document(data: bytes, source: str) -> _Fields:
    """The document's top level, all of it parsed, with its schema checked."""
    _checked_size(data, source)

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            raise ManifestError(f"{source}: the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
        return result

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{source}: not JSON: {error}; build or install the set again") from None
    return _checked_schema(_Fields(value, source))


@dataclass(frozen=True)
class IndexEntry:
    """One set: its architecture, its manifest's path below the root and sha256, and how many variants it lists."""

    arch: str
    manifest: str
    sha256: str
    variants: int


@dataclass(frozen=True)
class Index:
    """The sets of an artifact root, by architecture."""

    sets: Mapping[str, IndexEntry]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        sets = [{"arch": s.arch, "manifest": s.manifest, "sha256": s.sha256, "variants": s.variants} for _, s in sorted(self.sets.items())]
        return canonical({"schema": SCHEMA, "sets": sets})

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Index:
        """Checks and reads an index. Raises ManifestError."""
        sets: dict[str, IndexEntry] = {}
        for position, value in enumerate(_document(data, source).get("sets", list)):
            fields = _Fields(value, f"{source}.sets[{position}]")
            arch = fields.get("arch", str)
            try:
                architecture(arch)
            except VariantError as error:
                raise ManifestError(f"{fields.path}.arch: {error}") from None
            expected = f"{arch}/{MANIFEST_NAME}"
            manifest = fields.get("manifest", str, expected.__eq__, f"{expected} belongs to {arch}")
            if arch in sets:
                raise ManifestError(f"{fields.path}.arch: {arch} stands twice")
            sets[arch] = IndexEntry(arch, manifest, fields.sha256("sha256"), fields.size("variants", 10**6))
        return cls(sets)
