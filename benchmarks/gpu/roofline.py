"""Estimate the speed of the Triton kernels on an H100 from their compiled code.

    python -m benchmarks.gpu.roofline

No GPU is needed, and nothing is measured. Instructions, registers, shared memory and bytes are
counted. Everything that the code does not show is a flag: the bandwidth of a copy, the utilisation
of a scheduler, latencies, and the speed of attention on a prompt.
"""

import argparse
import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.gpu.cases import RECENT, WINDOW
from benchmarks.gpu.compile import H100_CLOCK, H100_PROCESSORS, Job, Needs, compile_job
from mikv_vllm.evaluation.tables import markdown_table
from mikv_vllm.kernels.triton.layout import Layout
from mikv_vllm.kernels.triton.merge import TOKENS_AT_ONCE
from mikv_vllm.kernels.triton.native import PARTS
from mikv_vllm.kernels.triton.score import KEYS, SCORE_ROWS
from mikv_vllm.kernels.triton.select import BLOCK
from mikv_vllm.kernels.triton.splits import (
    HIGH_COST,
    LEAST_COST,
    LOW_COST,
    PROGRAMS,
    most_splits,
)
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS, LowFormat
from mikv_vllm.tiers.plan import TierSizes

TARGET = 90
REGISTERS, SHARED_BYTES, WARPS, SCHEDULERS = 65536, 228 << 10, 64, 4
"""Resources of a multiprocessor of compute capability 9.0."""
REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 256, 128, 1024
"""Allocation units of registers (per warp) and of shared memory (per program), and the shared
memory that every program needs in addition."""
BF16_SHARE = 0.9
"""Assumed bandwidth of attention on bf16, as a share of the bandwidth of a copy."""
LAYOUT, KV_HEADS = Layout(128, 4, 64, 8), 8
TORCH_LAUNCHES = 9
"""Launches by torch operations between the kernels of ``compress`` of a block."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions about the hardware."""

    bandwidth: float
    """Bytes per second of a copy."""
    utilisation: float
    """Share of cycles in which the busiest pipe of a scheduler is used."""
    latency: float
    """Latency of a load in seconds while memory is busy."""
    load: float
    """Latency of a load in seconds while memory is idle."""
    launch: float
    """Seconds to start a kernel."""
    replay: float
    """Seconds to start a kernel in a CUDA graph."""
    prefill: float
    """Floating-point operations per second of attention on a prompt."""

    @property
    def load_cycles(self) -> int:
        return int(self.load * H100_CLOCK)


