"""The mutation suite: what it alters, and that a sample of real kernels' mutants is noticed, which a blind emulator is not able to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from densemoe.compile import mutate_cli
from densemoe.compile.emulate import mutation
from densemoe.compile.emulator.mutation import FAMILIES, KINDS, Mutant, mutants, statements
from densemoe.compile.emulator.parser import parse
from densemoe.compile.emulator.races import Races
from densemoe.compile.executor import Done, Function
from densemoe.runtime.cli import main
from densemoe.runtime.errors import EmulatorError

PTX = """.version 9.0
.target sm_100a
.address_size 64
.visible .entry test(.param .u64 input)
{
    .reg .pred %p<9>; .reg .b32 %r<30>; .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [input];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 4;
    add.s32 %r3, %r2, 1024;
    mul.hi.u32 %r9, %r1, -1431655765;
    shr.u32 %r4, %r9, 2;
    and.b32 %r5, %r4, 1;
    mbarrier.init.shared::cta.b64 [%r3], 4; // made
    mbarrier.init.shared::cta.b64 [%r3+8], 4;
    fence.proxy.async;
    barrier.sync 1, 128;
    { .reg .pred p; setp.ne.b32 p, %r1, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64; }
    cp.async.bulk.prefetch.L2.global [%rd1], 64;
    griddepcontrol.launch_dependents;
$AGAIN:
    mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r3], %r5;
    @!%p1 bra $AGAIN;
    cp.async.bulk.wait_group.read 0;
    cp.async.cg.shared.global [%r3+96], [%rd1], 16, %r7;
    cp.async.commit_group;
    shr.u32 %r6, %r1, 31;
    setp.lt.s32 %p2, %r1, 0;
    ld.shared.b32 %r7, [%r3+64];
    ret;
}
"""


class Here:
    """Runs tasks in this process."""

    def run(self, function: Function, tasks: Sequence[Any], done: Done) -> None:
        """One after the other."""
        for i, task in enumerate(tasks):
            done(i, function(task), None)


@cache
def subject(key: str) -> mutation.Subject:
    return mutation.subject(key)


def changed(mutant: Mutant) -> str:
    return next(new for old, new in zip(PTX.split("\n"), mutant.apply(PTX).split("\n"), strict=True) if old != new).strip()


# --- what is altered


def test_mutants_of_a_small_kernel() -> None:
    found = {mutant.name: changed(mutant) for mutant in mutants(PTX)}
    assert found["delete: fence.proxy.async #1"] == ""
    assert found["delete: mbarrier.init.shared::cta.b64 [%], 4 #1"] == "// made"
    assert found["twice: mbarrier.init.shared::cta.b64 [%+8], 4 #1"].count("mbarrier.init") == 2
    assert found["barrier-address: mbarrier.init.shared::cta.b64 [%+8], 4 #1"] == "mbarrier.init.shared::cta.b64 [%r3+16], 4;"
    assert "add.s32 mutated, 4, 1; mbarrier.init.shared::cta.b64 [%r3], mutated;" in found["count: mbarrier.init.shared::cta.b64 [%], 4 #1"]
    assert found["threads: barrier.sync 1, 128 #1"] == "barrier.sync 1, 96;"
    assert found["group: cp.async.bulk.wait_group.read 0 #1"] == "cp.async.bulk.wait_group.read 1;"
    guarded = found["delete: mbarrier.arrive.expect_tx.shared::cta.b64 _, [%], 64 #1"]
    assert "setp.ne.b32 p, %r1, 0;" in guarded
    assert "expect_tx" not in guarded
    assert "mutated, 64, 16; @p mbarrier" in found["bytes: mbarrier.arrive.expect_tx.shared::cta.b64 _, [%], 64 #1"]
    wait = "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %, [%], % #1"
    assert found[f"no-wait: {wait}"] == "setp.eq.b32 %p1, 0, 0;"
    assert "xor.b32 mutated, %r5, 1;" in found[f"parity: {wait}"]
    assert found[f"parity-stuck: {wait}"].endswith("[%r3], 0;")
    assert ".relaxed.cta." in found[f"relaxed: {wait}"]
    assert found["step: shl.b32 %, %, 4 #1"] == "shl.b32 %r2, %r1, 5;"
    assert found["phase: shr.u32 %, %, 2 #1"] == "shr.u32 %r4, %r9, 3;"
    assert found["phase: and.b32 %, %, 1 #1"] == "and.b32 %r5, %r4, 0;"
    assert found["phase: mul.hi.u32 %, %, -1431655765 #1"] == "mul.hi.u32 %r9, %r1, 1431655765;"
    assert found["address: ld.shared.b32 %, [%+64] #1"] == "ld.shared.b32 %r7, [%r3+80];"
    assert found["address: cp.async.cg.shared.global [%+96], [%], 16, % #1"] == "cp.async.cg.shared.global [%r3+112], [%rd1], 16, %r7;"
    assert found["delete: cp.async.commit_group #1"] == ""


def test_hints_and_signs_are_left_alone() -> None:
    for mutant in mutants(PTX):
        assert not any(word in mutant.text for word in ("prefetch", "launch_dependents", ", 31", "setp.lt")), mutant.name


def test_every_mutant_has_a_name_of_its_own_a_family_and_parses() -> None:
    found = mutants(PTX)
    assert len({mutant.name for mutant in found}) == len(found)
    assert len({mutant.apply(PTX) for mutant in found}) == len(found)
    assert {kind for kinds in FAMILIES.values() for kind in kinds} == set(KINDS)
    for mutant in found:
        assert mutant.family in FAMILIES
        parse(mutant.apply(PTX))


def test_registers_of_inline_assembly_belong_to_their_line() -> None:
    text = PTX.replace("    ld.shared.b32", "    { .reg .pred p; setp.ne.b32 p, %r1, 7; selp.b32 %r8, 1, 0, p; }\n    ld.shared.b32")
    assert not [mutant for mutant in mutants(text) if ", 7;" in mutant.text]


def test_names_survive_other_registers_and_lines() -> None:
    moved = PTX.replace("%r3", "%r13").replace("    fence.proxy", "    mov.u32 %r20, %r1;\n    fence.proxy")
    assert [mutant.name for mutant in mutants(moved)] == [mutant.name for mutant in mutants(PTX)]


def test_a_sample_follows_from_its_seed_and_has_every_kind() -> None:
    found = mutants(PTX)
    chosen = mutation.sample(found, 18, 3)
    assert chosen == mutation.sample(found, 18, 3) != mutation.sample(found, 18, 4)
    assert {each.kind for each in chosen} == {each.kind for each in found}
    assert mutation.sample(found, 1000, 0) == found


# --- real kernels

KEYS = ("fc1.sm100f.t128x128.c1x1.nvfp4-nvfp4", "fc1.sm100f.t256x128.c2x1.nvfp4-nvfp4", "fc1.sm90a.t8x64.c1x1.bf16-bf16")


@pytest.mark.parametrize("key", KEYS)
def test_statements_are_what_the_parser_reads(key: str) -> None:
    ptx = subject(key).ptx
    assert len(statements(ptx)) == sum(len(each.instructions) for each in parse(ptx).kernels.values())


@pytest.mark.parametrize("key", KEYS)
def test_a_sample_of_mutants_is_noticed(key: str) -> None:
    report = mutation.run([subject(key)], Here(), count=12, seed=1)
    assert [f"{each.name} (line {each.line}): {each.text}" for each in report.findings if each.outcome == "survived"] == []
    assert len(report.findings) == 12


@pytest.mark.parametrize(
    ("key", "only", "check"),
    [
        (KEYS[0], "relaxed: mbarrier.try_wait*#1", "_check_async"),
        (KEYS[1], "relaxed: mbarrier.try_wait*#1", "_check_async"),
        (KEYS[2], "delete: bar.warp.sync*#1", "_check_made"),
        (KEYS[2], "delete: bar.warp.sync*#2", "_check_async"),
    ],
)
def test_a_blind_spot_shows(key: str, only: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of its checks the emulator lets a mutant pass, and the suite says so."""
    given = dataclasses.replace(subject(key), runs=subject(key).runs[:3])
    seen = mutation.run([given], Here(), only=[only])
    assert [each.outcome for each in seen.findings] == ["error"]
    assert seen.share == 1
    monkeypatch.setattr(Races, check, lambda *_: None)
    blind = mutation.run([given], Here(), only=[only])
    assert [each.outcome for each in blind.findings] == ["survived"]
    assert blind.share == 0


