"""Builds: incremental by content, whole or not at all, faults named. Real compiles of a small matrix; two variants take about a second."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from densemoe.compile import audit, build, elf, kernels, matrix, toolchain
from densemoe.runtime import cli
from densemoe.runtime.errors import AuditError, BuildError, MatrixError, ToolchainError
from densemoe.runtime.folder import LOCK_NAME
from densemoe.runtime.loader import ArtifactSet
from densemoe.runtime.variant import Variant

KEYS = ("fc1.sm90a.t8x64.c1x1.bf16-bf16", "fc2.sm90a.t8x64.c1x1.bf16-bf16")
SMALL = """\
schema: 1
entries:
  - {kernel: sm90_fc1, op: fc1, arch: [sm_90a], tile: [8x64], cluster: [1x1], a_dtype: [bf16], b_dtype: [nvfp4], c_dtype: [bf16]}
  - {kernel: sm90_fc2, op: fc2, arch: [sm_90a], tile: [8x64], cluster: [1x1], a_dtype: [bf16], b_dtype: [nvfp4], c_dtype: [bf16]}
profiles:
  full: {variants: 2}
"""


@pytest.fixture
def small(tmp_path: Path) -> matrix.Matrix:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return matrix.load(path)


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.suffix in (".cubin", ".json")}


def test_a_second_build_compiles_nothing_and_changes_nothing(small: matrix.Matrix, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = build.build(small, out)
    assert sorted(first.built) == sorted(KEYS)
    before = digest(out)
    second = build.build(small, out)
    assert second.built == []
    assert sorted(second.reused) == sorted(KEYS)
    assert digest(out) == before
    for arch in ArtifactSet(out).architectures:
        ArtifactSet(out).manifest(arch).check()


def test_two_builds_give_the_same_bytes(small: matrix.Matrix, tmp_path: Path) -> None:
    for name in ("one", "two"):
        build.build(small, tmp_path / name, jobs=1 if name == "one" else 2)
    one, two = (digest(tmp_path / name) for name in ("one", "two"))
    assert {name: value for name, value in one.items() if "log" not in name} == {name: value for name, value in two.items() if "log" not in name}


def test_a_damaged_cubin_is_built_again_and_orphans_go(artifacts_copy: Path, tmp_path: Path) -> None:
    folder = artifacts_copy / "sm_90a"
    (folder / f"{KEYS[0]}.cubin").write_bytes(b"damaged")
    (folder / "fc1.sm90a.t999x64.c1x1.bf16-bf16.cubin").write_bytes(b"orphan")
    result = build.build(matrix.load(), artifacts_copy, profile="quick")
    assert result.built == [KEYS[0]]
    assert result.removed == ["sm_90a/fc1.sm90a.t999x64.c1x1.bf16-bf16.cubin"]


def test_ptx_is_kept_of_what_is_compiled_now(artifacts_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte what the compiler gives, behind a line that says of which sources; it decides nothing."""
    (artifacts_copy / "sm_90a" / f"{KEYS[0]}.cubin").write_bytes(b"damaged")
    before = digest(artifacts_copy)
    texts = tmp_path / "a" / "ptx"
    assert cli.main(["build", "--profile", "quick", "--out", str(artifacts_copy), "--ptx", str(texts)]) == 0
    assert [path.name for path in texts.iterdir()] == [f"{KEYS[0]}.ptx"]
    head, text = (texts / f"{KEYS[0]}.ptx").read_text().split("\n", 1)
    (planned,) = (each for each in matrix.load().profile("quick") if each.variant.key == KEYS[0])
    assert head == build.ptx_head(build.source_digest(planned))
    assert text == toolchain.compile_variant(planned.variant, planned.kernel).ptx
    after = digest(artifacts_copy)
    assert {name for name in after if after[name] != before.get(name)} <= {f"sm_90a/{KEYS[0]}.cubin", "sm_90a/build_log.json"}


def test_a_removed_variant_leaves_the_set(small: matrix.Matrix, artifacts_copy: Path) -> None:
    result = build.build(small, artifacts_copy)
    assert sorted(result.reused) == sorted(KEYS)
    assert len(result.removed) == 9
    assert sorted(ArtifactSet(artifacts_copy).manifest("sm_90a").variants) == sorted(KEYS)


