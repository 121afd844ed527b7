"""Every family of instructions that the emulator promises, as opcodes that kernels use; an opcode with anything else on it is unknown, and named.

What each does is tested in test_instructions, test_formats, test_memory_and_barriers, test_mma_layouts, test_wgmma_layouts, test_tcgen05_layouts,
test_tensor_instructions and test_tensor_map.
"""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from snippets import kernel, launch

from densemoe.compile.emulator import translation  # noqa: F401  (fills the table)
from densemoe.compile.emulator.operations import look_up, opcodes
from densemoe.runtime.errors import EmulatorError

FAMILIES = {
    "integer": "add.s32 sub.u64 mul.lo.s32 mul.hi.u32 mul.wide.u32 mad.lo.s32 mad.wide.u32 div.u32 rem.s32 min.s32 max.u32 abs.s32 neg.s32 popc.b32"
    " clz.b32 bfind.u32 brev.b32 bfe.u32 bfi.b32 prmt.b32 shl.b32 shr.s32 shf.l.wrap.b32 and.b32 or.b64 xor.b32 not.b32 lop3.b32 dp4a.u32.u32",
    "float": "add.f32 add.rn.ftz.f32 sub.f32 mul.rn.f32 fma.rn.f32 div.rn.f32 min.f32 max.NaN.f32 abs.f32 neg.f32 rcp.approx.ftz.f32"
    " rcp.approx.f32 rsqrt.approx.f32 sqrt.approx.f32 ex2.approx.ftz.f32 lg2.approx.f32 tanh.approx.f32",
    "half": "add.f16 mul.bf16 fma.rn.bf16 neg.f16 abs.bf16 min.f16 max.NaN.bf16",
    "packed": "add.rn.f32x2 mul.rn.f32x2 fma.rn.f32x2 mul.bf16x2 fma.rn.bf16x2 add.f16x2 max.bf16x2 neg.f16x2 mov.b64",
    "conversion": "cvt.rn.bf16.f32 cvt.rn.f16.f32 cvt.f32.f16 cvt.f32.bf16 cvt.rn.bf16x2.f32 cvt.rn.f16x2.f32 cvt.rn.f32.s32 cvt.rzi.s32.f32"
    " cvt.u64.u32 cvt.rn.satfinite.e2m1x2.f32 cvt.rn.f16x2.e2m1x2 cvt.rn.satfinite.e4m3x2.f32 cvt.rn.satfinite.e5m2x2.f32 cvt.rn.f16x2.e4m3x2"
    " cvt.rn.f16x2.e5m2x2 cvt.rp.satfinite.ue8m0x2.f32 cvt.rn.bf16x2.ue8m0x2",
    "predicates": "setp.eq.s32 setp.lt.and.u32 setp.gtu.f32 selp.b32 and.pred or.pred not.pred mov.pred",
    "divergence": "bra bra.uni ret exit",
    "shuffles, votes, redux": "shfl.sync.idx.b32 shfl.sync.up.b32 shfl.sync.down.b32 shfl.sync.bfly.b32 vote.sync.any.pred vote.sync.all.pred"
    " vote.sync.ballot.b32 elect.sync activemask.b32 match.any.sync.b32 redux.sync.add.s32 redux.sync.max.u32 redux.sync.or.b32",
    "atomics": "atom.global.add.u32 atom.global.max.u32 atom.shared.add.u32 atom.global.cas.b32 atom.acq_rel.gpu.global.add.u32 atom.global.exch.b32"
    " red.global.add.f32 red.global.add.v4.f32 red.release.gpu.global.add.u32",
    "memory": "ld.global.nc.v4.b32 ld.shared.v4.b32 ld.acquire.gpu.global.b32 ld.param.b64 ld.volatile.global.b32 st.global.v4.b32 st.shared.b32"
    " st.release.gpu.global.b32 prefetch.global.L2",
    "mma.sync": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
    " mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "ldmatrix and stmatrix": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
    " stmatrix.sync.aligned.m8n8.x4.shared.b16",
    "wgmma": "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 wgmma.fence.sync.aligned"
    " wgmma.commit_group.sync.aligned wgmma.wait_group.sync.aligned",
    "cp.async": "cp.async.cg.shared.global cp.async.ca.shared.global cp.async.commit_group cp.async.wait_group cp.async.wait_all"
    " cp.async.mbarrier.arrive.noinc.shared.b64",
    "bulk copies": "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes cp.async.bulk.global.shared::cta.bulk_group"
    " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32"
    " cp.async.bulk.commit_group cp.async.bulk.wait_group cp.async.bulk.wait_group.read cp.async.bulk.prefetch.L2.global",
    "tensor copies": "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
    " cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint.cta_group::2"
    " cp.async.bulk.tensor.5d.shared::cta.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
    " cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"
    " cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group cp.async.bulk.prefetch.tensor.2d.L2.global.tile prefetch.tensormap"
    " tensormap.replace.tile.global_dim.shared::cta.b1024.b32",
    "mbarriers": "mbarrier.init.shared.b64 mbarrier.inval.shared.b64 mbarrier.arrive.shared.b64 mbarrier.arrive.expect_tx.shared.b64"
    " mbarrier.expect_tx.relaxed.cta.shared::cta.b64 mbarrier.try_wait.parity.shared.b64 mbarrier.test_wait.shared.b64"
    " mbarrier.arrive.release.cluster.shared::cluster.b64 fence.mbarrier_init.release.cluster",
    "barriers": "bar.sync bar.arrive barrier.sync barrier.cluster.arrive barrier.cluster.arrive.relaxed barrier.cluster.wait bar.warp.sync membar.gl"
    " fence.acq_rel.gpu fence.proxy.async fence.proxy.async.shared::cta",
    "distributed shared memory": "mapa.shared::cluster.u32 ld.shared::cluster.b32 st.async.shared::cluster.mbarrier::complete_tx::bytes.b32"
    " cvta.to.shared::cluster.u64 getctarank.shared::cluster.u32",
    "tcgen05": "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 tcgen05.dealloc.cta_group::2.sync.aligned.b32"
    " tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned tcgen05.cp.cta_group::2.32x128b.warpx4 tcgen05.ld.sync.aligned.32x32b.x32.b32"
    " tcgen05.st.sync.aligned.32x32b.x8.b32 tcgen05.wait::ld.sync.aligned tcgen05.wait::st.sync.aligned"
    " tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X tcgen05.mma.cta_group::2.kind::mxf8f6f4.block_scale.scale_vec::1X"
    " tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X tcgen05.mma.cta_group::2.kind::f16 tcgen05.fence::before_thread_sync"
    " tcgen05.fence::after_thread_sync tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64",
    "launches": "griddepcontrol.wait griddepcontrol.launch_dependents setmaxnreg.inc.sync.aligned.u32 setmaxnreg.dec.sync.aligned.u32 nanosleep.u32",
}


