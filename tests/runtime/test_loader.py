"""Artifact roots, loading and Plans on a driver that exists only in Python: what is checked before anything is loaded or launched."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exporter import Exporter
from fake_driver import FakeDriver

from densemoe.runtime import cli
from densemoe.runtime import loader as loading
from densemoe.runtime.errors import (
    AbiMismatch,
    ArchitectureMismatch,
    ArtifactCorrupt,
    ArtifactNotFound,
    DriverError,
    DriverTooOld,
    ManifestError,
    PlanError,
    ProblemError,
    SelectionError,
)
from densemoe.runtime.loader import ArtifactSet, Loader
from densemoe.runtime.problem import Problem
from densemoe.runtime.proof import BLOCK

FC1 = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
FC2 = "fc2.sm90a.t8x64.c1x1.bf16-bf16"
PROBLEM = Problem("fc1", 5, 2, 256, 128)


def tensors(driver: FakeDriver, problem: Problem = PROBLEM) -> dict[str, Any]:
    found: dict[str, Any] = {role: driver.allocate(spec.nbytes) for role, spec in problem.tensors().items()}
    return {**found, "b": driver.allocate(1 << 22)}


def open_with(root: Path, **driver: Any) -> tuple[Loader, FakeDriver]:
    fake = FakeDriver(**driver)
    return Loader(root, fake), fake  # type: ignore[arg-type]


def test_what_is_rehearsed_at_import_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the package is imported from an archive."""
    monkeypatch.setattr(loading, "__file__", "/no such folder/loader.py")
    loading._rehearse()


# ---- roots