def test_the_set_of_an_architecture_that_left_the_matrix_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = "  - {kernel: sm90_quantize, op: quantize, arch: [ARCH], tile: 1x2048, cluster: 1x1, a_dtype: bf16, b_dtype: nvfp4, c_dtype: nvfp4}"
    path, out = tmp_path / "m.yaml", tmp_path / "out"

    def built(*arches: str, options: tuple[str, ...] = ()) -> str:
        path.write_text(f"schema: 1\nentries:\n{entry.replace('ARCH', ', '.join(arches))}\nprofiles:\n  full: {{variants: {len(arches)}}}\n")
        assert cli.main(["build", "--matrix", str(path), "--out", str(out), *options]) == 0
        return capsys.readouterr().out

    built("sm_90a", "sm_100f")
    assert ArtifactSet(out).architectures == ("sm_100f", "sm_90a")
    assert "0 removed" in built("sm_90a", options=("--arch", "sm_90a"))  # speaks of one architecture alone
    (out / "sm_100f" / "notes.txt").write_text("somebody's own")
    said = built("sm_90a")
    assert "removed sm_100f/quantize.sm100f.t1x2048.c1x1.bf16-nvfp4.cubin: its variant is no longer in the matrix" in said
    assert ArtifactSet(out).architectures == ("sm_90a",)
    assert [each.name for each in (out / "sm_100f").iterdir()] == ["notes.txt"]


def test_a_filter_keeps_the_rest_of_the_set(artifacts_copy: Path) -> None:
    before = sorted(ArtifactSet(artifacts_copy).manifest("sm_90a").variants)
    result = build.build(matrix.load(), artifacts_copy, profile="quick", key_filter="fc1.*bf16-bf16")
    assert result.reused == [KEYS[0]]
    assert sorted(ArtifactSet(artifacts_copy).manifest("sm_90a").variants) == before


def test_what_selects_nothing_is_an_error(small: matrix.Matrix, tmp_path: Path) -> None:
    with pytest.raises(MatrixError, match="matches none"):
        build.build(small, tmp_path / "out", key_filter="fc9*")
    with pytest.raises(MatrixError, match=r"sm_100a.*use one of sm_90a"):
        build.build(small, tmp_path / "out", arch="sm_100a")


def test_a_variant_that_fails_names_itself_and_the_rest_builds(small: matrix.Matrix, tmp_path: Path) -> None:
    """A limit of one second is too little for a worker's imports: every variant times out and says so; the old set stays."""
    out = tmp_path / "out"
    build.build(small, out)
    before = digest(out)
    (out / "sm_90a" / f"{KEYS[0]}.cubin").unlink()
    result = build.build(small, out, timeout=0.05)
    assert [failure.key for failure in result.failures] == [KEYS[0]]
    assert "not done after" in result.failures[0].error
    assert result.reused == [KEYS[1]]
    assert {name: value for name, value in digest(out).items() if name.endswith("json")} == {
        name: value for name, value in before.items() if name.endswith("json")
    }