@pytest.mark.parametrize(("family", "names"), FAMILIES.items())
def test_a_family_is_modelled(family: str, names: str) -> None:
    assert not [name for name in names.split() if look_up(name) is None]


@pytest.mark.parametrize(("family", "names"), FAMILIES.items())
def test_an_opcode_is_known_whole_or_not_at_all(family: str, names: str) -> None:
    """Another modifier, at the end or inside, makes it another instruction."""
    for name in names.split():
        head, *rest = name.split(".")
        for changed in (f"{name}.another", f"{head}.another{''.join('.' + part for part in rest)}", name + "x"):
            assert look_up(changed) is None, changed


def test_the_table_has_no_opcode_that_begins_another_by_chance() -> None:
    """Opcodes are looked up whole: what begins one and is not itself in the table is unknown."""
    table = set(opcodes())
    for name in itertools.islice(table, 0, None, 97):
        for cut in range(1, len(name)):
            if name[:cut] not in table and not name[:cut].startswith("cvt."):
                assert look_up(name[:cut]) is None


def test_all_unknown_instructions_are_named_with_their_lines() -> None:
    text = kernel("add.s32.another %r0, %r1, %r2;\n mul.lo.s32 %r0, %r1;\n tcgen05.shift.cta_group::1.down [%r0];")
    with pytest.raises(EmulatorError) as caught:
        launch(text, {"input": np.zeros(4, np.uint32), "output": np.zeros(4, np.uint32)})
    first = text.split("\n").index(next(line for line in text.split("\n") if "another" in line)) + 1
    lines = str(caught.value).split("\n")
    assert lines[0] == f"PTX line {first}: the instruction 'add.s32.another' is not modelled"
    assert lines[1].startswith(f"PTX line {first + 1}: 'mul.lo.s32' with 2 operands")
    assert len(lines) == 3
    assert f"PTX line {first + 2}" in lines[2]


ALONE = """
import sys

before = {name.split(".")[0] for name in sys.modules}  # what start-up files of the environment load

class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in ALLOWED and top not in sys.stdlib_module_names:
            raise ModuleNotFoundError(f"{name} is blocked")

ALLOWED = {"numpy", "densemoe", "_editable", "site", "sitecustomize"}
sys.meta_path.insert(0, Blocked())
import struct
import numpy as np
from densemoe.compile.emulator import GlobalMemory, Launch, run
ptx = '''.version 9.0
.target sm_90a
.address_size 64
.visible .entry twice(.param .u64 x)
{
    .reg .b32 %r<3>; .reg .b64 %d<3>;
    mov.u32 %r0, %tid.x; ld.param.u64 %d0, [x]; mul.wide.u32 %d1, %r0, 4; add.s64 %d2, %d0, %d1;
    ld.global.b32 %r1, [%d2]; add.s32 %r2, %r1, %r1; st.global.b32 [%d2], %r2;
    ret;
}'''
memory, x = GlobalMemory(), np.arange(32, dtype=np.int32)
run(ptx, Launch("twice", (1, 1, 1), (32, 1, 1), parameters=struct.pack("<Q", memory.add("x", x))), memory, schedule="random:7")
assert (x == 2 * np.arange(32)).all()
foreign = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names) - ALLOWED - before
print(sorted(name for name in foreign if not name.startswith("_")))
"""


def test_the_emulator_needs_numpy_alone() -> None:
    """In a process in which nothing else can be imported."""
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", done.stdout
