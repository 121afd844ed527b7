"""The manifest: what lies in an artifact set, with sizes, hashes and launch recipes; reader, checks and canonical writer.

A set is one directory per architecture with ``manifest.json`` and its cubins; ``index.json`` above names each set with its manifest's sha256.
JSON is canonical (canonical.py: sorted names, one line a variant), so equal sets have equal bytes. Reading checks every type and every name:
a manifest comes from outside, and nothing in it is trusted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import itemgetter
from typing import Any, Final

from densemoe.runtime.canonical import canonical, parse_line, split_lines
from densemoe.runtime.errors import ManifestError, RecipeError, VariantError
from densemoe.runtime.fields import Fields, check_schema, is_sha256, parse_document
from densemoe.runtime.proof import BLOCK, DIGITS, Proof, block_digests, sha256_hex
from densemoe.runtime.recipe import Recipe
from densemoe.runtime.variant import Variant, architecture, symbol_of

__all__ = [
    "INDEX_NAME",
    "LARGEST_CUBIN",
    "LARGEST_INDEX",
    "LARGEST_MANIFEST",
    "MANIFEST_NAME",
    "SCHEMA",
    "Index",
    "IndexEntry",
    "Manifest",
    "ManifestVariant",
]

SCHEMA: Final = 1
MANIFEST_NAME: Final = "manifest.json"
INDEX_NAME: Final = "index.json"
#: A full set is some hundred variants of about 1.5 KB each; a file of this size is no manifest, and is not parsed.
LARGEST_MANIFEST: Final = 16 << 20
#: An index names a handful of sets in some hundred bytes.
LARGEST_INDEX: Final = 1 << 20
LARGEST_CUBIN: Final = 16 << 20


@dataclass(frozen=True)
class ManifestVariant:
    """One cubin and how it is launched. Sizes in bytes.

    Attributes:
        variant: what it is; ``file`` is ``<key>.cubin`` beside the manifest.
        kernel: the kernel module that it was compiled from.
        layout: name and version of the packed weights that it reads.
        recipe: how it is launched; parsed when it is first asked for.
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
    dynamic_smem: int
    smem_carveout: int
    registers: int
    stack: int
    parameters: tuple[tuple[int, int], ...]
    parameter_bytes: int
    source_digest: str
    audit: Mapping[str, Any] = field(default_factory=dict)
    verification: tuple[Mapping[str, Any], ...] = ()

    # Derived from the variant. An entry that was read from a manifest has them set, and its variant and recipe are parsed when they are asked
    # for: loading a kernel needs neither.

    @cached_property
    def key(self) -> str:
        """The variant's key."""
        return self.variant.key

    @cached_property
    def arch(self) -> str:
        """The variant's architecture."""
        return self.variant.arch

    @cached_property
    def symbol(self) -> str:
        """The kernel's symbol in the cubin."""
        return self.variant.symbol

    @cached_property
    def file(self) -> str:
        """Name of the cubin, beside the manifest."""
        return f"{self.key}.cubin"

    def to_json(self, recipe_id: str) -> dict[str, Any]:
        """As it stands in the manifest under its key, its recipe by reference."""
        return {
            "kernel": self.kernel,
            "symbol": self.symbol,
            "file": self.file,
            "sha256": self.sha256,
            "size": self.size,
            "arch_kind": architecture(self.arch).kind,
            "layout": self.layout,
            "recipe": recipe_id,
            "static_smem": self.static_smem,
            "dynamic_smem": self.dynamic_smem,
            "smem_carveout": self.smem_carveout,
            "registers": self.registers,
            "stack": self.stack,
            "parameters": [list(pair) for pair in self.parameters],
            "parameter_bytes": self.parameter_bytes,
            "source_digest": self.source_digest,
            "audit": dict(self.audit),
            "verification": [dict(record) for record in self.verification],
        }

    def __getattr__(self, name: str) -> Any:
        # only names that the instance lacks come here
        read = self.__dict__.get("_unread", {}).get(name)
        if read is None:
            raise AttributeError(name)
        value = self.__dict__[name] = read()
        return value

    @classmethod
    def from_json(cls, key: str, value: Any, path: str, arch: str, recipes: Mapping[str, Recipe]) -> ManifestVariant:
        """Checks and reads the entry of ``key``; its variant and recipe when they are asked for. Raises ManifestError."""
        try:
            members = _MEMBERS(value)
        except (KeyError, TypeError):
            members = ()
        found = dict(zip(_ENTRY, members, strict=False))
        if tuple(map(type, members)) != _KINDS or not _allowed(found):
            fields = Fields(value, path)
            for name, (kind, check, allowed) in _ENTRY.items():
                fields.get(name, kind, check, allowed)  # names the fault
        belonging = (("symbol", symbol_of(key)), ("file", f"{key}.cubin"), ("arch_kind", architecture(arch).kind))
        for name, belongs in belonging:
            if found[name] != belongs:
                Fields(value, path).get(name, str, lambda _: False, f"{belongs} belongs to this key")
        recipe_id = found.pop("recipe")
        parameters = found["parameters"] = tuple(map(tuple, found["parameters"]))
        found["verification"] = tuple(found["verification"])
        del found["arch_kind"]

        def read_recipe() -> Recipe:
            recipe = recipes.get(recipe_id)
            if recipe is None:
                raise ManifestError(f"{path}.recipe: {recipe_id!r} is not allowed: an id of recipes")
            if parameters != recipe.offsets():
                raise ManifestError(f"{path}.parameters: {list(parameters)} are not those of recipe {recipe_id}: {list(recipe.offsets())}")
            for name in ("dynamic_smem", "smem_carveout"):
                if getattr(recipe, name) != found[name]:
                    raise ManifestError(f"{path}.{name}: {found[name]}, its recipe {recipe_id} says {getattr(recipe, name)}")
            return recipe

        entry = object.__new__(cls)
        entry.__dict__.update(found, key=key, arch=arch, _unread={"variant": lambda: _variant(key, arch, path), "recipe": read_recipe})
        return entry