def test_a_kernel_that_fails_as_it_is_is_no_subject() -> None:
    given = subject(KEYS[2])
    broken = dataclasses.replace(given, ptx=next(each for each in mutants(given.ptx) if each.kind == "bytes").apply(given.ptx))
    with pytest.raises(EmulatorError, match="fails as it is"):
        mutation.run([broken], Here(), count=1)


def test_proofs_turn_survivors_into_equivalents_and_unused_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    given = dataclasses.replace(subject(KEYS[2]), runs=subject(KEYS[2]).runs[:1])
    monkeypatch.setattr(mutation, "mutants", lambda _: [each for each in mutants(given.ptx) if each.kind in ("bytes", "size")][:4])
    proofs = (mutation.Equivalent("fc1.*", "bytes: *", "it is"), mutation.Equivalent("fc1.sm90a.*", "size: *", "not needed"))
    monkeypatch.setattr(mutation, "equivalents", lambda: proofs)
    outcomes = {"bytes": "survived", "size": "error"}

    def judged(task: mutation.Task) -> dict[str, Any]:
        return {"outcome": outcomes.get(task.name.partition(":")[0], "survived"), "detail": "", "run": "", "seconds": 0.0, "lints": 0}

    monkeypatch.setattr(mutation, "run_mutant", judged)
    report = mutation.run([given], Here())
    assert {each.outcome for each in report.findings if each.kind == "bytes"} == {"equivalent"}
    assert report.share == 1
    assert report.equivalent_share > 0.05
    assert report.unused == [proofs[1]]


