"""The installed wheel alone: a fresh environment with cuda-bindings and nothing else, no network, no compiler, a folder that cannot be written."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from densemoe.compile import matrix

#: Refuses what a load path must not do: imports of anything but the standard library and cuda-bindings, processes, sockets, writing.
GUARD = """\
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        # the standard library's own copy.py tries "org", a module of another Python implementation
        allowed = sys.stdlib_module_names | {"densemoe", "cuda", "guard", "org"}
        if name.split(".")[0] not in allowed:
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Guard())
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.", "urllib.Request", "ftplib.", "http.client")

def audit(event, arguments):
    if event.startswith(FORBIDDEN):
        raise AssertionError(f"{event} {arguments}")
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        raise AssertionError(f"{arguments[0]} was opened to write")

sys.addaudithook(audit)
"""

COMMAND = "import guard; from densemoe.runtime.cli import main; import sys; sys.exit(main(sys.argv[1:]))"

LOAD = """\
import guard, os
from densemoe.runtime import problem
from densemoe.runtime.loader import Loader

class Driver:
    process = os.getpid()
    loaded = []
    def check_process(self): pass
    def version(self): return 13000
    def capability(self, ordinal): return (9, 0)
    def sm_count(self, ordinal): return 132
    def load(self, image, *, file, arch, ordinal):
        self.loaded.append((file, len(image)))
        return file
    def kernel(self, library, symbol): return library
    def parameters(self, kernel): return ENTRIES[kernel].parameters
    def prepare(self, *arguments): pass

loader = Loader(driver=Driver())
manifest = loader.manifest(0)
ENTRIES = {entry.file: entry for entry in manifest.variants.values()}
for op in ("fc1", "fc2"):
    choice = loader.select(problem.Problem(op, 4, 128, 2048, 768), 0)
    loader.kernel(choice.variant.key, 0)
import sys
assert len(Driver.loaded) == 2, Driver.loaded
print("loaded", *(file for file, _ in Driver.loaded))
forbidden = {"cutlass", "yaml", "torch", "numpy", "ml_dtypes", "rich", "jsonschema", "subprocess", "socket", "densemoe.compile"} & set(sys.modules)
assert not forbidden, forbidden
"""


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """site-packages of an environment that holds the wheel and cuda-bindings, read-only."""
    folder = tmp_path_factory.mktemp("environment") / "site"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (folder / "cuda").mkdir()
    for package in ("cuda.bindings", "cuda.pathfinder"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for place in spec.submodule_search_locations or ():
            (folder / "cuda" / Path(place).name).symlink_to(place)
    (folder / "guard.py").write_text(GUARD)
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    return folder


def run(site: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In an interpreter that sees ``site`` and the standard library alone."""
    environment = {"PATH": os.defpath, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/nonexistent"}
    command = [sys.executable, "-S", "-s", "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd=site, capture_output=True, text=True, timeout=60, check=False)


def test_the_guard_guards(site: Path) -> None:
    for code in ("import yaml", "import socket; socket.socket()", "import subprocess; subprocess.run(['true'])", "open('/tmp/x', 'w')"):
        done = run(site, f"import guard; {code}")
        assert "AssertionError" in done.stderr, code


def test_import_loads_nothing_that_is_not_needed(site: Path) -> None:
    done = run(site, "import guard, densemoe, densemoe.runtime, sys; assert 'cuda' not in sys.modules; print(densemoe.__version__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_kernels_are_selected_and_loaded(site: Path) -> None:
    done = run(site, LOAD)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["loaded", "fc1.sm90a.t8x64.c1x1.bf16-bf16.cubin", "fc2.sm90a.t8x64.c1x1.bf16-bf16.cubin"]


def test_list_show_and_verify(site: Path) -> None:
    done = run(site, COMMAND, "list", "--json")
    assert done.returncode == 0, done.stderr
    keys = [each["key"] for each in json.loads(done.stdout)]
    assert keys == [each.variant.key for each in matrix.load().profile("quick")]
    assert run(site, COMMAND, "show", keys[0]).returncode == 0
    done = run(site, COMMAND, "verify", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] == len(keys)


def test_check_and_coverage(site: Path) -> None:
    done = run(site, COMMAND, "check", "--device-profile", "h200", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["arch"] == "sm_90a"
    assert run(site, COMMAND, "coverage", "qwen3-30b-a3b", "--m", "4").returncode == 0
    assert run(site, COMMAND, "explain", "fc1", "--m", "4", "--experts", "8", "--hidden", "256", "--intermediate", "128").returncode == 0


@pytest.mark.parametrize("command", ["build", "lock", "list --profile quick"])
def test_what_needs_the_compiler_names_the_extra(site: Path, command: str) -> None:
    """Without the guard, whose refusal would hide it: the modules are simply not there."""
    done = run(site, COMMAND.replace("import guard; ", ""), *command.split())
    assert done.returncode == 3, done.stderr
    assert "install densemoe[build]" in done.stderr
