"""Bytes that come out again: under another path, seed, order, locale, driver and Python; and every known source of drift, caused and named.

Compilers run in processes of their own, as the DSL reads its environment once: a few seconds each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from densemoe.compile import drift, environment, reproduction
from densemoe.compile.reproduction import Outcome, Reference, Variation
from densemoe.runtime import cli
from densemoe.runtime.lock import Lock

ROOT = Path(__file__).resolve().parents[2]
FC1 = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
FC2 = "fc2.sm90a.t8x64.c1x1.bf16-bf16"
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(scope="module")
def expected(artifacts: Path) -> Reference:
    return reproduction.reference(artifacts, Lock.read())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reproduction.copy_sources(ROOT, tmp_path_factory.mktemp("sources") / "with a space" / "tree")


def run(tree: Path, expected: Reference, out: Path, keys: tuple[str, ...] = (FC1,), **changes: Any) -> Outcome:
    variation = Variation("test", Path(sys.executable), **changes)
    facts = reproduction.rebuild(tree, variation, keys, "full", out)
    return reproduction.judge(expected, variation, keys, facts, out)


def assert_equal(outcome: Outcome, keys: tuple[str, ...] = (FC1,)) -> None:
    assert (sorted(outcome.equal), outcome.different, outcome.errors) == (sorted(keys), [], {})


# ---- what must not change a byte


def test_another_path_seed_order_locale_zone_and_home(tree: Path, expected: Reference, tmp_path: Path) -> None:
    changes = {"PYTHONHASHSEED": "4242", "LC_ALL": "C", "TZ": "Asia/Kathmandu", "HOME": "/nonexistent"}
    assert_equal(run(tree, expected, tmp_path / "out", (FC1, FC2), changes=changes, reverse=True), (FC1, FC2))


@pytest.mark.parametrize("version", [reproduction.OLD_DRIVER, reproduction.NEW_DRIVER])
def test_the_build_hosts_driver(tree: Path, expected: Reference, tmp_path: Path, version: int) -> None:
    """The DSL takes the compiler that fits the driver it finds; ours must not follow it."""
    folder = reproduction.fake_driver(tmp_path / "driver", version)
    if folder is None:
        pytest.skip("a driver that says another version is compiled, and there is no C compiler")
    said = "import ctypes; v = ctypes.c_int(); ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(v)); print(v.value)"
    environment_variables = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", said], env=environment_variables, capture_output=True, text=True, check=True)
    assert int(done.stdout) == version
    assert_equal(run(tree, expected, tmp_path / "out", changes={"LD_LIBRARY_PATH": str(folder)}))


@pytest.mark.parametrize("setting", ["LINEINFO=1", "COMPILER_OPT=opt-level=0", "DRYRUN=1", "ARCH=sm_100a", "LIBS=/nonexistent"])
def test_settings_of_the_compiler_in_the_callers_environment(tree: Path, expected: Reference, tmp_path: Path, setting: str) -> None:
    """Left there by someone who was debugging a kernel: they reach no cubin."""
    name, _, value = setting.partition("=")
    assert_equal(run(tree, expected, tmp_path / "out", changes={f"CUTE_DSL_{name}": value}))


@pytest.mark.full
@pytest.mark.parametrize("version", sorted(environment.interpreters()))
def test_a_fresh_environment_of_every_installed_python(expected: Reference, tmp_path: Path, version: str) -> None:
    pythons = {version: environment.interpreters()[version]}
    outcomes = list(reproduction.reproduce(expected, [FC1, FC2], pythons=pythons))
    assert len(outcomes) == 3
    for outcome in outcomes:
        assert_equal(outcome, (FC1, FC2))


@pytest.mark.full
def test_another_user(tree: Path, expected: Reference, tmp_path: Path) -> None:
    user = reproduction.other_user(Path(sys.executable), tree)
    if user:
        assert_equal(run(tree, expected, tmp_path / "out", user=user))


# ---- what does change bytes: each source of drift, alone

#: Runs before the rebuild, in its process.
SETUP = {
    "toolchain": """
import contextlib
from densemoe.compile import kernels, toolchain
kernels._no_driver = contextlib.nullcontext
toolchain.PINNED_FLAVOUR, toolchain.PINNED_PTXAS = "cu12", ""  # its cubins do not name their ptxas
""",
    "settings": """
from densemoe.compile import kernels
kernels._own_settings = lambda: None
""",
    "symbol": """
from densemoe.runtime.variant import Variant
Variant.symbol = property(lambda self: "kernel_cutlass_" + self.op + "_0")
""",
    "flags": """
