"""Artifact roots and the loader: which set serves a device, and kernels loaded once, checked, on first use.

Roots, the first that is given wins: an explicit path, ``DENSEMOE_ARTIFACTS``, the installed package and, for architectures that it lacks, add-on
wheels (addons.py). A set whose architecture is exactly the
device's is preferred to a family set. At load the file's size and sha256 are compared with the manifest's, once per process, and the driver's
view of the kernel's parameters with the manifest's. Thread-safe. A forked child is told so instead of crashing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from densemoe.runtime import driver as cuda_driver
from densemoe.runtime.canonical import installed_file, read_file
from densemoe.runtime.errors import AbiMismatch, ArchitectureMismatch, ArtifactCorrupt, ArtifactError, ArtifactNotFound, DriverTooOld, SelectionError
from densemoe.runtime.manifest import INDEX_NAME, LARGEST_CUBIN, LARGEST_INDEX, LARGEST_MANIFEST, SCHEMA, Index, IndexEntry, Manifest, ManifestVariant
from densemoe.runtime.plan import Plan
from densemoe.runtime.proof import sha256_hex
from densemoe.runtime.select import Choice, load_table, select
from densemoe.runtime.variant import Architecture, Variant, architecture, symbol_of

if TYPE_CHECKING:
    from densemoe.runtime.problem import Problem

__all__ = ["ENVIRONMENT", "ArtifactSet", "LoadedKernel", "Loader", "artifact_root"]

#: Every environment variable that the runtime reads: name → meaning. Arguments win over them.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "DENSEMOE_ARTIFACTS": "directory of an artifact root (index.json and a folder per architecture), instead of the installed package's",
    "DENSEMOE_FUSED_FC2_ALPHA": "1: layers for PyTorch apply the router's weights before FC1's output is rounded unless told otherwise; 0: after",
}


def artifact_root(path: str | os.PathLike[str] | None = None) -> Path:
    """The artifact root that will be used.

    Raises:
        ArtifactNotFound: the path does not exist, or the installed package carries no artifacts.
    """
    given, said = _root(path)
    if not os.path.isfile(os.path.join(given, INDEX_NAME)):
        raise _no_artifacts(given, said)
    return Path(given)


def _root(path: str | os.PathLike[str] | None) -> tuple[str, str]:
    """The root's path and who named it. As text: a cold start has no use for Path objects, which take longer to make than its index to read; and
    nobody looks whether the index is there, since it is read next."""
    if path is not None:
        return os.fspath(path), "the given path"
    if given := os.environ.get("DENSEMOE_ARTIFACTS", ""):
        return given, "DENSEMOE_ARTIFACTS"
    return os.path.dirname(installed_file("built", INDEX_NAME)), "the installed package"


def _no_artifacts(root: str, said: str) -> ArtifactNotFound:
    return ArtifactNotFound(
        f"{said} has no artifacts: {os.path.join(root, INDEX_NAME)} does not exist. Run `densemoe build`, install a wheel with artifacts, or set"
        " DENSEMOE_ARTIFACTS"
    )


class ArtifactSet:
    """An artifact root, its manifests read on first use; without a path, the installed one and what add-on wheels bring.

    Raises:
        ArtifactNotFound, ManifestError: the root has no index that can be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._extensible = path is None and not os.environ.get("DENSEMOE_ARTIFACTS")
        self._addons: tuple[ArtifactSet, ...] | None = None
        root, said = _root(path)
        try:
            data = read_file(os.path.join(root, INDEX_NAME), LARGEST_INDEX)
        except ArtifactNotFound:
            if not self.addons:
                raise _no_artifacts(root, said) from None
            root = str(self.addons[0].root)
            data = read_file(os.path.join(root, INDEX_NAME), LARGEST_INDEX)
        # once and for all: manifests and cubins are read later, when the process may stand elsewhere
        self._prefix = os.path.join(os.path.abspath(root), "")
        self.index = Index.from_bytes(data, f"{self._prefix}{INDEX_NAME}")
        self._manifests: dict[str, Manifest] = {}
        self._lock = threading.Lock()

    @cached_property
    def root(self) -> Path:
        """The directory that holds the index."""
        return Path(self._prefix)

    @property
    def architectures(self) -> tuple[str, ...]:
        """Architectures of the root's sets, and of add-ons'."""
        return tuple(sorted({*self.index.sets, *(arch for each in self.addons for arch in each.index.sets)}))

    @property
    def addons(self) -> tuple[ArtifactSet, ...]:
        """Roots of add-on wheels, looked for once, when they are first asked for; none where a root was given.

        Raises:
            ArtifactError: an add-on cannot be read, or two have different sets for one architecture.
        """
        if self._addons is None:
            self._addons = _open_addons() if self._extensible else ()
        return self._addons

    def _owner(self, arch: str) -> ArtifactSet | None:
        """The root that has the set of ``arch``: this one, else an add-on."""
        if arch in self.index.sets:
            return self
        return next((each for each in self.addons if arch in each.index.sets), None)

    def manifest(self, arch: str) -> Manifest:
        """The manifest of one architecture. Of what it holds each part is compared with the index when it is first used.

        Raises:
            ArtifactNotFound: the root has no such set.
            ArtifactCorrupt: the manifest is not the one that the index names.
            ManifestError: it cannot be read.
        """
        with self._lock:
            if arch in self._manifests:
                return self._manifests[arch]
            entry = self.index.sets.get(arch)
            if entry is None:
                owner = self._owner(arch)
                if owner is not None:
                    return owner.manifest(arch)
                raise ArtifactNotFound(f"{self.root} has no set for {arch}: it has {', '.join(self.architectures) or 'none'}")
            path = f"{self._prefix}{entry.manifest}"
            data = read_file(path, LARGEST_MANIFEST)
            self._manifests[arch] = Manifest.from_bytes(data, path, full=False, proof=entry.proof(data, path))
            return self._manifests[arch]

    def for_capability(self, capability: tuple[int, int]) -> Manifest:
        """The set that serves a compute capability: an exact one, else a family one.

        Raises:
            ArchitectureMismatch: no set does.
        """
        fitting = _serving(self.index.sets, capability) or _serving(self.architectures, capability)
        if not fitting:
            raise ArchitectureMismatch(
                f"the device has compute capability {capability[0]}.{capability[1]}; {self.root} has sets for {', '.join(self.architectures)}:"
                " install or build artifacts for the device"
            )
        best = min(fitting, key=lambda each: (each.kind != "exact", each.name))
        return self.manifest(best.name)

    def image(self, entry: ManifestVariant) -> bytes:
        """A cubin's bytes, compared with the manifest.

        Raises:
            ArtifactNotFound: the file is missing.
            ArtifactCorrupt: its size or hash differs.
        """
        owner = self._owner(entry.arch) or self
        path = f"{owner._prefix}{entry.arch}{os.sep}{entry.file}"
        data = read_file(path, LARGEST_CUBIN, entry.size)
        if len(data) != entry.size:
            found = os.path.getsize(path)
            raise ArtifactCorrupt(f"{path} has {found} bytes, the manifest says {entry.size}: truncated or replaced; build or install again")
        if sha256_hex(data) != entry.sha256:
            raise ArtifactCorrupt(f"{path} is not the file that was built (its sha256 differs from the manifest's): build or install again")
        return data