def test_a_killed_build_is_completed_by_the_next(tmp_path: Path) -> None:
    """SIGKILL at several moments: never a set whose files differ from its manifest, and the next build completes it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "densemoe.runtime.cli", "build", "--profile", "quick", "--out", str(out), "--jobs", "2"]
    for seconds in (1.5, 2.5, 3.5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (out / "index.json").exists():
            found = ArtifactSet(out)
            for entry in found.manifest("sm_90a").variants.values():
                found.image(entry)
    result = build.build(matrix.load(), out, profile="quick")
    assert not result.failures
    found = ArtifactSet(out)
    assert len(found.manifest("sm_90a").variants) == 11
    for entry in found.manifest("sm_90a").variants.values():
        found.image(entry)
    assert not list(out.rglob("*.partial"))


def test_two_builds_into_one_folder_exclude_each_other(small: matrix.Matrix, tmp_path: Path) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    with (out / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="another build works"):
            build.build(small, out)


def test_a_full_disk_leaves_the_old_set(small: matrix.Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    build.build(small, out)
    before = digest(out)
    (out / "sm_90a" / "manifest.json").write_bytes(b"{}")
    build.build(small, out)  # completes: everything is staged again or reused
    assert digest(out)["sm_90a/manifest.json"] == before["sm_90a/manifest.json"]

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "write_atomically", full)
    (out / "sm_90a" / "manifest.json").unlink()
    with pytest.raises(BuildError, match="No space left"):
        build.build(small, out)
    assert not (out / "sm_90a" / "manifest.json").exists()


# ---- what a cubin says, and the audit


@pytest.fixture(scope="module")
def compiled() -> toolchain.Compiled:
    return toolchain.compile_variant(Variant.parse(KEYS[0]), "sm90_fc1")


def test_a_cubin_is_read(compiled: toolchain.Compiled) -> None:
    facts = compiled.facts
    assert facts.sm == 90
    assert facts.symbol == Variant.parse(KEYS[0]).symbol
    assert facts.stack == 0
    assert facts.parameter_bytes == 112  # eleven pointers, six words
    assert facts.parameters == kernels.load("sm90_fc1").recipe(Variant.parse(KEYS[0])).offsets()
    assert facts.ptxas == toolchain.PINNED_PTXAS


@pytest.mark.parametrize("cut", [0, 10, 63, 200, 5000])
def test_truncated_cubins_are_refused(compiled: toolchain.Compiled, cut: int) -> None:
    with pytest.raises(AuditError):
        elf.read_cubin(compiled.cubin[:cut])


def test_damaged_headers_never_raise_anything_else(compiled: toolchain.Compiled) -> None:
    for at in range(64):
        data = bytearray(compiled.cubin)
        data[at] ^= 0xFF
        with contextlib.suppress(AuditError):
            elf.read_cubin(bytes(data))


def test_the_audit_names_every_fault(compiled: toolchain.Compiled) -> None:
    import dataclasses

    kernel = kernels.load("sm90_fc1")
    variant = Variant.parse(KEYS[0])
    audit.audit(variant, kernel, compiled)
    spilled = dataclasses.replace(compiled, facts=dataclasses.replace(compiled.facts, stack=8, registers=255, parameters=((0, 8),)))
    with pytest.raises(AuditError, match=r"(?s)8 bytes of stack.*255 registers.*parameters"):
        audit.audit(variant, kernel, spilled)
    audit.audit(variant, kernel, dataclasses.replace(compiled, facts=dataclasses.replace(compiled.facts, stack=8)), audit.Allowance(8, "why"))
    fewer = dataclasses.replace(compiled, ptx=compiled.ptx.replace("mma.sync", "nop.sync", 1))
    with pytest.raises(AuditError, match=r"63 mma\.sync.*implies 64"):
        audit.audit(variant, kernel, fewer)


SPILLING = "fc1.sm90a.t8x64.c1x1.bf16-bf16"
#: ptxas keeps variables on the stack where it does not optimise: 96 bytes a thread of this kernel.
UNOPTIMISED = """\
schema: 1
entries:
  - kernel: sm90_fc1
    op: fc1
    arch: [sm_90a]
    tile: [8x64]
    cluster: [1x1]
    a_dtype: [bf16]
    b_dtype: [nvfp4]
    c_dtype: [bf16]
    compiler_options: --opt-level 0
profiles:
  full: {variants: 1}