import dataclasses
from densemoe.compile import matrix
load = matrix.load
def changed(*arguments):
    found = load(*arguments)
    return dataclasses.replace(found, profiles={
        name: tuple(dataclasses.replace(each, compiler_options="--opt-level 2") for each in planned) for name, planned in found.profiles.items()})
matrix.load = changed
""",
    "environment": """
from densemoe.compile import toolchain
compile_variant = toolchain.compile_variant
import dataclasses
def changed(*arguments, **options):
    found = compile_variant(*arguments, **options)
    at = found.cubin.index(b"\\x7fELF") + len(found.cubin) // 2
    return dataclasses.replace(found, cubin=found.cubin[:at] + bytes([found.cubin[at] ^ 1]) + found.cubin[at + 1 :])
toolchain.compile_variant = changed
""",
}

PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, {compile!r})
import rebuild
rebuild.use_this_tree()
{setup}
out = Path({out!r})
(out / "facts.json").write_text(json.dumps(rebuild.rebuild([{key!r}], "full", out)))
"""


def drifted(tree: Path, expected: Reference, out: Path, setup: str, **variables: str) -> tuple[list[str], str]:
    """Sections and cause of the one cubin, rebuilt with ``setup`` in force."""
    out.mkdir()
    program = PROGRAM.format(compile=str(tree / "compile"), setup=setup, out=str(out), key=FC1)
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=False, cwd="/")
    assert not done.returncode, done.stderr
    facts = json.loads((out / "facts.json").read_text())
    outcome = reproduction.judge(expected, Variation("drift", Path(sys.executable)), [FC1], facts, out)
    assert outcome.errors == {}
    ((key, sections, cause),) = outcome.different
    assert key == FC1
    return sections, cause


def test_drift_by_the_driver_that_chooses_the_compiler(tree: Path, expected: Reference, tmp_path: Path) -> None:
    """Without our guard an old driver gives the CUDA 12 compiler: other bytes from the same packages."""
    folder = reproduction.fake_driver(tmp_path / "driver", reproduction.OLD_DRIVER)
    sections, cause = drifted(tree, expected, tmp_path / "out", SETUP["toolchain"], LD_LIBRARY_PATH=str(folder))
    assert ".text.<kernel>" in sections
    assert cause.startswith("toolchain: assembled by Cuda compilation tools, release 13.4")
    assert cause.endswith("(CUDA 12)")


def test_the_guard_refuses_the_other_compiler(tree: Path, expected: Reference, tmp_path: Path) -> None:
    """Even where the driver was seen, because cutlass was imported before, nothing is built in silence."""
    folder = reproduction.fake_driver(tmp_path / "driver", reproduction.OLD_DRIVER)
    unguarded = "import contextlib\nfrom densemoe.compile import kernels\nkernels._no_driver = contextlib.nullcontext\n"
    out = tmp_path / "out"
    out.mkdir()
    program = PROGRAM.format(compile=str(tree / "compile"), setup=unguarded, out=str(out), key=FC1)
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "LD_LIBRARY_PATH": str(folder)}, check=True, cwd="/")
    facts = json.loads((out / "facts.json").read_text())
    assert "cu12 libraries, cu13 are pinned" in facts["errors"][FC1]
    assert not list(out.glob("*.cubin"))


def test_drift_by_settings_of_the_compiler(tree: Path, expected: Reference, tmp_path: Path) -> None:
    """Without our guard a variable of the shell changes every cubin."""
    sections, cause = drifted(tree, expected, tmp_path / "out", SETUP["settings"], CUTE_DSL_LINEINFO="1", CUTE_DSL_ARCH="sm_90a")
    assert any(name.startswith(".debug_line") for name in sections)
    assert cause.endswith("gave other PTX: the DSL read something of this machine, such as a CUTE_DSL_ variable")


def test_drift_by_the_symbol(tree: Path, expected: Reference, tmp_path: Path) -> None:
    _, cause = drifted(tree, expected, tmp_path / "out", SETUP["symbol"])
    assert cause.startswith("symbol: densemoe_fc1_sm90a_t8x64_c1x1_bf16_bf16_0 and kernel_cutlass_fc1_0")


def test_drift_by_flags(tree: Path, expected: Reference, tmp_path: Path) -> None:
    sections, cause = drifted(tree, expected, tmp_path / "out", SETUP["flags"])
    assert ".note.nv.tkinfo" in sections
    assert cause == "flags: ptxas was called with '-O 3 -arch sm_90a' and with '-O 2 -arch sm_90a'"