def test_a_mutant_that_uses_up_its_processor_time_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*_: object) -> None:
        while True:
            pass

    monkeypatch.setattr(mutation, "run_case", forever)
    given = dataclasses.replace(subject(KEYS[2]), runs=subject(KEYS[2]).runs[:1])
    assert mutation.run_mutant(mutation.Task(given, "it", given.ptx, 0, 0.2))["outcome"] == "hangs"


def test_a_journal_saves_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, journal = dataclasses.replace(subject(KEYS[2]), runs=subject(KEYS[2]).runs[:1]), tmp_path / "journal"
    first = mutation.run([given], Here(), only=["bytes: *"], journal=journal)
    lines = journal.read_text().splitlines()
    assert len(lines) == len(first.findings) > 0
    journal.write_text("\n".join([*lines[:-1], lines[-1][:20]]))  # the last one was interrupted
    ran: list[str] = []
    original = mutation.run_mutant

    def counted(task: mutation.Task) -> dict[str, Any]:
        ran.append(task.name)
        return original(task)

    monkeypatch.setattr(mutation, "run_mutant", counted)
    again = mutation.run([given], Here(), only=["bytes: *"], journal=journal)
    assert [each.outcome for each in again.findings] == [each.outcome for each in first.findings]
    assert ran == ["", first.findings[-1].name]


# --- the command


def test_the_command_lists_survivors_and_its_exit_code_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mutate_cli, "open_executor", lambda *_: Here())
    compiled, real = subject(KEYS[2]), mutation.subject
    monkeypatch.setattr(mutation, "subject", lambda key, runs=(): dataclasses.replace(compiled, runs=runs) if key == KEYS[2] else real(key, runs))
    command = ["mutate", KEYS[2], "--only", "delete: bar.warp.sync*#1", "--case", "m=1,e=1,h=256,i=64,kind=exact,sms=1"]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kernels"][KEYS[2]]["noticed_share"] == 1
    assert [each["kind"] for each in document["findings"]] == ["delete"]
    assert main([*command, "--only", "delete: fence.mbarrier_init*#1", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["findings"]) == 2
    monkeypatch.setattr(Races, "_check_made", lambda *_: None)
    assert main(command) == 1
    shown = capsys.readouterr()
    assert "survived fc1.sm90a" in shown.out
    assert "bar.warp.sync -1;" in shown.out
    assert "survived" in shown.err
    assert main([*command[:3], "no such kind: *"]) == 2
    assert main(["mutate", "fc1.sm1.none"]) == 2
    assert main(["mutate", "--schedule", "lazy"]) == 2


@pytest.mark.full
def test_every_mutant_of_the_suite() -> None:
    """The whole suite, as ``densemoe mutate``: estimated at half an hour on an idle core."""
    assert main(["mutate"]) == 0
