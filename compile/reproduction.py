"""``densemoe reproduce``: builds again, elsewhere and otherwise, and compares bit for bit.

A copy of the sources under another path is compiled in a fresh environment that is made from the lock, wheel by wheel against its hash. Varied are:
hash seed, locale, time zone, home, umask and order of the variants; the user, where this process may change it; the host's CUDA driver, an old
one and a new one, both of which say nothing but their version; and every other Python that is installed and that the lock has wheels for.
"""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from densemoe.compile import environment
from densemoe.compile.drift import Side, explain, short_digest
from densemoe.compile.matrix import load as load_matrix
from densemoe.runtime.errors import ArtifactError, BuildError
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.lock import Lock

__all__ = ["Outcome", "Reference", "Variation", "default_reference", "fake_driver", "reference", "reproduce", "sample", "variations"]

_TREE: Final = Path(__file__).resolve().parent.parent
#: What a rebuild needs of a source tree, or of an installed package, which has the same layout.
_SOURCES: Final = ("compile", "runtime", "artifacts", "build_matrix.yaml", "pyproject.toml")
_SECONDS_A_VARIANT: Final = 120
_SECONDS_TO_START: Final = 120
OLD_DRIVER: Final = 12090  # the last that lacks CUDA 13: the DSL would take its CUDA 12 compiler
NEW_DRIVER: Final = 14000  # one that does not exist yet
_NOBODY: Final = "nobody"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """What must come out: the sides by key, where they are from, and the lock."""

    source: str
    sides: Mapping[str, Side]
    lock: Lock


@dataclass(frozen=True)
class Variation:
    """One rebuild and in what it is another.

    Attributes:
        python: interpreter.
        changes: environment variables that are set; an empty text removes one.
        reverse: compile the variants in the opposite order.
        user: run as this user, empty for the own one.
    """

    name: str
    python: Path
    changes: Mapping[str, str] = field(default_factory=dict)
    reverse: bool = False
    user: str = ""


@dataclass
class Outcome:
    """What one variation gave.

    Attributes:
        equal: keys whose bytes are those of the reference.
        different: (key, differing sections, likely cause).
        errors: by key; ``""`` for the whole rebuild.
    """

    name: str
    what: str
    equal: list[str] = field(default_factory=list)
    different: list[tuple[str, list[str], str]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)


def reference(root: Path | None, lock: Lock, source: str = "") -> Reference:
    """What ``root`` holds, or without one what the lock states.

    Raises:
        ArtifactError: the root cannot be read, or holds a file that is not its manifest's.
    """
    kernels = dict(lock.kernels)
    if root is None:
        sides = {key: Side(each.sha256, None, each.ptx, lock.distributions, {each.kernel: kernels[each.kernel]}) for key, each in lock.cubins.items()}
        return Reference(source or "the lock", sides, lock)
    found, sides = ArtifactSet(root), {}
    for arch in found.architectures:
        manifest = found.manifest(arch)
        manifest.check()
        toolchain = {each["name"]: each["version"] for each in manifest.toolchain["distributions"]}
        for key, entry in manifest.variants.items():
            locked = lock.cubins.get(key)
            same = locked is not None and locked.sha256 == entry.sha256
            known = {entry.kernel: kernels[entry.kernel]} if same else {}
            sides[key] = Side(entry.sha256, found.image(entry), str(entry.audit.get("ptx_sha256", ""))[:16], toolchain, known)
    return Reference(source or str(root), sides, lock)