def programs_at_once(needs: Needs) -> int:
    """Number of programs that fit on a multiprocessor."""
    warp_registers = -(-32 * needs.registers // REGISTER_UNIT) * REGISTER_UNIT
    shared = -(-(needs.shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by_registers = REGISTERS // warp_registers // needs.warps
    return min(by_registers, SHARED_BYTES // shared, WARPS // needs.warps, 32)


def block_bytes(tier: str, low_format: LowFormat) -> int:
    """Bytes of a block of 32 tokens. In the high tier, logits are written too."""
    if tier == "low":
        return LAYOUT.geometry.low(low_format).num_bytes
    return 2 * LAYOUT.geometry.high.num_bytes + 4 * LOW_RECORD_TOKENS * LAYOUT.queries_per_kv_head


def block_seconds(needs: Needs, assumed: Assumptions) -> dict[str, float]:
    """Seconds of a program per block of each tier, while its multiprocessor is full."""
    together = programs_at_once(needs)
    seconds = {}
    for tier, loop in zip(("low", "high"), needs.kernel.matrix_loops, strict=True):
        busy = together * needs.warps * max(loop.pipes.values()) / SCHEDULERS / assumed.utilisation
        seconds[tier] = max(busy, loop.alone(assumed.load_cycles)) / H100_CLOCK
    return seconds


def split_sizes(sizes: TierSizes, rows: int) -> list[tuple[str, int]]:
    """Tier and number of 32 tokens of each split of a block and KV head, as in ``splits_of``.

    Args:
        rows: blocks of all requests.
    """
    most = most_splits(PROGRAMS * H100_PROCESSORS, rows * KV_HEADS)
    records, blocks = sizes.low_records, -(-sizes.high_tokens // LOW_RECORD_TOKENS)
    low_cost = LOW_COST.value * records
    cost = low_cost + HIGH_COST.value * blocks
    splits = min(most, -(-cost // LEAST_COST.value) + 1)
    low = min(-(-low_cost * splits // cost), splits - 1)
    split_parts = []
    for tier, count, parts in (("low", records, low), ("high", blocks, splits - low)):
        split_parts += [(tier, count * (i + 1) // parts - count * i // parts) for i in range(parts)]
    return split_parts


def schedule(durations: list[float], slots: int) -> float:
    """End of the last program, if programs start in this order as soon as a slot is free."""
    ends = [0.0] * slots
    for duration in durations:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


def attend_rows(job: Job, needs: Needs) -> Iterator[dict]:
    """The loops of the decode kernel: their instructions and pipe cycles."""
    for tier, loop in zip(("low", "high"), needs.kernel.matrix_loops, strict=True):
        size = block_bytes(tier, job.low_format)
        pipes = dict(sorted(loop.pipes.items(), key=lambda pipe: -pipe[1])[:3])
        yield {
            "loop": job.low_format.name if tier == "low" else f"high, {job.low_format.name}",
            "bytes": size,
            "instructions": len(loop),
            "per byte": round(len(loop) / size, 2),
            **{kind: loop.mix[kind] for kind in ("tensor", "integer", "IMAD", "float", "convert")},
            **{kind: loop.mix[kind] for kind in ("shared", "shuffle", "other")},
            "loads": ", ".join(f"{n} of {32 * width} B" for width, n in sorted(loop.loads.items())),
            "cycles of pipes": ", ".join(f"{name} {cycles}" for name, cycles in pipes.items()),
            "warp alone": loop.alone(),
        }


def occupancy_rows(job: Job, needs: Needs, assumed: Assumptions) -> Iterator[dict]:
    """Number of programs that share a multiprocessor, and the bandwidth that this allows."""
    together = programs_at_once(needs)
    warps = together * needs.warps // SCHEDULERS
    needed = assumed.bandwidth / H100_PROCESSORS * assumed.latency
    for tier, loop in zip(("low", "high"), needs.kernel.matrix_loops, strict=True):
        size, busiest = block_bytes(tier, job.low_format), max(loop.pipes.values())
        copied = size * H100_PROCESSORS * SCHEDULERS / assumed.bandwidth * H100_CLOCK
        yield {
            "loop": job.low_format.name if tier == "low" else f"high, {job.low_format.name}",
            "registers": needs.registers,
            "shared": needs.shared,
            "programs": together,
            "KB in flight": round(together * size / 1e3, 1),
            "KB needed": round(needed / 1e3, 1),
            "busy, simulated": f"{busiest / loop.interleaved(warps):.0%}",
            "busy at 60 % of a copy": f"{0.6 * needs.warps * busiest / copied:.0%}",
        }


def decode_row(context: int, batch: int, ratio: float, assumed: Assumptions) -> dict:
    """Estimated time of decode attention over ``batch`` requests."""
    geometry = LAYOUT.geometry
    planner = BlockPlanner(geometry, ratio, RECENT)
    blocks = planner.blocks(context)
    tail = blocks[-1]
    merge = compile_job(Job("merge", LAYOUT, tail.low_format, "bf16", TARGET))
    rows = batch * KV_HEADS
    num_bytes = sum(
        geometry.high_bytes(block.sizes.high_tokens)
        + block.sizes.low_records * geometry.low(block.low_format).num_bytes
        for block in blocks
    )
    # Row, block table, header and first block are loaded one after the other.
    start = 4 * assumed.latency
    attend, programs = 0.0, 0
    formats = list(dict.fromkeys(block.low_format for block in blocks))
    for low_format in formats:  # a launch for each
        needs = compile_job(Job("attend", LAYOUT, low_format, "bf16", TARGET))
        per_block = block_seconds(needs, assumed)
        split_parts = [
            part
            for block in blocks
            if block.low_format == low_format
            for part in split_sizes(block.sizes, batch * len(blocks))
        ]
        durations = [start + count * per_block[tier] for tier, count in split_parts] * rows
        moved = rows * sum(count * block_bytes(tier, low_format) for tier, count in split_parts)
        attend += max(
            schedule(durations, H100_PROCESSORS * programs_at_once(needs)),
            start + moved / assumed.bandwidth,
        )
        programs += len(split_parts)
    partial = 4 * programs * LAYOUT.padded * (LAYOUT.heads + LAYOUT.queries_per_kv_head)
    high = 4 * tail.sizes.high_tokens * (LAYOUT.queries_per_kv_head + 2)
    trips = math.ceil(tail.sizes.high_tokens / TOKENS_AT_ONCE.value)
    chain = merge.kernel.code.alone(assumed.load_cycles)
    chain += (trips - 1) * merge.kernel.loops[-1].alone(assumed.load_cycles)
    last = max(rows * (partial + high) / assumed.bandwidth, chain / H100_CLOCK)
    seconds = attend + last + (1 + len(formats)) * assumed.replay
    native = rows * context * geometry.token_bytes
    bf16 = native / (BF16_SHARE * assumed.bandwidth) + 2 * assumed.replay
    copied = rows * num_bytes / assumed.bandwidth
    return {
        "context": context,
        "ratio": ratio,
        "formats": ", ".join(low_format.name for low_format in formats),
        "high": f"{sum(block.sizes.high_tokens for block in blocks) / context:.0%}",
        "MB": round(rows * num_bytes / 1e6, 1),
        "programs": programs * rows,
        "copy us": round(1e6 * copied, 1),
        "attend us": round(1e6 * attend, 1),
        "merge us": round(1e6 * last, 1),
        "sum us": round(1e6 * seconds, 1),
        "bf16 us": round(1e6 * bf16, 1),
        "of copy": f"{copied / seconds:.0%}",
        "speed-up": round(bf16 / seconds, 2),
    }


class Work(NamedTuple):
    """Work of one kernel."""

    kernel: str
    low_format: LowFormat
    programs: int
    trips: list[int]
    """Iterations of its loops."""
    num_bytes: int
    """Bytes that are read and written."""
    launches: int = 1


def prompt_work(context: int, ratio: float) -> Iterator[Work]:
    """Return the work of all kernels that score and compress a prompt."""
    geometry = LAYOUT.geometry
    planner = BlockPlanner(geometry, ratio, RECENT)
    rows = -(-WINDOW * LAYOUT.queries_per_kv_head // SCORE_ROWS)
    keys = KV_HEADS * context * geometry.token_bytes // 2
    part = -(-context // PARTS)
    programs = -(-context // KEYS.value) * KV_HEADS
    blocks = Counter((block.low_format, block.sizes) for block in planner.blocks(context))
    low_format = next(iter(blocks))[0]
    trips = [-(-part // KEYS.value)]
    yield Work("prompt_sums", low_format, rows * PARTS * KV_HEADS, trips, rows * keys)
    yield Work("prompt_scores", low_format, programs, [rows], keys)
    for (low_format, sizes), count in blocks.items():
        for work in block_work(low_format, sizes):
            yield work._replace(launches=count)


def block_work(low_format: LowFormat, sizes: TierSizes) -> Iterator[Work]:
    """Return the work of all kernels that compress one block."""
    geometry, tokens = LAYOUT.geometry, sizes.num_tokens
    high, records = sizes.high_tokens, sizes.low_records
    keys = KV_HEADS * tokens * geometry.token_bytes // 2
    part, a_pass = -(-tokens // PARTS), -(-tokens // BLOCK.value)
    high_records = -(-high // HIGH_RECORD_TOKENS)
    written = (
        KV_HEADS
        * records
        * (geometry.low(low_format).num_bytes + 2 * 2 * LOW_RECORD_TOKENS * LAYOUT.head_dim)
    )
    low_keys = KV_HEADS * records * LOW_RECORD_TOKENS * geometry.token_bytes
    high_bytes = KV_HEADS * (high * geometry.token_bytes + high_records * geometry.high.num_bytes)
    yield Work("select", low_format, KV_HEADS, [a_pass] * 5, 5 * 4 * KV_HEADS * tokens)
    yield Work("measure", low_format, PARTS * KV_HEADS, [-(-part // KEYS.value)], keys)
    yield Work("frame", low_format, KV_HEADS, [], 0)
    yield Work("write_high", low_format, high_records * KV_HEADS, [], high_bytes)
    yield Work("write_low", low_format, records * KV_HEADS, [], low_keys + written)


def prompt_rows(context: int, ratio: float, assumed: Assumptions) -> Iterator[dict]:
    """Estimated time to score and compress a prompt, kernel by kernel."""
    heads = KV_HEADS * LAYOUT.queries_per_kv_head
    prefill = 2 * context**2 * heads * LAYOUT.head_dim / assumed.prefill
    seconds, launches = (
        0.0,
        TORCH_LAUNCHES * len(BlockPlanner(LAYOUT.geometry, ratio, RECENT).blocks(context)),
    )
    for name, low_format, programs, trips, num_bytes, count in prompt_work(context, ratio):
        needs = compile_job(Job(name, LAYOUT, low_format, "bf16", TARGET))
        loops = needs.kernel.loops
        assert len(loops) == len(trips), f"{name} has {len(loops)} loops"
        extra = [(loop, turns - 1) for loop, turns in zip(loops, trips, strict=True)]
        issued = len(needs.kernel.code) + sum(len(loop) * turns for loop, turns in extra)
        chain = needs.kernel.code.alone(assumed.load_cycles)
        chain += sum(loop.alone(assumed.load_cycles) * turns for loop, turns in extra)
        waves = -(-programs // (H100_PROCESSORS * programs_at_once(needs)))
        slots = H100_PROCESSORS * SCHEDULERS * H100_CLOCK * assumed.utilisation
        limits = {
            "memory": count * num_bytes / assumed.bandwidth,
            "issue": count * programs * needs.warps * issued / slots,
            "latency": count * waves * chain / H100_CLOCK,
        }
        limit = max(limits, key=limits.__getitem__)
        seconds += limits[limit]
        launches += count
        yield {
            "context": context,
            "kernel": name,
            "launches": count,
            "programs": programs,
            "at once": H100_PROCESSORS * programs_at_once(needs),
            "instructions per warp": issued,
            "MB": round(count * num_bytes / 1e6, 1),
            **{f"{key} us": round(1e6 * value, 1) for key, value in limits.items()},
            "us": round(1e6 * limits[limit], 1),
            "of prefill": f"{limits[limit] / prefill:.2%}",
        }
    started = launches * assumed.launch
    yield {
        "context": context,
        "kernel": "sum",
        "launches": launches,
        **dict.fromkeys(("programs", "at once", "instructions per warp", "MB"), None),
        **dict.fromkeys(("memory us", "issue us", "latency us"), None),
        "us": round(1e6 * (seconds + started), 1),
        "of prefill": f"{(seconds + started) / prefill:.2%}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ratios", nargs="+", type=float, default=[2, 4])
    parser.add_argument("--bandwidth", type=float, default=3.0, help="TB/s of a copy")
    parser.add_argument(
        "--utilisation", type=float, default=0.7, help="share of cycles of the busiest pipe"
    )
    parser.add_argument(
        "--latency", type=float, default=800, help="ns of a load while memory is busy"
    )
    parser.add_argument("--load", type=float, default=300, help="ns of a load while memory is idle")
    parser.add_argument("--launch", type=float, default=3, help="us to start a kernel")
    parser.add_argument("--replay", type=float, default=1, help="us to start a kernel in a graph")
    parser.add_argument(
        "--prefill", type=float, default=600, help="TFLOP/s of attention on a prompt"
    )
    args = parser.parse_args()
    assumed = Assumptions(
        1e12 * args.bandwidth,
        args.utilisation,
        1e-9 * args.latency,
        1e-9 * args.load,
        1e-6 * args.launch,
        1e-6 * args.replay,
        1e12 * args.prefill,
    )
    formats = dict.fromkeys(
        block.low_format
        for ratio in args.ratios
        for context in args.contexts
        for block in BlockPlanner(LAYOUT.geometry, ratio, RECENT).blocks(context)
    )
    jobs = [Job("attend", LAYOUT, low_format, "bf16", TARGET) for low_format in formats]
    compiled = [(job, compile_job(job)) for job in jobs]
    tables = (
        ("Loops of the decode kernel", [row for one in compiled for row in attend_rows(*one)]),
        ("Occupancy", [row for one in compiled for row in occupancy_rows(*one, assumed)]),
        (
            f"Decode, batch {args.batch}: expected",
            [decode_row(n, args.batch, r, assumed) for r in args.ratios for n in args.contexts],
        ),
        (
            f"Score and compress, ratio {args.ratios[-1]:g}: expected",
            [row for n in args.contexts for row in prompt_rows(n, args.ratios[-1], assumed)],
        ),
    )
    for title, rows in tables:
        print(f"\n{title}\n\n{markdown_table(rows)}", flush=True)


if __name__ == "__main__":
    main()