def test_an_explicit_path_wins_over_the_environment(artifacts: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DENSEMOE_ARTIFACTS", str(tmp_path))
    assert ArtifactSet(artifacts).root == artifacts
    with pytest.raises(ArtifactNotFound, match="DENSEMOE_ARTIFACTS has no artifacts"):
        ArtifactSet()
    monkeypatch.setenv("DENSEMOE_ARTIFACTS", str(artifacts))
    assert ArtifactSet().root == artifacts


def test_a_device_without_a_set_is_told_both_sides(artifacts: Path) -> None:
    loader, _ = open_with(artifacts, capabilities=((8, 0),))
    with pytest.raises(ArchitectureMismatch, match=r"8\.0.*sm_90a"):
        loader.kernel(FC1, 0)


def test_an_old_driver_is_refused_before_anything_is_loaded(artifacts: Path) -> None:
    loader, driver = open_with(artifacts, version=12080)
    with pytest.raises(DriverTooOld, match=r"supports CUDA 12\.8.*need.*13\.0"):
        loader.kernel(FC1, 0)
    assert driver.loads == []


# ---- files


def test_a_truncated_cubin_is_refused(artifacts_copy: Path) -> None:
    path = artifacts_copy / "sm_90a" / f"{FC1}.cubin"
    path.write_bytes(path.read_bytes()[:-1])
    loader, driver = open_with(artifacts_copy)
    with pytest.raises(ArtifactCorrupt, match="truncated"):
        loader.kernel(FC1, 0)
    assert driver.loads == []


def test_a_changed_cubin_is_refused(artifacts_copy: Path) -> None:
    path = artifacts_copy / "sm_90a" / f"{FC1}.cubin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    loader, _ = open_with(artifacts_copy)
    with pytest.raises(ArtifactCorrupt, match="sha256"):
        loader.kernel(FC1, 0)


def test_a_missing_cubin_is_refused(artifacts_copy: Path) -> None:
    (artifacts_copy / "sm_90a" / f"{FC1}.cubin").unlink()
    loader, _ = open_with(artifacts_copy)
    with pytest.raises(ArtifactNotFound, match="does not exist"):
        loader.kernel(FC1, 0)


def test_a_symbolic_link_is_not_followed(artifacts_copy: Path, tmp_path: Path) -> None:
    path = artifacts_copy / "sm_90a" / f"{FC1}.cubin"
    shutil.copy(path, tmp_path / "elsewhere")
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    loader, _ = open_with(artifacts_copy)
    with pytest.raises(ManifestError, match="symbolic links"):
        loader.kernel(FC1, 0)


def test_a_manifest_that_the_index_does_not_name_is_refused(artifacts_copy: Path) -> None:
    path = artifacts_copy / "sm_90a" / "manifest.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ArtifactCorrupt, match="not the manifest"):
        ArtifactSet(artifacts_copy).manifest("sm_90a")


def test_a_byte_of_a_manifest_that_changed_is_found_when_it_is_used(artifacts_copy: Path) -> None:
    """Bytes are compared with the index by blocks: the entry that is asked for, whichever byte of it changed, and the list of all."""
    path = artifacts_copy / "sm_90a" / "manifest.json"
    data = path.read_bytes()
    start = data.index(b'\n"%s":' % FC1.encode(), data.index(b'"variants"'))
    for at in (start, start + 1, start + 3, data.index(b'"sha256":"', start) + 12, data.index(b"\n", start + 1)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ArtifactCorrupt, match="not the manifest"):
            ArtifactSet(artifacts_copy).manifest("sm_90a").variants[FC1]
    with pytest.raises(ArtifactCorrupt, match="not the manifest"):
        sorted(ArtifactSet(artifacts_copy).manifest("sm_90a").variants)


def test_a_changed_byte_elsewhere_is_found_by_whoever_lists_the_kernels(artifacts_copy: Path) -> None:
    """A kernel by its key needs the blocks of its line alone; a choice among all needs them all."""
    path = artifacts_copy / "sm_90a" / "manifest.json"
    data = path.read_bytes()
    first = next(iter(ArtifactSet(artifacts_copy).manifest("sm_90a").variants))
    last = list(ArtifactSet(artifacts_copy).manifest("sm_90a").variants)[-1]
    near = data.index(b'\n"%s":' % first.encode())
    far = data.index(b'\n"%s":' % last.encode())
    assert far // BLOCK > data.index(b"\n", near + 1) // BLOCK  # they share no block
    path.write_bytes(data[: far + 9] + b"#" + data[far + 10 :])
    manifest = ArtifactSet(artifacts_copy).manifest("sm_90a")
    assert manifest.variants[first].key == first
    variants = manifest.variants
    for asked in (lambda: len(variants), lambda: variants[last], lambda: variants.get("fc9"), lambda: list(variants)):
        with pytest.raises(ArtifactCorrupt, match="not the manifest"):
            asked()
    with pytest.raises(ArtifactCorrupt, match="not the manifest"):
        Loader(artifacts_copy, FakeDriver()).select(Problem("fc1", 4, 8, 512, 256), 0)


@pytest.mark.parametrize(
    ("member", "value", "said"),
    [("size", 5, "belong to each 8192 bytes of a manifest of 5"), ("blocks", "00", "2 digits; 64 belong")],
)
def test_blocks_that_do_not_fit_their_manifest_are_refused(artifacts_copy: Path, member: str, value: object, said: str) -> None:
    path = artifacts_copy / "index.json"
    document = json.loads(path.read_text())
    document["sets"][0][member] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ManifestError, match=said):
        ArtifactSet(artifacts_copy)


def test_an_index_whose_digests_disagree_is_no_sound_set(artifacts_copy: Path) -> None:
    """sha256 of the whole and of the blocks say the same, or `densemoe verify` does not pass."""
    path = artifacts_copy / "index.json"
    document = json.loads(path.read_text())
    document["sets"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(document))
    assert FC1 in ArtifactSet(artifacts_copy).manifest("sm_90a").variants  # each block is what the index says
    assert cli.main(["verify", "--artifacts", str(artifacts_copy)]) == 1


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 99, "sets": []}', b'{"schema": true, "sets": []}'])
def test_an_index_that_is_none_is_refused(artifacts_copy: Path, data: bytes) -> None:
    (artifacts_copy / "index.json").write_bytes(data)
    with pytest.raises(ManifestError):
        ArtifactSet(artifacts_copy)


def test_an_index_may_not_point_elsewhere(artifacts_copy: Path) -> None:
    path = artifacts_copy / "index.json"
    document = json.loads(path.read_text())
    document["sets"][0]["manifest"] = "../sm_90a/manifest.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="belongs to sm_90a"):
        ArtifactSet(artifacts_copy)


# ---- loading