def _variant(key: str, arch: str, path: str) -> Variant:
    """The variant of a key in the set of ``arch``."""
    try:
        variant = Variant.parse(key)
    except VariantError as error:
        raise ManifestError(f"{path}: {error}") from None
    if variant.arch != arch:
        raise ManifestError(f"{path}: {key} is for {variant.arch}, the set is for {arch}")
    return variant


def _pairs(value: list[Any]) -> bool:
    if not value:
        return True
    if set(map(type, value)) != {list} or set(map(len, value)) != {2}:
        return False
    numbers = list(chain.from_iterable(value))
    return set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) <= 1 << 16


def _size(largest: int, least: int = 0) -> tuple[type, Callable[[Any], bool], str]:
    return int, lambda value: bool(least <= value <= largest), f"{least} to {largest}"


#: Members of an entry: name → type, check and what is allowed, in words.
_ENTRY: Final[Mapping[str, tuple[type, Callable[[Any], bool] | None, str]]] = {
    "kernel": (str, None, ""),
    "symbol": (str, None, ""),
    "file": (str, None, ""),
    "sha256": (str, is_sha256, "64 lower-case hexadecimal digits"),
    "size": _size(LARGEST_CUBIN),
    "arch_kind": (str, None, ""),
    "layout": (str, None, ""),
    "recipe": (str, None, ""),
    "static_smem": _size(1 << 20),
    "dynamic_smem": _size(1 << 20),
    "smem_carveout": _size(100, -1),
    "registers": _size(255),
    "stack": _size(1 << 20),
    "parameters": (list, _pairs, "pairs of offset and size"),
    "parameter_bytes": _size(1 << 16),
    "source_digest": (str, is_sha256, "64 lower-case hexadecimal digits"),
    "audit": (dict, None, ""),
    "verification": (list, lambda records: all(isinstance(record, dict) for record in records), "objects"),
}
#: Their values in order, from an entry that has all of them.
_MEMBERS: Final = itemgetter(*_ENTRY)
_KINDS: Final = tuple(kind for kind, _, _ in _ENTRY.values())
_CHECKS: Final = tuple((name, check) for name, (_, check, _) in _ENTRY.items() if check is not None)