def _serving(names: Iterable[str], capability: tuple[int, int]) -> list[Architecture]:
    return [architecture(name) for name in names if capability in architecture(name).capabilities]


def _open_addons() -> tuple[ArtifactSet, ...]:
    from densemoe.runtime.addons import GROUP, find

    opened: list[ArtifactSet] = []
    stated: dict[str, tuple[str, str]] = {}
    for each in find():
        if each.root is None:
            raise ArtifactNotFound(f"add-on {each.name!r} ({GROUP}) brings no artifacts: {each.fault}; install it again, or uninstall it")
        found = ArtifactSet(each.root)
        for arch, entry in found.index.sets.items():
            name, sha256 = stated.setdefault(arch, (each.name, entry.sha256))
            if sha256 != entry.sha256:
                raise ArtifactCorrupt(
                    f"add-ons {name!r} and {each.name!r} have different sets for {arch}: uninstall one, or name a root with DENSEMOE_ARTIFACTS"
                )
        opened.append(found)
    return tuple(opened)


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel in the driver: its entry and its handle."""

    entry: ManifestVariant
    handle: Any


class Loader:
    """Loads kernels and makes Plans.

    Args:
        artifacts: an ArtifactSet, a path, or None for the default root.
        driver: a Driver; made where absent.

    Raises:
        ArtifactError: the root cannot be used.
        DriverUnavailable: there is no driver.
    """

    def __init__(self, artifacts: ArtifactSet | str | os.PathLike[str] | None = None, driver: cuda_driver.Driver | None = None) -> None:
        self.artifacts = artifacts if isinstance(artifacts, ArtifactSet) else ArtifactSet(artifacts)
        self.driver = driver or cuda_driver.Driver()
        self._lock = threading.Lock()
        self._kernels: dict[str, LoadedKernel] = {}
        self._prepared: set[tuple[str, int]] = set()
        self._devices: dict[int, Manifest] = {}
        self._variants: dict[tuple[str, str], tuple[Variant, ...]] = {}
        self._tables: dict[int, Mapping[str, Any]] = {}

    def manifest(self, device: int) -> Manifest:
        """The set that serves a device.

        Raises:
            ArchitectureMismatch: none does.
            DriverTooOld: the driver is older than the set needs.
        """
        self.driver.check_process()
        found = self._devices.get(device)
        if found is None:
            found = self.artifacts.for_capability(self.driver.capability(device))
            version = self.driver.version()
            if version < found.minimum_driver:
                raise DriverTooOld(
                    f"the driver supports CUDA {version // 1000}.{version % 1000 // 10}; the {found.arch} artifacts need"
                    f" {found.minimum_driver // 1000}.{found.minimum_driver % 1000 // 10}: update NVIDIA's driver"
                )
            self._devices[device] = found
        return found

    def select(self, problem: Problem, device: int, variant: str | None = None) -> Choice:
        """Which variant would run ``problem`` on ``device``. Raises SelectionError where none does."""
        return self._select(problem, device, variant, "")

    def _select(self, problem: Problem, device: int, variant: str | None, op: str) -> Choice:
        """The choice among the variants of ``op``, which is quicker than among all ("") and chooses the same where one runs the problem."""
        manifest = self.manifest(device)
        variants = self._variants.get((manifest.arch, op))
        if variants is None:
            keys = sorted(key for key in manifest.variants if key.startswith(f"{op}." if op else ""))
            variants = self._variants[manifest.arch, op] = tuple(Variant.parse(key) for key in keys)
        table = self._tables.get(device)
        if table is None:
            table = self._tables[device] = load_table(manifest.arch, self.driver.capability(device))
        if op and not variants:
            return self._select(problem, device, variant, "")  # whose message names what there is
        return select(problem, variants, table, variant)

    def kernel(self, key: str, device: int) -> LoadedKernel:
        """The kernel of a key, loaded and made ready for a device.

        Raises:
            SelectionError: the key is not in the device's set.
            ArtifactError, DriverError, AbiMismatch: it cannot be loaded.
        """
        manifest = self.manifest(device)
        loaded = self._kernels.get(key)
        if loaded is not None and (key, device) in self._prepared:
            return loaded
        with self._lock:
            loaded = self._kernels.get(key)
            if loaded is None:
                loaded = self._load(manifest, key, device)
                self._kernels[key] = loaded
            elif loaded.entry.arch != manifest.arch:
                raise self._absent(manifest, key)
            if (key, device) not in self._prepared:
                self.driver.prepare(loaded.handle, device, loaded.entry.dynamic_smem, loaded.entry.smem_carveout)
                self._prepared.add((key, device))
            return loaded

    def _absent(self, manifest: Manifest, key: str) -> SelectionError:
        return SelectionError(f"{key} is not in the {manifest.arch} set of {self.artifacts.root}: `densemoe list` shows what is")

    def _load(self, manifest: Manifest, key: str, device: int) -> LoadedKernel:
        entry = manifest.variants.get(key)
        if entry is None:
            raise self._absent(manifest, key)
        image = self.artifacts.image(entry)
        library = self.driver.load(image, file=entry.file, arch=entry.arch, ordinal=device)
        handle = self.driver.kernel(library, entry.symbol)
        found = self.driver.parameters(handle)
        if found != entry.parameters:
            self.driver.unload(library)
            raise AbiMismatch(f"{entry.file}: the driver sees parameters (offset, size) {list(found)}, the manifest says {list(entry.parameters)}")
        return LoadedKernel(entry, handle)

    def preload(self, keys: Iterable[str], device: int) -> None:
        """Loads kernels now: before a CUDA-graph capture, or before the first request."""
        for key in keys:
            self.kernel(key, device)

    def plan(
        self,
        problem: Problem,
        tensors: Mapping[str, Any],
        device: int,
        variant: str | None = None,
        workspace: Mapping[str, Any] | None = None,
        settings: Mapping[str, int] | None = None,
    ) -> Plan:
        """A Plan for ``problem`` on ``device``, whose context is current on this thread.

        Args:
            tensors, workspace, settings: see Plan.
            variant: a key to use instead of the selection's.

        Raises:
            PlanError, ProblemError, RecipeError, SelectionError, ArtifactError, DriverError, AbiMismatch: nothing was launched.
        """
        choice = self._select(problem, device, variant, problem.op if variant is None else "")
        loaded = self.kernel(choice.variant.key, device)
        return Plan(self.driver, loaded.entry, loaded.handle, problem, tensors, device, workspace, {**choice.settings, **(settings or {})})


#: Bytes that reading a manifest and a cubin takes, rounded up.
_READ: Final = 1 << 19
#: Passes after which the interpreter has its own forms of the code that is rehearsed.
_PASSES: Final = 8


def _rehearse() -> None:
    """Finds the root, and reads this file and a set of one made-up variant in memory, when this module is imported: a first pass over this code takes
    twice as long as a later one (pages of C code, lookups in the standard library, and the interpreter's own forms of what runs often), and is better
    spent in an import than before a first kernel. So are the pages that a manifest is read into: an allocator that has given as much twice has it at
    hand (glibc raises its threshold for mapped blocks by the first)."""
    for _ in range(2):
        b"." * _READ  # not zeros, which would be pages that nobody has touched
    key, digest = "fc1.sm90a.t8x64.c1x1.bf16-bf16", "0" * 64
    entry = (
        f'{{"arch_kind":"exact","audit":{{}},"dynamic_smem":0,"file":"{key}.cubin","kernel":"","layout":"","parameter_bytes":0,'
        f'"parameters":[[0,8]],"recipe":"","registers":1,"sha256":"{digest}","size":1,"smem_carveout":-1,"source_digest":"{digest}","stack":0,'
        f'"static_smem":0,"symbol":"{symbol_of(key)}","verification":[]}}'
    )
    manifest = (
        f'{{\n"arch":"sm_90a",\n"builder":{{\n"dirty":false\n}},\n"minimum_driver":0,\n"recipes":{{\n"":{{}}\n}},\n"schema":{SCHEMA},\n'
        f'"toolchain":{{\n"ptxas":""\n}},\n"variants":{{\n"{key}":{entry}\n}}\n}}\n'
    ).encode()
    index = Index({"sm_90a": IndexEntry.of("sm_90a", manifest, 1)}).to_bytes()
    for _ in range(_PASSES):
        with suppress(ArtifactError):  # this file need not lie on a disk
            read_file(__file__, LARGEST_CUBIN)
            read_file(__file__, LARGEST_CUBIN, 0)
        _root(None)
        sets = Index.from_bytes(index, "").sets
        _serving(sets, (9, 0))
        Manifest.from_bytes(manifest, "", full=False, proof=sets["sm_90a"].proof(manifest, "")).variants[key]  # reading it is the point


_rehearse()