def test_drift_by_the_source(expected: Reference, tmp_path: Path) -> None:
    changed = reproduction.copy_sources(ROOT, tmp_path / "tree")
    kernel = changed / "compile" / "kernels" / "sm90_fc1.py"
    kernel.write_text(kernel.read_text() + "\n# one line more\n")
    outcome = run(changed, expected, tmp_path / "same")
    assert_equal(outcome)  # a comment changes no byte, and is no difference
    image = (tmp_path / "same" / f"{FC1}.cubin").read_bytes()
    side = expected.sides[FC1]
    _, cause = drift.explain(side, drift.Side("other", image, side.ptx, side.toolchain, {"sm90_fc1": "0" * 64}, None))
    assert cause == "source: compile/kernels/sm90_fc1.py or what it imports changed"


def test_drift_by_the_machine(tree: Path, expected: Reference, tmp_path: Path) -> None:
    sections, cause = drifted(tree, expected, tmp_path / "out", SETUP["environment"])
    assert sections
    assert cause.startswith("environment: equal PTX, flags and version")


def test_two_processes_do_not_get_each_others_ptx(tree: Path, expected: Reference, tmp_path: Path) -> None:
    """The DSL reads PTX back from a dump directory under a name that ignores constant parameters; each compile has a directory of its own."""
    processes = []
    for name, keys in (("a", [FC1, FC2]), ("b", [FC2, FC1])):
        (tmp_path / name).mkdir()
        command = [sys.executable, str(tree / "compile" / "rebuild.py"), str(tmp_path / name)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=tmp_path)
        assert process.stdin is not None
        process.stdin.write(json.dumps({"keys": keys, "profile": "full"}))
        process.stdin.close()
        processes.append(process)
    assert [process.wait(120) for process in processes] == [0, 0]
    for key in (FC1, FC2):
        a, b = ((tmp_path / name / f"{key}.ptx").read_bytes() for name in ("a", "b"))
        assert a == b
        assert drift.short_digest(a) == expected.sides[key].ptx


# ---- the causes, without a compiler


def test_the_order_of_causes(expected: Reference) -> None:
    """A changed toolchain explains everything below it, so it is named first; without images, what the lock knows decides."""
    side = dataclasses.replace(expected.sides[FC1], image=None, options="")
    other = dataclasses.replace(side, sha256="other")

    def cause(**changes: Any) -> str:
        return drift.explain(side, dataclasses.replace(other, **changes))[1]

    assert cause(toolchain={"nvidia-cutlass-dsl": "5"}, ptx="x").startswith("toolchain: nvidia-cutlass-dsl 4.8.1 -> 5")
    assert cause(options="-x", ptx="x") == "flags: compiler options '' and '-x'"
    assert cause(kernels={"sm90_fc1": "f" * 16}, ptx="x").startswith("source: compile/kernels/sm90_fc1.py")
    assert "other PTX" in cause(ptx="x")
    assert "equal PTX" in cause()
    damaged = [dataclasses.replace(each, image=b"no cubin") for each in (side, other)]
    assert drift.explain(damaged[0], damaged[1])[1].startswith("file: not a cubin")


def test_a_sample_is_spread_and_stable() -> None:
    keys = [f"k{number:02}" for number in range(20)]
    assert reproduction.sample(keys, 4) == ["k00", "k05", "k10", "k15"]
    assert reproduction.sample(list(reversed(keys)), 4) == reproduction.sample(keys, 4)
    assert reproduction.sample(keys, 0) == reproduction.sample(keys, 99) == keys


def test_what_cannot_be_varied_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    found = list(reproduction.variations({"3.11": Path("a"), "3.12": Path("b")}, {12090: None, 14000: tmp_path}, "", said.append))
    assert [each.name.split(",")[0] for each in found] == ["path", "driver for CUDA 14.0", "Python 3.12 instead of 3.11"]
    assert len(said) == 2
    assert said[0].startswith("user: not varied")
    assert said[1].startswith("driver for CUDA 12.9: not varied")


def test_a_rebuild_that_fails_is_not_a_pass(expected: Reference, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = reproduction.judge(expected, Variation("x", Path("/none")), [FC1], {"errors": {}}, tmp_path)
    assert outcome.errors == {FC1: "nothing came out"}
    facts = reproduction.rebuild(tree, Variation("x", Path("/none/python")), [FC1], "full", tmp_path / "out")
    assert "FileNotFoundError" in facts["errors"][""]


def test_usage_errors(artifacts: Path, tmp_path: Path) -> None:
    assert cli.main(["reproduce", "--sample", "-1"]) == 2
    assert cli.main(["reproduce", "--python", "2.7"]) == 2
    assert cli.main(["reproduce", "--wheel", str(tmp_path / "none.whl")]) == 3