def _allowed(found: Mapping[str, Any]) -> bool:
    """Whether members of the right types pass their checks."""
    for name, check in _CHECKS:  # noqa: SIM110 - a generator takes as long as the checks
        if not check(found[name]):
            return False
    return True


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
        source: where it was read from, for messages.
    """

    arch: str
    builder: Mapping[str, Any]
    toolchain: Mapping[str, Any]
    minimum_driver: int
    variants: Mapping[str, ManifestVariant]
    source: str = field(default="manifest", compare=False)

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
    def from_bytes(cls, data: bytes, source: str, *, full: bool = True, proof: Proof | None = None) -> Manifest:
        """Checks and reads a manifest.

        Args:
            source: where the bytes came from, for messages.
            full: parse all of it and check every entry now, names that stand twice and the canonical form included. Otherwise entries are
                parsed and checked when they are asked for: a cold start reads a manifest whose digests the index states.
            proof: where not ``full``: compares the bytes of what is asked for with those digests.

        Raises:
            ArtifactCorrupt: it is not what ``proof`` says; later too, when an entry is asked for.
            ManifestError: anything that is not a manifest of this schema.
        """
        fields = parse_document(data, source, SCHEMA, LARGEST_MANIFEST) if full else _lines(data, source, proof)
        arch = fields.get("arch", str)
        try:
            architecture(arch)
        except VariantError as error:
            raise ManifestError(f"{source}.arch: {error}") from None
        recipes = _Recipes(fields.get("recipes", dict), source)
        variants = _Entries(fields.get("variants", dict), source, arch, recipes)
        builder, toolchain = (_Members(fields.get(name, dict), f"{source}.{name}") for name in ("builder", "toolchain"))
        manifest = cls(arch, builder, toolchain, fields.size("minimum_driver", 10**6), variants, source)
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
        toolchain = Fields(self.toolchain, f"{self.source}.toolchain")
        toolchain.get("flavour", str)
        toolchain.get("ptxas", str)
        for distribution in toolchain.items("distributions"):
            distribution.get("name", str)
            distribution.get("version", str)
            distribution.sha256("sha256")
        builder = Fields(self.builder, f"{self.source}.builder")
        builder.get("version", str)
        builder.get("dirty", bool)
        for key in self.variants:
            _variant(key, self.arch, f"{self.source}.variants.{key}")
            self.variants[key].recipe  # noqa: B018 - reading it checks it
        if isinstance(self.variants, _Entries):
            self.variants.recipes.check()


def _recipe(document: Any, path: str) -> Recipe:
    fields = Fields(document, path)
    fields.get("parameters", list, lambda v: 0 < len(v) <= 256 and all(isinstance(p, dict) for p in v), "1 to 256 objects")
    fields.get("grid", list, lambda v: len(v) == 3 and all(type(e) in (int, str) for e in v), "three expressions")
    fields.triple("block")
    for position, parameter in enumerate(document["parameters"]):
        if all(type(parameter.get(name)) is str for name in ("name", "kind", "value")):
            continue
        each = Fields(parameter, f"{path}.parameters[{position}]")
        for name in ("name", "kind", "value"):
            each.get(name, str)
    try:
        recipe = Recipe.from_json(document)
    except RecipeError as error:
        raise ManifestError(f"{path}: {error}") from None
    return recipe


class _Members(Mapping[str, Any]):
    """An object of a manifest whose members are parsed when they are asked for."""

    def __init__(self, values: Mapping[str, Any], path: str) -> None:
        self._values, self._path = values, path

    def __getitem__(self, name: str) -> Any:
        return _parsed(self._values[name], f"{self._path}.{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _parsed(value: Any, path: str) -> Any:
    return parse_line(value, path) if isinstance(value, memoryview) else value


def _lines(data: bytes, source: str, proof: Proof | None) -> Fields:
    """The document's top level, with its schema checked; its objects are left unparsed."""
    if len(data) > LARGEST_MANIFEST:
        raise ManifestError(f"{source}: {len(data)} bytes; at most {LARGEST_MANIFEST} are read")
    fields = Fields(split_lines(data, source, ("builder", "recipes", "toolchain", "variants"), proof), source)
    check_schema(fields, SCHEMA)
    return fields


@dataclass(frozen=True)
class IndexEntry:
    """One set.

    Attributes:
        manifest: its manifest's path below the root, ``<arch>/manifest.json``.
        sha256, size: of that file, in bytes.
        blocks: sha256 of each of its blocks (``proof.block_digests``).
        variants: how many it lists.
    """

    arch: str
    manifest: str
    sha256: str
    size: int
    blocks: str
    variants: int

    @classmethod
    def of(cls, arch: str, manifest: bytes, variants: int) -> IndexEntry:
        """The entry of a manifest's bytes."""
        return cls(arch, f"{arch}/{MANIFEST_NAME}", sha256_hex(manifest), len(manifest), block_digests(manifest), variants)

    def is_of(self, manifest: bytes) -> bool:
        """Whether these bytes are the manifest that it names, whole and by blocks."""
        return (self.sha256, self.size, self.blocks) == (sha256_hex(manifest), len(manifest), block_digests(manifest))

    def proof(self, manifest: bytes, path: str) -> Proof:
        """Compares bytes that were read from ``path`` as they are used. Raises ArtifactCorrupt where their number differs."""
        fault = f"{path} is not the manifest that {INDEX_NAME} names: an interrupted build or a changed file; build or install again"
        return Proof(manifest, self.size, self.blocks, fault)


@dataclass(frozen=True)
class Index:
    """The sets of an artifact root, by architecture."""

    sets: Mapping[str, IndexEntry]

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        return canonical({"schema": SCHEMA, "sets": [dict(vars(entry)) for _, entry in sorted(self.sets.items())]})

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> Index:
        """Checks and reads an index. Raises ManifestError."""
        sets: dict[str, IndexEntry] = {}
        for position, value in enumerate(parse_document(data, source, SCHEMA, LARGEST_INDEX).get("sets", list)):
            fields = Fields(value, f"{source}.sets[{position}]")
            arch = fields.get("arch", str)
            try:
                architecture(arch)
            except VariantError as error:
                raise ManifestError(f"{fields.path}.arch: {error}") from None
            expected = f"{arch}/{MANIFEST_NAME}"
            manifest = fields.get("manifest", str, expected.__eq__, f"{expected} belongs to {arch}")
            if arch in sets:
                raise ManifestError(f"{fields.path}.arch: {arch} stands twice")
            size = fields.size("size", LARGEST_MANIFEST)
            blocks = fields.get("blocks", str)
            if len(blocks) != -(-size // BLOCK) * DIGITS:
                raise ManifestError(f"{fields.path}.blocks: {len(blocks)} digits; {DIGITS} belong to each {BLOCK} bytes of a manifest of {size}")
            sets[arch] = IndexEntry(arch, manifest, fields.sha256("sha256"), size, blocks, fields.size("variants", 10**6))
        return cls(sets)