def test_a_parameter_block_that_differs_is_refused_and_unloaded(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    driver.change_parameters = lambda found: (*found[:-1], (found[-1][0] + 4, 4))
    with pytest.raises(AbiMismatch, match="the driver sees parameters"):
        loader.kernel(FC1, 0)
    assert driver.loads[-1].startswith("unload")


def test_threads_load_a_kernel_once(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    threads = [threading.Thread(target=loader.kernel, args=(FC1, 0)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert driver.loads == [f"{FC1}.cubin"]
    assert len(driver.prepared) == 1


class ThreadedDriver(FakeDriver):
    """Gives addresses that no two threads share, and lets other threads run in the middle of every slow call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lock = threading.Lock()

    def load(self, image: bytes, *, file: str, arch: str, ordinal: int) -> Any:
        time.sleep(0.002)
        return super().load(image, file=file, arch=arch, ordinal=ordinal)

    def prepare(self, kernel: Any, ordinal: int, dynamic_smem: int, carveout: int) -> None:
        time.sleep(0.001)
        super().prepare(kernel, ordinal, dynamic_smem, carveout)

    def allocate(self, nbytes: int) -> int:
        with self.lock:
            return super().allocate(nbytes)


def test_a_relative_root_stays_where_it_was(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Manifests and cubins are read when they are needed, by then a daemon may have changed its folder."""
    monkeypatch.chdir(artifacts.parent)
    loader, _ = open_with(Path(artifacts.name))
    monkeypatch.chdir(tmp_path)
    assert loader.kernel(FC1, 0).entry.key == FC1
    assert loader.artifacts.root == artifacts


def test_a_kernel_that_another_device_has_is_refused_all_the_same(artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, driver = open_with(artifacts, capabilities=((9, 0), (10, 0)))
    sets = [loader.manifest(0), SimpleNamespace(arch="sm_100f", variants={})]
    monkeypatch.setattr(loader, "manifest", lambda device: sets[device])
    loader.preload([FC1], 0)
    with pytest.raises(SelectionError, match="is not in the sm_100f set"):
        loader.preload([FC1], 1)
    assert [ordinal for _, ordinal, _, _ in driver.prepared] == [0]


def test_a_closed_plan_keeps_nobody_s_memory(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    lent = Exporter(shape=(PROBLEM.m, PROBLEM.hidden), strides=(PROBLEM.hidden, 1))
    plan = loader.plan(PROBLEM, {**tensors(driver), "a": lent}, 0)
    assert lent.released == 0
    plan.close()
    gc.collect()
    assert lent.released == 1
    with pytest.raises(PlanError, match="is closed"):
        plan.feeds(plan)


def test_threads_and_devices_share_a_loader(artifacts: Path) -> None:
    """Eight threads on two devices, from opening the set to closing Plans: each kernel is loaded once, prepared once a device, and every launch
    has its own thread's tensors."""
    driver = ThreadedDriver(capabilities=((9, 0), (9, 0)))
    loader = Loader(artifacts, driver)  # type: ignore[arg-type]
    problems = (PROBLEM, Problem("fc2", 5, 2, 256, 128))
    start, faults = threading.Barrier(8), []
    wanted: dict[int, tuple[str, int]] = {}  # stream → (variant, address of a)

    def work(number: int) -> None:
        try:
            start.wait()
            for turn in range(12):
                problem, stream = problems[(number + turn) % 2], 100 * (number + 1) + turn
                given = tensors(driver, problem)
                with loader.plan(problem, given, number % 2) as plan:
                    assert loader.kernel(plan.key, number % 2).entry is plan.entry
                    plan.launch(stream)
                    plan.update("a", given["a"] + 256)
                    plan.launch(-stream)
                wanted[stream], wanted[-stream] = (plan.key, given["a"]), (plan.key, given["a"] + 256)
        except BaseException as error:
            faults.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert faults == []
    assert sorted(driver.loads) == [f"{FC1}.cubin", f"{FC2}.cubin"]
    assert sorted((kernel.symbol, ordinal) for kernel, ordinal, _, _ in driver.prepared) == sorted(
        (loader.manifest(0).variants[key].symbol, ordinal) for key in (FC1, FC2) for ordinal in (0, 1)
    )
    assert {stream: int.from_bytes(block[:8], "little") for _, stream, block in driver.launches} == {s: a for s, (_, a) in wanted.items()}
    assert len(driver.launches) == 8 * 12 * 2


def test_a_device_without_a_set_beside_one_that_has_one(artifacts: Path) -> None:
    """It is refused, and the other goes on."""
    loader, driver = open_with(artifacts, capabilities=((9, 0), (10, 0)))
    assert loader.manifest(0).arch == "sm_90a"
    with pytest.raises(ArchitectureMismatch, match=r"compute capability 10\.0; .* has sets for sm_90a"):
        loader.kernel(FC1, 1)
    loader.preload([FC1, FC2], 0)
    loader.preload([FC2], 0)  # loaded already: nothing happens
    assert driver.loads == [f"{FC1}.cubin", f"{FC2}.cubin"]
    with pytest.raises(SelectionError, match=r"fc1\.sm90a\.t9x9.*`densemoe list` shows what is"):
        loader.preload(["fc1.sm90a.t9x9.c1x1.bf16-bf16"], 0)


def test_every_device_gets_its_attributes(artifacts: Path) -> None:
    loader, driver = open_with(artifacts, capabilities=((9, 0), (9, 0)))
    loader.preload([FC1, FC2], 0)
    loader.preload([FC1, FC2], 1)
    assert len(driver.loads) == 2
    assert sorted(ordinal for _, ordinal, _, _ in driver.prepared) == [0, 0, 1, 1]


def _child(loader: Loader, answers: Any) -> None:
    try:
        loader.kernel(FC1, 0)
        answers.put("loaded")
    except DriverError as error:
        answers.put(str(error))


def test_a_forked_child_is_told_so(artifacts: Path) -> None:
    loader, _ = open_with(artifacts)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_child, args=(loader, answers))
    child.start()
    assert f"fork {child.pid}" in answers.get(timeout=30)
    child.join()


# ---- plans


def test_a_plan_packs_and_launches(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    given = tensors(driver)
    with loader.plan(PROBLEM, given, 0) as plan:
        assert plan.key == FC1
        plan.launch(7)
    (config, stream, block) = driver.launches[0]
    assert stream == 7
    entry = loader.manifest(0).variants[FC1]
    assert config == ((2, 1, 1), (128, 1, 1), (1, 1, 1), entry.dynamic_smem, True)  # 2 experts x 4 column blocks, 4 warps a CTA
    stated = zip(entry.recipe.parameters, entry.parameters, strict=True)
    packed = {parameter.name: int.from_bytes(block[offset : offset + size], "little") for parameter, (offset, size) in stated}
    wanted = {"a": given["a"], "b": given["b"], "alpha": given["alpha"], "c": given["c"], "alpha_post": 0}
    shape = {"tokens_total": 5, "experts": 2, "hidden": 256, "intermediate": 128}
    assert {name: packed[name] for name in (*wanted, *shape)} == {**wanted, **shape}


def test_workspaces_are_zeroed_and_freed(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    problem = Problem("fc2", 5, 2, 256, 128)
    given = tensors(driver, problem)
    before = set(driver.memory)
    with loader.plan(problem, given, 0) as plan:
        owned = {pointer: driver.memory[pointer] for pointer in set(driver.memory) - before}
        stated = plan.entry.recipe.workspaces
        assert len(owned) == len(stated) == 1
        assert len(driver.zeroed) == sum(each.zeroed for each in stated) >= 1
        assert all(owned[pointer] == nbytes for pointer, nbytes in driver.zeroed)  # the whole of each
    assert set(driver.memory) == before


def test_a_closed_plan_does_not_launch(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    plan = loader.plan(PROBLEM, tensors(driver), 0)
    plan.close()
    plan.close()
    with pytest.raises(PlanError, match="closed"):
        plan.launch()
    with pytest.raises(PlanError, match="closed"):
        plan.update("a", 4096)
    assert driver.launches == []


def test_m_zero_launches_nothing(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    problem = Problem("fc1", 0, 2, 256, 128)
    with loader.plan(problem, dict.fromkeys((*problem.tensors(), "b"), 0) | tensors(driver, problem), 0) as plan:
        plan.launch()
    assert driver.launches == []


def test_update_repoints_without_a_new_plan(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    with loader.plan(PROBLEM, tensors(driver), 0) as plan:
        other = driver.allocate(1 << 16)
        plan.update("a", other)
        plan.launch()
    assert int.from_bytes(driver.launches[0][2][:8], "little") == other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": None}, "give a device tensor"),
        ({"a": "text"}, "no device memory"),
        ({"a": 4097}, "not aligned to 16"),
        ({"a": 0}, "give device memory"),
        ({"alpha": 0}, "give device memory"),
        ({"surplus": 4096}, "not part of this problem"),
        ({"c": "same as a"}, "overlaps a"),
    ],
)
def test_bad_tensors_are_refused_before_a_launch(artifacts: Path, change: dict[str, Any], said: str) -> None:
    loader, driver = open_with(artifacts)
    given = tensors(driver)
    given.update({role: given["a"] if value == "same as a" else value for role, value in change.items()})
    with pytest.raises(ProblemError, match=said):
        loader.plan(PROBLEM, given, 0)
    assert driver.launches == []


def test_a_missing_tensor_is_named(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    given = tensors(driver)
    del given["alpha"]
    with pytest.raises(ProblemError, match="'alpha' is missing"):
        loader.plan(PROBLEM, given, 0)


def test_a_tensor_of_another_device_is_refused(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    given = tensors(driver)
    driver.owners[given["alpha"]] = 1
    with pytest.raises(ProblemError, match="lies on device 1"):
        loader.plan(PROBLEM, given, 0)


class Interface:
    def __init__(self, **changes: Any) -> None:
        self.__cuda_array_interface__ = {"shape": (5, 256), "typestr": "<u2", "data": (1 << 16, False), "version": 3, **changes}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (Interface(shape=(5, 255)), "use \\(5, 256\\)"),
        (Interface(typestr="<f4"), "typestr"),
        (Interface(strides=(1024, 2)), "contiguous"),
        (Interface(data=((1 << 16) + 2, False)), "aligned"),
    ],
)
def test_an_array_interface_is_checked(artifacts: Path, value: Interface, said: str) -> None:
    loader, driver = open_with(artifacts)
    with pytest.raises(ProblemError, match=said):
        loader.plan(PROBLEM, {**tensors(driver), "a": value}, 0)
    loader.plan(PROBLEM, {**tensors(driver), "a": Interface(strides=(512, 2))}, 0).close()


def test_forcing_a_variant_is_checked(artifacts: Path) -> None:
    loader, driver = open_with(artifacts)
    with pytest.raises(SelectionError, match="cannot run this problem"):
        loader.plan(PROBLEM, tensors(driver), 0, FC2)
    with pytest.raises(SelectionError, match="not in the artifact set"):
        loader.plan(PROBLEM, tensors(driver), 0, "fc1.sm90a.t16x64.c1x1.bf16-f16")


def test_selection_never_falls_back(artifacts: Path) -> None:
    """The quick profile has tiles of 8 tokens only: a larger M is refused with what to do, not run by something else."""
    loader, _ = open_with(artifacts)
    with pytest.raises(SelectionError, match=r"tile 32x64.*which no installed variant has.*name one of"):
        loader.select(Problem("fc1", 37, 2, 256, 128), 0)


# ---- imports


def test_the_launch_path_needs_neither_compiler_nor_numpy(artifacts: Path) -> None:
    """Blocks those imports, subprocesses and sockets in a fresh interpreter, and runs loader and launch on the fake driver."""
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "torch", "yaml", "cutlass", "ml_dtypes", "rich") or name.startswith("densemoe.compile"):
            raise ImportError("blocked " + name)
sys.meta_path.insert(0, Block())
def audit(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "socket.connect", "os.exec", "os.posix_spawn"):
        raise RuntimeError("blocked " + event)
sys.addaudithook(audit)
import types
elf = types.ModuleType("densemoe.compile.elf")
from densemoe.runtime.loader import ArtifactSet, Loader
from densemoe.runtime.problem import Problem
class Driver:
    def __getattr__(self, name):
        return lambda *a, **k: None
    def capability(self, o): return (9, 0)
    def version(self): return 13000
    def sm_count(self, o): return 132
    def allocate(self, n): return 1 << 20
    def pointer_device(self, p): return None
    def launcher(self, prepared): return lambda stream: print("launched", stream)
loader = Loader(ArtifactSet({str(artifacts)!r}), Driver())
entry = loader.artifacts.manifest("sm_90a").variants[{FC1!r}]
Driver.parameters = lambda self, k: entry.parameters
problem = Problem("fc1", 5, 2, 256, 128)
at = {{role: (i + 1) << 24 for i, role in enumerate((*problem.tensors(), "b"))}}
loader.plan(problem, at, 0).launch(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "launched 3\n"