"""


def test_a_variant_that_spills_needs_an_upper_bound_and_a_reason(tmp_path: Path) -> None:
    def built(allowance: str = "") -> build.BuildResult:
        path = tmp_path / "m.yaml"
        path.write_text(UNOPTIMISED.replace("profiles:", f"    spills: {{{SPILLING}: {allowance}}}\nprofiles:" if allowance else "profiles:"))
        return build.build(matrix.load(path), tmp_path / "out")

    (failure,) = built().failures
    assert failure.key == SPILLING
    stack = int(failure.error.split(" bytes of stack a thread: registers spill; 0 are allowed")[0].rsplit(" ", 1)[1])
    assert stack > 0
    assert built(f"{{stack_bytes: {stack - 1}, reason: measured}}").failures
    allowed = built(f"{{stack_bytes: {stack}, reason: no optimisation}}")
    assert allowed.built == [SPILLING]
    entry = ArtifactSet(tmp_path / "out").manifest("sm_90a").variants[SPILLING]
    assert entry.stack == stack
    assert entry.audit["allowance"] == {"stack_bytes": stack, "reason": "no optimisation"}
    assert built(f"{{stack_bytes: {stack}, reason: no optimisation}}").reused == [SPILLING]
    assert [failure.key for failure in built().failures] == [SPILLING]  # taken back: the built one does not stay


def test_one_variant_that_fails_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is named with its error and the exit code is 1; the others are built, and are not compiled again once it is mended."""
    good, path, out = KEYS[1], tmp_path / "m.yaml", tmp_path / "out"
    path.write_text(UNOPTIMISED.replace("profiles:", SMALL.splitlines()[3] + "\nprofiles:").replace("variants: 1", "variants: 2"))
    assert cli.main(["build", "--matrix", str(path), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "1 built" in said.out
    assert f"FAILED {SPILLING}\n  AuditError: {SPILLING}: " in said.err
    assert "1 variants failed" in said.err
    assert not list(out.rglob("manifest.json"))  # half a set is none
    staged = {file.name: file.stat().st_mtime_ns for file in out.rglob("*.cubin")}
    assert len(staged) == 1
    path.write_text(SMALL)
    assert cli.main(["build", "--matrix", str(path), "--out", str(out), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["built"]) == sorted(KEYS)
    assert (out / "sm_90a" / f"{good}.cubin").stat().st_mtime_ns in staged.values()


def test_yaml_alone_adds_a_legal_variant(tmp_path: Path) -> None:
    """Contract section 8: the legal set is wider than what ships. Nothing but the matrix changes."""
    added = (
        "  - {kernel: sm100_fc1, op: fc1, arch: [sm_100f], tile: [256x256], cluster: [2x2], a_dtype: [nvfp4], b_dtype: [nvfp4], c_dtype: [f16]}\n"
        "profiles:\n  added:\n    variants: 1\n    select: [{tile: 256x256, cluster: 2x2}]\n"
    )
    shipped = matrix.DEFAULT_MATRIX.read_text()
    count = len(matrix.load().profile("full"))
    text = shipped.replace("profiles:\n", added).replace(f"variants: {count}", f"variants: {count + 1}")
    path = tmp_path / "build_matrix.yaml"
    path.write_text(text)
    key = "fc1.sm100f.t256x256.c2x2.nvfp4-f16"
    assert key not in {each.variant.key for each in matrix.load().profile("full")}
    result = build.build(matrix.load(path), tmp_path / "out", profile="added")
    assert (result.built, result.failures) == ([key], [])
    found = ArtifactSet(tmp_path / "out")
    entry = found.manifest("sm_100f").variants[key]
    assert elf.read_cubin(found.image(entry)).symbol == entry.symbol
    assert entry.recipe.cluster == (4, 1, 1)


def test_opcodes_inside_inline_assembly_are_counted() -> None:
    text = ".entry k(\n)\n{\n{ .reg .pred p; setp.ne.b32 p, %r1, 0; @p ld.global.b32 %r2, [%rd1]; }\nadd.s32 %r1, %r2, 1; // x\n}"
    assert audit.count_opcodes(text) == {"setp.ne.b32": 1, "ld.global.b32": 1, "add.s32": 1}


def test_the_loaded_compiler_is_the_pinned_one(compiled: toolchain.Compiled) -> None:
    assert toolchain.loaded_flavour() == toolchain.PINNED_FLAVOUR


def test_another_flavour_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "loaded_flavour", lambda: "cu12")
    with pytest.raises(ToolchainError, match="cu12 libraries, cu13 are pinned"):
        toolchain.compile_variant(Variant.parse(KEYS[0]), "sm90_fc1")


def test_the_build_log_says_what_compiling_took(small: matrix.Matrix, tmp_path: Path) -> None:
    build.build(small, tmp_path / "out")
    log = json.loads((tmp_path / "out" / "sm_90a" / build.LOG_NAME).read_text())
    assert sorted(log["compile_seconds"]) == sorted(KEYS)
    assert "compile_seconds" not in (tmp_path / "out" / "sm_90a" / "manifest.json").read_text()
    (tmp_path / "out" / "sm_90a" / f"{KEYS[0]}.cubin").unlink()
    (tmp_path / "out" / "sm_90a" / "manifest.json").write_bytes(b"{")  # so that a manifest is written again
    (tmp_path / "out" / "sm_90a" / build.LOG_NAME).write_text(json.dumps({"compile_seconds": {KEYS[1]: 123.0, "fc9.gone": 1.0}}))
    build.build(small, tmp_path / "out", key_filter=KEYS[0])
    assert sorted(json.loads((tmp_path / "out" / "sm_90a" / build.LOG_NAME).read_text())["compile_seconds"]) == [KEYS[0]]  # a set of one by now
    build.build(small, tmp_path / "out")
    assert sorted(json.loads((tmp_path / "out" / "sm_90a" / build.LOG_NAME).read_text())["compile_seconds"]) == sorted(KEYS)