def sample(keys: Sequence[str], count: int) -> list[str]:
    """``count`` of ``keys``, spread evenly over their order; all where it is 0."""
    ordered = sorted(keys)
    if not 0 < count < len(ordered):
        return ordered
    return [ordered[position * len(ordered) // count] for position in range(count)]


def fake_driver(folder: Path, version: int) -> Path | None:
    """A folder with a ``libcuda.so.1`` that knows its version and nothing else; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "driver.c"
    source.write_text(f"int cuInit(unsigned flags) {{ return flags ? 1 : 100; }}\nint cuDriverGetVersion(int *v) {{ *v = {version}; return 0; }}\n")
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), str(source)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return folder


def variations(pythons: Mapping[str, Path], drivers: Mapping[int, Path | None], user: str, note: Note) -> Iterator[Variation]:
    """The rebuilds; ``note`` is told what cannot be varied here and why.

    Args:
        pythons: interpreters by version, the first with whose environment everything else is varied.
        drivers: folders of fake drivers by version.
        user: to run as, empty where this process may not change it.
    """
    first, python = next(iter(pythons.items()))
    elsewhere = {"PYTHONHASHSEED": "12345", "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "HOME": "/nonexistent", "USER": "someone"}
    if not user:
        note("user: not varied, this process may not run the interpreter as another one")
    yield Variation(f"path, hash seed, locale, time zone, home{', user' if user else ''}, order", python, elsewhere, reverse=True, user=user)
    for number, folder in drivers.items():
        name = f"driver for CUDA {number // 1000}.{number % 1000 // 10}"
        if folder is None:
            note(f"{name}: not varied, there is no C compiler to make one that only states it")
            continue
        yield Variation(name, python, {"LD_LIBRARY_PATH": str(folder), "PYTHONHASHSEED": "0"})
    for version, other in list(pythons.items())[1:]:
        yield Variation(f"Python {version} instead of {first}", other, {"PYTHONHASHSEED": "1"})


def other_user(python: Path, folder: Path) -> str:
    """``nobody`` where this process may run ``python`` as it and let it write to ``folder``; else nothing."""
    if os.geteuid() != 0:
        return ""
    with suppress(KeyError, OSError, subprocess.SubprocessError):
        pwd.getpwnam(_NOBODY)
        probe = [str(python), "-c", f"import os; os.listdir({str(folder)!r})"]
        subprocess.run(probe, user=_NOBODY, group=pwd.getpwnam(_NOBODY).pw_gid, extra_groups=[], check=True, capture_output=True, timeout=60)
        return _NOBODY
    return ""


def copy_sources(tree: Path, folder: Path) -> Path:
    """What a rebuild needs of ``tree`` (a checkout, an sdist, an installed or unpacked package), in ``folder``."""
    folder.mkdir(parents=True)
    for name in _SOURCES:
        if (tree / name).is_dir():
            shutil.copytree(tree / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "built"))
        elif (tree / name).exists():
            shutil.copy(tree / name, folder / name)
    if not (folder / "build_matrix.yaml").exists():
        raise BuildError(f"{tree} has no build_matrix.yaml: give a checkout, an sdist, or a wheel of densemoe")
    return folder


def rebuild(tree: Path, variation: Variation, keys: Sequence[str], profile: str, out: Path) -> dict[str, Any]:
    """Runs ``compile/rebuild.py`` of ``tree``; its facts, with ``errors[""]`` where it did not end well."""
    out.mkdir(parents=True)
    environment_variables = {name: value for name, value in os.environ.items() if not name.startswith(("CUTE_DSL", "PYTHON", "DENSEMOE", "LD_"))}
    environment_variables |= {"PYTHONDONTWRITEBYTECODE": "1", **variation.changes}
    job = {"keys": list(reversed(keys)) if variation.reverse else list(keys), "profile": profile}
    options: dict[str, Any] = {}
    if variation.user:
        account = pwd.getpwnam(variation.user)
        os.chown(out, account.pw_uid, account.pw_gid)
        options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": [], "umask": 0o022}
    command = [str(variation.python), str(tree / "compile" / "rebuild.py"), str(out)]
    limit = _SECONDS_TO_START + _SECONDS_A_VARIANT * len(keys)
    try:
        done = subprocess.run(
            command, input=json.dumps(job), env=environment_variables, cwd="/", capture_output=True, text=True, timeout=limit, check=False, **options
        )
        if done.returncode:
            return {"errors": {"": f"exit code {done.returncode}: {done.stderr.strip()[-2000:]}"}}
        facts: dict[str, Any] = json.loads((out / "facts.json").read_text())
        return facts
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return {"errors": {"": f"{type(error).__name__}: {error}"}}


def judge(expected: Reference, variation: Variation, keys: Sequence[str], facts: Mapping[str, Any], out: Path) -> Outcome:
    """Compares what a rebuild left in ``out`` with the reference."""
    what = ", ".join(f"{name}={value}" for name, value in variation.changes.items() if name != "LD_LIBRARY_PATH")
    outcome = Outcome(variation.name, what, errors=dict(facts.get("errors", {})))
    for key in keys:
        path = out / f"{key}.cubin"
        if not path.exists():
            if key not in outcome.errors and "" not in outcome.errors:
                outcome.errors[key] = "nothing came out"
            continue
        image, side = path.read_bytes(), expected.sides[key]
        found = Side(
            sha256=hashlib.sha256(image).hexdigest(),
            image=image,
            ptx=short_digest((out / f"{key}.ptx").read_bytes()),
            toolchain=facts["distributions"],
            kernels=facts["kernels"],
            options=facts["options"].get(key),
        )
        if found.sha256 == side.sha256:
            outcome.equal.append(key)
        else:
            sections, cause = explain(side, found)
            outcome.different.append((key, sections, cause))
    return outcome


def reproduce(
    expected: Reference,
    keys: Sequence[str],
    *,
    tree: Path = _TREE,
    fresh: bool = True,
    pythons: Mapping[str, Path] | None = None,
    note: Note = lambda text: None,
) -> Iterator[Outcome]:
    """Rebuilds ``keys`` under every variation that this machine allows.

    Args:
        tree: the sources.
        fresh: make environments from the lock; otherwise compile with the interpreters as they are.
        pythons: interpreters by version, the first one the main one; by default this one and the others that are found.
        note: told what is done, and what cannot be varied here.

    Raises:
        BuildError: the sources are not whole.
        ToolchainError: an environment cannot be made.
    """
    available = pythons if pythons is not None else environment.interpreters()
    locked = {version for wheel in expected.lock.wheels.values() for version in wheel.pythons}
    for version in [version for version in available if fresh and version not in locked]:
        note(f"Python {version}: not varied, the lock has no wheels for it")
    usable = {version: path for version, path in available.items() if not fresh or version in locked}
    with tempfile.TemporaryDirectory(prefix="densemoe-reproduce-") as name:
        base = Path(name)
        base.chmod(0o755)  # another user reads the sources
        copied = copy_sources(tree, base / "another path" / "deep" / "tree")
        matrix = load_matrix(copied / "build_matrix.yaml")
        profile = expected.lock.profile if expected.lock.profile in matrix.profiles else next(iter(matrix.profiles))
        if fresh:
            made: dict[str, Path] = {}
            for version, path in usable.items():
                if not made and os.geteuid() == 0:
                    path = environment.shared_interpreter(version) or path  # which another user may run
                note(f"Python {version}: a fresh environment of the locked wheels, each by its hash")
                made[version] = environment.create(expected.lock, path, version, base / f"environment-{version}")
            usable = made
        drivers = {version: fake_driver(base / f"driver-{version}", version) for version in (OLD_DRIVER, NEW_DRIVER)}
        user = other_user(next(iter(usable.values())), copied)
        for position, variation in enumerate(variations(usable, drivers, user, note)):
            out = base / f"out-{position}"
            facts = rebuild(copied, variation, keys, profile, out)
            yield judge(expected, variation, keys, facts, out)


def default_reference(lock: Lock) -> Reference:
    """The installed artifacts where they are the locked ones (their images show which sections differ), else the lock."""
    with suppress(ArtifactError):
        found = reference(None, lock)
        installed = reference(ArtifactSet().root, lock)
        same = {key: side for key, side in installed.sides.items() if key in found.sides and side.sha256 == found.sides[key].sha256}
        return Reference("the lock", {**found.sides, **same}, lock)
    return reference(None, lock)

