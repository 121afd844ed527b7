"""Interpreters, and build environments made from the lock: what a rebuild elsewhere starts from."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from densemoe.runtime.errors import ToolchainError
from densemoe.runtime.lock import Lock, LockedWheel

__all__ = ["MACHINES", "create", "interpreters", "requirements", "resolve", "shared_interpreter"]

#: Machines that the toolchain has wheels for.
MACHINES: Final = ("x86_64", "aarch64")
#: Python minor versions that the toolchain has wheels for.
_MINORS: Final = range(10, 15)
#: Newest first: what a distribution of today accepts.
_MANYLINUX: Final = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
_PIP_SECONDS: Final = 900  # the toolchain's libraries are some 300 MB


def interpreters() -> dict[str, Path]:
    """Interpreters of this machine that the toolchain has wheels for, by version (``"3.11"``): this one, those on PATH, those of pyenv."""
    found = {f"{sys.version_info[0]}.{sys.version_info[1]}": Path(sys.executable)}
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for minor in _MINORS:
        name = f"3.{minor}"
        candidates = [shutil.which(f"python{name}"), *sorted(glob.glob(str(versions / f"{name}.*" / "bin" / "python")))]
        for candidate in candidates:
            if name not in found and candidate and _version(candidate) == name:
                found[name] = Path(candidate)
    return found


def shared_interpreter(version: str) -> Path | None:
    """An interpreter of ``version`` that every user may run, None where there is none: one in a home folder is its owner's alone."""
    for folder in ("/usr/local/bin", "/usr/bin"):
        candidate = Path(folder) / f"python{version}"
        if candidate.exists() and _version(str(candidate)) == version:
            return candidate
    return None


def _version(python: str) -> str:
    """The version that an interpreter states, nothing where it does not start (a shim of an inactive version)."""
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def requirements() -> list[str]:
    """What the extra [build] needs, without densemoe itself."""
    found = []
    for text in importlib.metadata.requires("densemoe") or ():
        name, _, marker = text.partition(";")
        wanted = not marker or re.search(r"""extra\s*==\s*['"](build|host)['"]""", marker)
        if wanted and not name.strip().startswith("densemoe"):
            found.append(name.strip())
    return found


def resolve(pythons: Mapping[str, Path], machines: Sequence[str] = MACHINES) -> dict[str, LockedWheel]:
    """The wheels of the build environment, as the package index states them; nothing is downloaded or installed.

    Args:
        pythons: interpreters by version; markers are evaluated by each.
        machines: of ``MACHINES``.

    Returns:
        By file name, with the sha256 that the index states.

    Raises:
        ToolchainError: pip failed, or gave something that is no wheel.
    """
    found: dict[str, tuple[str, set[str]]] = {}
    for version, python in pythons.items():
        for machine in machines:
            for name, sha256 in _resolve_one(version, python, machine):
                known = found.setdefault(name, (sha256, set()))
                if known[0] != sha256:
                    raise ToolchainError(f"{name} has two hashes, {known[0]} and {sha256}: two indexes serve different files; use one")
                known[1].add(version)
    order = [f"3.{minor}" for minor in _MINORS]
    return {name: LockedWheel(sha256, tuple(sorted(versions, key=order.index))) for name, (sha256, versions) in found.items()}


def _resolve_one(version: str, python: Path, machine: str) -> Iterable[tuple[str, str]]:
    with tempfile.TemporaryDirectory(prefix="densemoe-resolve-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), "--only-binary=:all:", "--target", str(Path(folder) / "target"), "--implementation", "cp"]
        command += ["--python-version", version, *(part for tag in _MANYLINUX for part in ("--platform", f"{tag}_{machine}"))]
        _pip([*command, *requirements()])
        items: list[dict[str, Any]] = json.loads(report.read_text())["install"]
    for item in items:
        name = item["download_info"]["url"].rsplit("/", 1)[-1].partition("#")[0]
        sha256 = item["download_info"].get("archive_info", {}).get("hashes", {}).get("sha256")
        if not name.endswith(".whl") or not sha256:
            raise ToolchainError(f"{name}: the index gives no wheel with a sha256; use an index that does")
        yield name, sha256


def _pip(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ToolchainError(f"pip did not end within {_PIP_SECONDS} s: {' '.join(command)}") from None
    if done.returncode:
        raise ToolchainError(f"pip failed ({done.returncode}): {done.stderr.strip()[-2000:]}")


def _name_and_version(wheel: str) -> tuple[str, str]:
    name, version, *_ = wheel.split("-")
    return name.replace("_", "-").lower(), version


def hashed_requirements(lock: Lock, python: str, machine: str) -> str:
    """A requirements file for ``pip install --require-hashes``: every locked wheel of that Python and machine.

    Args:
        python: version, as in ``"3.11"``.

    Raises:
        ToolchainError: the lock holds no environment for it.
    """
    hashes: dict[tuple[str, str], list[str]] = {}
    for wheel, each in lock.wheels.items():
        if python in each.pythons and (wheel.endswith("-any.whl") or machine in wheel.rsplit("-", 1)[-1]):
            hashes.setdefault(_name_and_version(wheel), []).append(each.sha256)
    if not hashes:
        known = sorted({version for each in lock.wheels.values() for version in each.pythons})
        raise ToolchainError(
            f"the lock holds no environment for Python {python} on {machine}: it has Python {', '.join(known) or 'none'};"
            " add it with `densemoe lock --resolve`"
        )
    lines = []
    for (name, version), digests in sorted(hashes.items()):
        lines.append(" ".join([f"{name}=={version}", *(f"--hash=sha256:{digest}" for digest in sorted(digests))]))
    return "\n".join(lines) + "\n"


def create(lock: Lock, python: Path, version: str, folder: Path) -> Path:
    """A fresh virtual environment in ``folder`` with exactly the locked wheels, each checked against its locked sha256.

    Returns:
        Its interpreter.

    Raises:
        ToolchainError: the lock has no such environment, or pip failed: a wheel that is not the locked one among the reasons.
    """
    listing = hashed_requirements(lock, version, platform.machine())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "requirements.txt").write_text(listing)
    _pip([str(python), "-m", "venv", "--without-pip", str(folder / "venv")])
    made = folder / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(made), "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    _pip([*command, "--require-hashes", "-r", str(folder / "requirements.txt")])
    return made
