"""The kernel of ``sm90_wgmma_groupedfc1`` and ``sm90_wgmma_groupedfc2``: 256 weight rows x up to ``tile_m`` gathered tokens, stream-K.

A unit is a tile of ``route`` (up to ``tile_m`` rows of one expert) x 256 weight rows. All units' K 128 blocks are laid end to end and cut into equal
spans, one a CTA: FC1 takes a tile's rows of units one after another, FC2 all tiles of the same 256 output columns. A K 128 block at a time:

    tokens of the next block ─ shared memory, barrier │ weights of the block after next ─ bulk copy │ tokens of the block after ─ load
    superblock ─ wait ─ decode ─ wgmma, or mma.sync

Three pieces of code run at their own distance along the span: weights, ``weight_stages`` blocks ahead; tokens, one block ahead; and the products.
What a tile's rows are (``rows``, and FC2's ``row_alpha``) stands in shared memory a tile before it is needed.

    FC1:  a unit in one span: epilogue.  In several: sums to the CTA's slot; the CTA whose span ends in it adds all in order, then the epilogue.
    FC2:  workspace[token] += row_alpha · accumulators (red.v4); CTAs behind those that add wait for them, convert, store and clear (sm90_conversion).
          With the option ``deterministic`` as FC1 up to the epilogue, which stores row_alpha · accumulators of each row (sm90_ordered).

Run-time setting ``early_list``: what ``route`` wrote was complete before the launch that precedes this one began, so that weights are fetched before
it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.experimental import primitives as pr

from densemoe.compile.kernels import sm90_common as common
from densemoe.compile.kernels import sm90_conversion as conversion
from densemoe.compile.kernels import sm90_ordered as ordered
from densemoe.compile.kernels import sm90_reduction as reduction
from densemoe.compile.kernels import sm90_wgmma as wgmma
from densemoe.compile.kernels import sm90_wgmma_tokens as staging
from densemoe.compile.kernels import sm90_workspace as workspace
from densemoe.compile.kernels.sm90_epilogue import fc1_pairs, store_fc1_outputs, store_fc1_pairs, store_if, store_k64_zeros
from densemoe.compile.kernels.sm90_fc2 import add_to_workspace
from densemoe.compile.kernels.sm90_wgmma_config import GROUP_ROWS, TABLE_SLOTS, WARPGROUP_WARPS, Config

TILE_BYTES = 16  # of a tile of ``route``, and of the list's head
SMALLEST_SPAN = 4  # K 128 blocks of a CTA
SLOT_BATCH = {1: 8, 2: 4}  # by warpgroups: vectors of a slot whose loads are in flight together, as registers allow
CONVERTED_AT_ONCE = {4: 1, 3: 2, 2: 2, 1: 2}  # by resident CTAs: pieces whose loads a warp that converts has in flight, as registers allow
ORDERED_AT_ONCE = {4: 16, 3: 24, 2: 32, 1: 32}  # the same where rows are added in order: rows that a lane loads together
VECTOR = 4  # float32 of one access to a slot
FC2_OUTPUTS = 8  # consecutive output columns that the four m16 blocks of a superblock give one lane


@cute.kernel
def wgmma_kernel(
    a: cutlass.Pointer,
    a_scales: cutlass.Pointer,
    b: cutlass.Pointer,
    scales: cutlass.Pointer,
    output_multiplier: cutlass.Pointer,
    c: cutlass.Pointer,
    c_scales: cutlass.Pointer,
    partials: cutlass.Pointer,
    counters: cutlass.Pointer,
    tiles: cutlass.Pointer,
    rows: cutlass.Pointer | None,
    places: cutlass.Pointer | None,
    slots: cutlass.Pointer | None,
    tokens_total: Int32,
    top_k: Int32 | None,
    smallest: Int32 | None,
    hidden: Int32,
    intermediate: Int32,
    adding: Int32,
    waits_first: Int32,
    config: cutlass.Constexpr,
):
    tid, _, _ = cute.arch.thread_idx()
    bid, _, _ = cute.arch.block_idx()
    ctas, _, _ = cute.arch.grid_dim()
    fc2 = config.op == "groupedfc2"
    worker = bid if fc2 else reduction.worker_of(bid, ctas)
    workers_most = adding if fc2 else ctas  # FC1 has no others; the grid's size takes no register
    if cutlass.const_expr(config.ordered):
        worker = bid  # a CTA that converts: behind all
        if bid < adding:
            worker = reduction.worker_of(bid, adding)
    warp = cute.arch.make_warp_uniform(tid // 32)
    lane = tid % 32
    owner = warp % WARPGROUP_WARPS  # the superblock row of the unit that this warp multiplies
    first_block = (warp // WARPGROUP_WARPS) * config.blocks
    k_length = intermediate if fc2 else hidden
    k_blocks = (k_length + (common.SUPERBLOCK_K - 1)) // common.SUPERBLOCK_K
    stages = config.shape.weight_stages

    shared = wgmma.shared_memory(config)
    ring = shared.ring.subview(owner * (stages * common.SUPERBLOCK_BYTES))
    barriers = shared.barriers.subview(owner * stages)
    activations = shared.activations.data_ptr().toint(Int32)
    table = shared.table.data_ptr().toint(Int32)
    staged = Int32(0)  # where FC2's sums pass through on their way to the workspace
    if cutlass.const_expr(config.staged_rows > 0):
        staged = shared.staged + warp * workspace.staged_bytes(config.staged_rows)
    copies = Int32(lane == 0) & Int32(warp < WARPGROUP_WARPS)  # the lane that starts this superblock row's copies
    if copies != 0:
        for i in cutlass.range_constexpr(stages):
            pr.mbarrier_init(barriers.subview(i), 1)
        pr.fence_mbarrier_init()

    if waits_first != 0:
        pr.griddepcontrol("wait")  # the tiles, which say what weights are read, may come from the launch before
    pr.griddepcontrol("launch_dependents")
    tile_count = common.load_global_s32_or(tiles, Int32(1), Int32(0))
    work = Work(config, tiles, tile_count, hidden if fc2 else intermediate)
    total, workers = shares(work.units, k_blocks, workers_most, again(smallest) if config.ordered else SMALLEST_SPAN)
    first = total
    last = total
    if Int64(worker) < workers:
        first = Int64(worker) * total // workers
        last = (Int64(worker) + 1) * total // workers
    remaining = Int32(last - first)
    unit = Int32(first // Int64(k_blocks))
    k = Int32(first - Int64(unit) * Int64(k_blocks))

    if cutlass.const_expr(fc2):  # for the end, in no registers
        group = work.group(unit)
        for word, value in enumerate((group, (unit - group * again(work.tile_count)) * k_blocks + k, remaining)):
            common.store_shared_if(shared.span + word * 4, Int32(tid == 0), value)

    # ---- weights: `to_fetch` blocks from (weight_unit, weight_k) on, whose first superblock is at `source`
    to_fetch = remaining
    weight_unit = unit
    weight_k = k
    expert = work.expert(unit)
    source = work.superblock_row(expert, unit, owner, k_blocks) + Int64(k) * common.SUPERBLOCK_BYTES
    next_expert = work.expert(unit + 1)
    for i in cutlass.range_constexpr(stages):
        if to_fetch > 0:
            if copies != 0:
                common.start_copy(ring, barriers, i, b + source)
            to_fetch -= 1
            source = source + common.SUPERBLOCK_BYTES
            weight_k += 1
            if weight_k == k_blocks:
                weight_k = Int32(0)
                weight_unit += 1
                source = work.superblock_row(next_expert, weight_unit, owner, k_blocks)
                next_expert = work.expert(weight_unit + 1)

    # ---- tokens, one block ahead: token_k of their unit; tiles and tables of this unit and the next
    token_k = k
    tile = work.tile(unit)
    next_tile = work.tile(unit + 1)
    held = Int32(tid < config.tile_m)
    slot = Int32(0)  # of the table, of the tokens' unit
    store_entry(config, table, Int32(0), tid, held, load_entry(config, rows, scales, tile, tid))
    store_entry(config, table, Int32(1), tid, held, load_entry(config, rows, scales, next_tile, tid))
    pr.barrier_cta_sync(0)  # the table stands, the mbarriers are made
    pr.griddepcontrol("wait")  # weights and lists do not depend on the launch before; activations do
    tokens = copied_tokens(config, table, slot, tile, warp, lane)
    staging.copy_tokens(config, a, tokens, token_k, k_blocks, k_length * Int32(remaining > 0), activations, warp, lane)

    stage = Int32(0)
    phase = Int32(0)
    activation_stage = Int32(0)
    started = Int32(0)
    while remaining > 0:
        # ---- the part of one unit that lies in this span
        run = min(remaining, k_blocks - k)
        remaining -= run
        own_count = tile[2]
        own_slot = slot
        sums = common.zero_accumulators(config.accumulators)
        for index in cutlass.range_constexpr(len(config.widths)):
            width = config.widths[index]
            if is_width(config, index, own_count):
                own_sums = common.zero_accumulators(config.accumulators * width // config.tile_m)
                for step in cutlass.range(run, unroll=1):
                    staging.wait_for_tokens()
                    if cutlass.const_expr(not config.warp_products):
                        wgmma.fence_to_async_proxy()
                    pr.barrier_cta_sync(0)
                    if (started != 0) & (to_fetch > 0):
                        if copies != 0:
                            common.start_copy(ring, barriers, stage - 1 + stages * Int32(stage == 0), b + source)  # what the block before has read
                        to_fetch -= 1
                        source = source + common.SUPERBLOCK_BYTES
                        weight_k += 1
                        if weight_k == k_blocks:
                            weight_k = Int32(0)
                            weight_unit += 1
                            source = work.superblock_row(next_expert, weight_unit, owner, k_blocks)
                            next_expert = work.expert(weight_unit + 1)
                    started = Int32(1)
                    token_k += 1
                    entering = Int32(0)  # a unit whose follower's rows are to be brought into the table
                    if token_k == k_blocks:
                        token_k = Int32(0)
                        tile = next_tile
                        slot = next_slot(slot)
                        entering = Int32(1)
                        next_tile = work.tile(unit + 2)
                    k_ahead = k_length * Int32((step + 1 < run) | (remaining > 0))  # nothing is loaded behind the span
                    at = activations + activation_stage * config.stage_bytes
                    activation_stage += 1
                    if activation_stage == config.activation_stages:
                        activation_stage = Int32(0)
                    ahead = activations + activation_stage * config.stage_bytes
                    low = wgmma.operand(config, at, lane)
                    superblock = ring.subview(stage * common.SUPERBLOCK_BYTES + lane * 16).data_ptr()
                    tokens = copied_tokens(config, table, slot, tile, warp, lane)
                    staging.copy_tokens(config, a, tokens, token_k, k_blocks, k_ahead, ahead, warp, lane)
                    for half in cutlass.range_constexpr(common.K64_HALVES):
                        if cutlass.const_expr(half == 0):
                            common.wait(barriers.subview(stage), phase)
                        own_sums = wgmma.multiply_half(config, own_sums, superblock, first_block, low, width, half)
                        if cutlass.const_expr(half == 0):
                            entry = load_entry(config, rows, scales, [next_tile[0], next_tile[1], next_tile[2] * entering], tid)
                    stage += 1
                    if stage == stages:
                        stage = Int32(0)
                        phase = phase ^ 1
                    if entering != 0:
                        store_entry(config, table, next_slot(slot), tid, held, entry)
                if cutlass.const_expr(not config.warp_products):
                    own_sums = wgmma.wait_for_products(own_sums)
                sums = wgmma.widened(config, own_sums, width)

        if cutlass.const_expr(fc2 and not config.ordered):
            # ---- add the tile's part to the workspace
            row_block = work.group(unit) * WARPGROUP_WARPS + owner
            exists = Int32(row_block < work.row_blocks)
            add_tile(config, sums, partials, table, own_slot, own_count * exists, row_block, tokens_total, staged, first_block, lane)
        else:
            # ---- over the CTAs that share the unit
            finish = Int32(1)
            if run != k_blocks:
                least = again(smallest) if config.ordered else SMALLEST_SPAN
                total, workers = shares(work.units, k_blocks, workers_most, least)  # again, as `work` has it
                begin = Int64(unit) * Int64(k_blocks)
                first_worker = Int32(((begin + 1) * workers - 1) // total)
                sharing = Int32(((begin + Int64(k_blocks)) * workers - 1) // total) - first_worker + 1
                own_worker = again(worker)
                finish = Int32(own_worker == first_worker)
                own_slots = slots if config.ordered else partials
                if finish == 0:
                    store_slot(config, slot_address(config, own_slots, own_worker, tid), sums)
                else:
                    for other in cutlass.range(first_worker + 1, first_worker + sharing, unroll=1):
                        sums = add_slot(config, sums, slot_address(config, own_slots, other, tid))
            if cutlass.const_expr(config.ordered):
                row_block = work.group(unit) * WARPGROUP_WARPS + owner
                exists = Int32(row_block < work.row_blocks)
                own_expert, own_first, own_count = work.tile(unit)
                own_rows = partials + (Int64(row_block) * Int64(again(tokens_total) * again(top_k)) + Int64(own_first)) * conversion.ROW_BYTES
                store_tile(config, sums, own_rows, table, own_slot, own_count * exists * finish, staged, first_block, lane)
            elif finish != 0:
                own_expert, own_first, own_count = work.tile(unit)  # again: registers are short
                thread = again(tid)  # what follows from it would otherwise be kept in registers all the time
                own_lane, own_warp = thread % 32, thread // 32
                own_g, own_t, half_of_row = own_lane // 4, own_lane % 4, own_warp // WARPGROUP_WARPS
                own_row = work.group(unit) * WARPGROUP_WARPS + own_warp % WARPGROUP_WARPS
                there = Int32(own_row < work.row_blocks)
                end = own_first + own_count * there
                scale = common.load_global_f32_if(scales + Int64(own_expert) * 4, Int32(1))
                if cutlass.const_expr(config.shape.warpgroups == 1):
                    outputs = wgmma.by_token_block(config, sums, config.tile_m)
                    store_fc1_outputs(config, outputs, scale, output_multiplier, c, own_first, end, own_row, again(intermediate), own_g, own_t)
                else:
                    peaks = shared.peaks.data_ptr().toint(Int32) + (own_warp % WARPGROUP_WARPS) * wgmma.peak_bytes(config)
                    pairs = fc1_pairs(config, sums, scale, peaks, half_of_row, own_g, own_t)
                    if cutlass.const_expr(config.c_dtype == "nvfp4"):
                        pr.barrier_cta_sync(0)
                    store_fc1_pairs(
                        config, pairs, peaks, output_multiplier, c, own_first, end, own_row, again(intermediate), half_of_row, own_g, own_t
                    )
                if cutlass.const_expr(config.k64_order):  # noqa: SIM102 - decided while compiling
                    if (there == 0) & (half_of_row == 0):  # a group's columns are whole K 128 blocks, which FC2 multiplies
                        store_k64_zeros(config, c, own_first, own_first + own_count, own_row, again(intermediate), own_lane)
        k += run
        if k == k_blocks:
            k = Int32(0)
            unit += 1
    staging.wait_for_tokens()
    if cutlass.const_expr(fc2):
        of_group = again(work.tile_count) * k_blocks  # the units of the same 256 weight rows
        if bid < adding:
            group, inside, blocks = [common.load_shared(shared.span + word * 4) for word in range(3)]
            conversion.hand_over(counters, group, inside, blocks, of_group, tid)
        else:
            row_blocks, converter, converters = hidden // common.SUPERBLOCK_ROWS, bid - adding, ctas - adding
            if cutlass.const_expr(config.ordered):
                ordered.convert(
                    ORDERED_AT_ONCE[config.shape.resident_ctas], config.warps, config.c_dtype, c, partials, places, counters, of_group,
                    WARPGROUP_WARPS, converter, converters, tokens_total, top_k, row_blocks, tid,
                )  # fmt: skip
            else:
                at_once = CONVERTED_AT_ONCE[config.shape.resident_ctas]
                conversion.convert(
                    at_once, config.warps, config.c_dtype, c, partials, counters, of_group, WARPGROUP_WARPS, converter, converters,
                    tokens_total, row_blocks, tid,
                )  # fmt: skip


# ---- units and tiles


@dataclass(frozen=True)
class Work:
    """The units of a launch. What follows from its sizes is computed each time that it is needed: registers are short, and units are long.

    Attributes:
        tiles: of ``route``; tile_count: how many there are.
        size: H of FC2, I of FC1.
    """

    config: Config
    tiles: Any
    tile_count: Any
    size: Any

    @property
    def weight_rows(self) -> Any:
        """Rows of an expert's weights."""
        size = Uint32(again(self.size))
        return size if self.config.op == "groupedfc2" else size * 2

    @property
    def row_blocks(self) -> Any:
        """Superblock rows of an expert."""
        return Int32(self.weight_rows // common.SUPERBLOCK_ROWS)

    @property
    def groups(self) -> Any:
        """Units that an expert's rows make with one tile."""
        return (self.weight_rows + (GROUP_ROWS - 1)) // GROUP_ROWS

    @property
    def units(self) -> Any:
        """How many there are."""
        return Int32(Uint32(again(self.tile_count)) * self.groups)

    def group(self, unit: Any) -> Any:
        """Which 256 weight rows of an expert a unit has."""
        fc2 = self.config.op == "groupedfc2"
        return Int32(Uint32(unit) // Uint32(again(self.tile_count)) if fc2 else Uint32(unit) % self.groups)

    def place(self, unit: Any) -> Any:
        """Where a unit's tile stands in the list of tiles, in bytes."""
        fc2 = self.config.op == "groupedfc2"
        index = Uint32(unit) % Uint32(again(self.tile_count)) if fc2 else Uint32(unit) // self.groups
        return self.tiles + (Int64(index) + 1) * TILE_BYTES

    def expert(self, unit: Any) -> Any:
        """The expert of a unit; 0 where there is no such unit."""
        return common.load_global_s32_or(self.place(unit), Int32(unit < self.units), Int32(0))

    def tile(self, unit: Any) -> list[Any]:
        """[expert, first row, rows] of a unit's tile; zeros where there is no such unit."""
        words = common.load_global_v4_if(self.place(unit), Int32(unit < self.units))
        return [Int32(words[0]), Int32(words[1]), Int32(words[2])]

    def superblock_row(self, expert: Any, unit: Any, owner: Any, k_blocks: Any) -> Any:
        """Offset of the superblock row that a warp multiplies; the expert's last where the unit has fewer than four."""
        row_blocks = self.row_blocks
        row = smaller(self.group(unit) * WARPGROUP_WARPS + owner, row_blocks - 1)
        return (Int64(expert) * Int64(row_blocks) + Int64(row)) * Int64(k_blocks) * common.SUPERBLOCK_BYTES


def again(value: Any) -> Any:
    """A 32-bit integer as it is, in a way that keeps what is computed from it from being computed earlier."""
    return pr.inline_ptx_hl("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[value])


def shares(units: Any, k_blocks: Any, ctas: Any, smallest: Any) -> tuple[Any, Any]:
    """(K blocks of all units, CTAs that share them, of at least ``smallest`` each)."""
    total = Int64(units) * Int64(k_blocks)
    workers = pr.inline_ptx_hl(
        "min.s64 {$w0}, {$r0}, {$r1};", write_only_types=[Int64], read_only_args=[Int64(ctas), (total + (smallest - 1)) // smallest]
    )
    return total, workers


def is_width(config: Config, index: int, count: Any) -> Any:
    """Whether a tile of ``count`` rows is multiplied with the ``index``-th of the kernel's widths, the smallest that holds it."""
    widths = config.widths
    if len(widths) == 1:
        return Int32(1) != Int32(0)
    if index == 0:
        return count <= widths[0]
    if index == len(widths) - 1:
        return count > widths[index - 1]
    return (count > widths[index - 1]) & (count <= widths[index])


def smaller(x: Any, y: Any) -> Any:
    """The smaller of two 32-bit integers."""
    return pr.inline_ptx_hl("min.s32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[x, y])


def larger(x: Any, y: Any) -> Any:
    """The larger of two 32-bit integers."""
    return pr.inline_ptx_hl("max.s32 {$w0}, {$r0}, {$r1};", write_only_types=[Int32], read_only_args=[x, y])


# ---- the table of rows


def next_slot(slot: Any) -> Any:
    """The slot after ``slot``, of three."""
    return (slot + 1) * Int32(slot != TABLE_SLOTS - 1)


def load_entry(config: Config, rows: Any, scales: Any, tile: list[Any], tid: Any) -> list[Any]:
    """A thread's row of a tile: its token, and where there is none −1, or 0 where any row will do; for FC2 its alpha too, or alone."""
    live = Int32(tid < tile[2])
    at = Int64(tile[1] + tid) * 4
    if config.ordered:
        return [common.load_global_f32_if(scales + at, live)]
    entry = [common.load_global_s32_or(rows + at, live, Int32(0 if config.fills_with_others else -1))]
    if config.op == "groupedfc2":
        entry.append(common.load_global_f32_if(scales + at, live))
    return entry


def store_entry(config: Config, table: Any, slot: Any, tid: Any, held: Any, entry: list[Any]) -> None:
    """Stores a thread's row where it has one: first the tokens of all rows, then their alphas."""
    at = table + slot * (config.table_words * config.tile_m * 4) + tid * 4
    for index, word in enumerate(entry):
        common.store_shared_if(at + index * (config.tile_m * 4), held, word)


def copied_tokens(config: Config, table: Any, slot: Any, tile: list[Any], warp: Any, lane: Any) -> list[Any]:
    """Activation rows of those rows of a tile that a lane copies parts of: FC1 reads tokens, FC2 the tile's compact rows. Where the tile has no such
    row, −1, or another row where any will do."""
    row, step, indices = staging.copied_rows(config, warp, lane)
    places = [row + index * step for index in indices]
    if config.op == "groupedfc2" and config.fills_with_others:
        last = larger(tile[1] + tile[2] - 1, Int32(0))  # the list's only tile may have no row
        return [smaller(tile[1] + place, last) for place in places]
    if config.op == "groupedfc2":
        return [(tile[1] + place + 1) * Int32(place < tile[2]) - 1 for place in places]
    at = table + slot * (config.table_words * config.tile_m * 4)
    return [common.load_shared(at + place * 4) for place in places]


# ---- FC1: sums over CTAs


def slot_address(config: Config, slots: Any, worker: Any, tid: Any) -> Any:
    """Where a thread's sums begin in a worker's slot: sixteen bytes a thread, then the next sixteen of every thread."""
    return slots + Int64(worker) * slot_bytes(config) + Int64(tid * (VECTOR * 4))


def slot_bytes(config: Config) -> int:
    """Bytes of one slot."""
    return config.tile_m * GROUP_ROWS * 4


def vector_address(config: Config, address: Any, index: int) -> Any:
    """Where a thread's ``index``-th sixteen bytes of a slot lie."""
    return address + index * (config.threads * VECTOR * 4)


def store_slot(config: Config, address: Any, sums: list[Any]) -> None:
    """Stores a thread's sums, as ``sm90_reduction`` has them; added to 0, which makes every NaN the one that is not taken for no sum."""
    for index in range(config.accumulators // VECTOR):
        own = reduction.add(sums[index * VECTOR : (index + 1) * VECTOR], [Float32(0.0)] * VECTOR)
        words = [reduction.inverted(each, Uint32) for each in own]
        reduction.put_slot_words_if(vector_address(config, address, index), Int32(1), words)


@cute.jit
def add_slot(config: cutlass.Constexpr, sums, address):
    """``sums`` with those of a slot added; waits until they are there, and clears them."""
    vectors, batch = config.accumulators // VECTOR, SLOT_BATCH[config.shape.warpgroups]
    for first in cutlass.range_constexpr(0, vectors, batch):
        addresses = [vector_address(config, address, index) for index in range(first, min(first + batch, vectors))]
        words = reduction.words_when_there(addresses, [Int32(1)] * len(addresses))
        begin, end = first * VECTOR, first * VECTOR + len(words)
        sums = sums[:begin] + reduction.add_words(sums[begin:end], words) + sums[end:]
        for each in addresses:
            reduction.put_slot_words_if(each, Int32(1), [Uint32(0)] * VECTOR)
    return sums


# ---- FC2: sums over tiles


def add_tile(
    config: Config, sums: list[Any], partials: Any, table: Any, slot: Any, count: Any, row_block: Any, tokens_total: Any, staged: Any,
    first_block: Any, lane: Any,
) -> None:  # fmt: skip
    """Adds row_alpha · sums of every row of the tile to its token's sums in the workspace; a row whose alpha is 0 adds nothing."""
    at = table + slot * (config.table_words * config.tile_m * 4)
    columns = partials + Int64(row_block) * Int64(tokens_total) * conversion.ROW_BYTES
    if config.staged_rows:
        places = [(lane + first) % config.tile_m * 4 for first in range(0, config.tile_m, 32)]
        tokens = [common.load_shared(at + place) for place in places]
        alphas = [common.load_shared(at + place + config.alphas_at, Float32) for place in places]
        outputs = wgmma.by_token_block(config, sums, config.tile_m)
        workspace.add_rows(config, config.staged_rows, columns, staged, outputs, alphas, tokens, count, lane)
        return
    column = lane // 4 * FC2_OUTPUTS + first_block * 2
    for block in range(config.token_blocks):
        for pair in range(2):
            place = block * common.MMA_TOKENS + lane % 4 * 2 + pair
            token = common.load_shared(at + place * 4)
            alpha = common.load_shared(at + config.alphas_at + place * 4, Float32)
            live = Int32(place < count) & common.differs_from_zero(alpha)
            address = columns + Int64(token) * conversion.ROW_BYTES + Int64(column * 4)
            values = workspace.scaled(config, outputs_of(config, sums, block, pair), alpha)
            for first in range(0, len(values), VECTOR):
                add_to_workspace(address + first * 4, live, values[first : first + VECTOR])


def outputs_of(config: Config, sums: list[Any], block: int, pair: int) -> list[Any]:
    """A lane's consecutive outputs of token ``2t + pair`` of a token block: two of each m16 block of its warpgroup."""
    own = config.token_blocks * common.ACCUMULATORS
    return [sums[m16 * own + block * common.ACCUMULATORS + pair + 2 * i] for m16 in range(config.blocks) for i in range(2)]


def store_tile(
    config: Config, sums: list[Any], rows: Any, table: Any, slot: Any, count: Any, staged: Any, first_block: Any, lane: Any
) -> None:
    """Stores row_alpha · sums of every row of the tile, the first at ``rows``; a row whose alpha is 0 is 0."""
    at = table + slot * (config.table_words * config.tile_m * 4) + config.alphas_at
    if config.staged_rows:
        alphas = [common.load_shared(at + (lane + first) % config.tile_m * 4, Float32) for first in range(0, config.tile_m, 32)]
        ordered.store_rows(config, config.staged_rows, rows, staged, wgmma.by_token_block(config, sums, config.tile_m), alphas, count, lane)
        return
    column = lane // 4 * FC2_OUTPUTS + first_block * 2
    for block in range(config.token_blocks):
        for pair in range(2):
            place = block * common.MMA_TOKENS + lane % 4 * 2 + pair
            values = ordered.scaled(config, outputs_of(config, sums, block, pair), common.load_shared(at + place * 4, Float32))
            for first in range(0, len(values), VECTOR):
                address = rows + Int64(place * conversion.ROW_BYTES + (column + first) * 4)
                store_if("v4.f32", address, Int32(place < count), values[first : first + VECTOR])
