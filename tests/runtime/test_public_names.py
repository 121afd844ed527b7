"""The public names: found lazily, seen by type checkers, the same in ``densemoe`` and ``densemoe.runtime``."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import densemoe
import densemoe.runtime
from densemoe.runtime import errors


def python(code: str) -> str:
    """Standard output of a fresh interpreter; fails with its standard error."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    """Neither heavy packages nor the runtime's own modules: a launch pays for what it uses."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "torch", "yaml", "cutlass", "cuda", "ml_dtypes", "rich", "jsonschema"):
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Block())
import densemoe.runtime
print(sorted(name for name in sys.modules if name.startswith("densemoe.runtime.")))
"""
    assert python(code).strip() == "[]"


def test_a_name_is_imported_on_first_use() -> None:
    code = """
import sys
import densemoe.runtime
loader = densemoe.runtime.Loader
assert "densemoe.runtime.loader" in sys.modules
assert "numpy" not in sys.modules and "cuda.bindings" not in sys.modules and "torch" not in sys.modules
assert densemoe.runtime.__dict__["Loader"] is loader
print(loader.__name__)
"""
    assert python(code).strip() == "Loader"


def test_the_top_package_imports_nothing_and_has_the_same_names() -> None:
    code = """
import sys
import densemoe
assert "densemoe.runtime" not in sys.modules
from densemoe import Loader, Problem
import densemoe.runtime
assert densemoe.__all__ == densemoe.runtime.__all__
assert Loader is densemoe.runtime.Loader
scope = {}
exec("from densemoe import *", scope)
print(set(densemoe.__all__) <= set(scope))
"""
    assert python(code).strip() == "True"


@pytest.mark.parametrize("package", [densemoe, densemoe.runtime])
def test_every_name_resolves_and_is_listed(package: object) -> None:
    for name in densemoe.runtime.__all__:
        assert getattr(package, name).__name__ == name
        assert name in dir(package)


@pytest.mark.parametrize("package", [densemoe, densemoe.runtime])
def test_an_unknown_name_is_an_attribute_error(package: object) -> None:
    with pytest.raises(AttributeError, match="no attribute 'Loder'"):
        _ = package.Loder  # type: ignore[attr-defined]
    assert not hasattr(package, "__wrapped__")


def test_type_checkers_see_the_same_names() -> None:
    """The TYPE_CHECKING block imports exactly __all__, from the modules that the lazy table names."""
    tree = ast.parse(inspect.getsource(densemoe.runtime))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == sorted(densemoe.runtime.__all__)
    for name, module in seen.items():
        assert getattr(densemoe.runtime, name).__module__ == module


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(densemoe.runtime.__all__)


def test_no_public_name_is_that_of_a_module() -> None:
    """A submodule, once imported, would replace the name."""
    from importlib import resources

    modules = {path.name.removesuffix(".py") for path in resources.files("densemoe.runtime").iterdir()}
    assert not modules & set(densemoe.runtime.__all__)
