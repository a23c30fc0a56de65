"""Compile every kernel ahead of time, without a GPU, and print the resources that it needs.

    python -m benchmarks.gpu.compile            # all low formats, for three targets
    python -m benchmarks.gpu.compile --quick    # the part that the tests run

Exits with status 1 if the decode kernel spills registers.
"""

import argparse
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import sass
from mikv_vllm.kernels.triton import attend, change, compress, extend, merge, restore, score
from mikv_vllm.kernels.triton.batch import families_of
from mikv_vllm.kernels.triton.layout import Layout, LowFormats, LowLines
from mikv_vllm.kernels.triton.native import PARTS
from mikv_vllm.kernels.triton.score import SCORE_ROWS
from mikv_vllm.tiers.formats import LADDER, LADDERS, LowFormat

TARGETS = {80: "A100", 90: "H100", 100: "B200"}
INT32, BYTES, FLOAT = "*i32", "*u8", "*fp32"
TYPES = {
    "pages": INT32,
    "rows": INT32,
    "tables": INT32,
    "order": INT32,
    "starts": INT32,
    "channels": "*i64",
    "native_table": INT32,
    "tiered_table": INT32,
    "copied": INT32,
    "copied_table": INT32,
    "integers": BYTES,
    "hadamard": "*bf16",
    "partial": FLOAT,
    "partial_out": FLOAT,
    "partial_sums": FLOAT,
    "high_logits": FLOAT,
    "scores": FLOAT,
    "merged": FLOAT,
    "sums": FLOAT,
    "sinks": FLOAT,
    "ranges": "*fp64",
    "largest_queries": FLOAT,
    "scale": "fp32",
    "decay": "fp32",
    "keep": "fp32",
    "hadamard_scale": "fp32",
}
NATIVE = {"q", "k", "v", "out", "keys", "values"}
"""Pointers to numbers in the dtype of the cache."""
KERNELS = {
    "attend": attend.attend_kernel,
    "merge": merge.merge_kernel,
    "change": change.change_kernel,
    "append": change.append_kernel,
    "select": compress.select_kernel,
    "measure": compress.measure_kernel,
    "frame": compress.frame_kernel,
    "write_high": compress.write_high_kernel,
    "write_low": compress.write_low_kernel,
    "prompt_sums": score.prompt_sums_kernel,
    "prompt_scores": score.prompt_scores_kernel,
    "restore_high": restore.restore_high_kernel,
    "restore_low": restore.restore_low_kernel,
    "choose": extend.choose_kernel,
    "extend_high": extend.extend_high_kernel,
    "extend_low": extend.extend_low_kernel,
}
BY_FORMAT = {"attend", "change", "frame", "write_low", "restore_low", "extend_low"}


H100_PROCESSORS, H100_CLOCK = 132, 1.755e9
"""Multiprocessors, and cycles per second, of the SXM board."""
H100_SLOTS = H100_PROCESSORS * 4 * H100_CLOCK
"""Warp instructions per second. A multiprocessor has four schedulers."""
H100_BANDWIDTH = 3.35e12
"""Bytes per second, from the data sheet."""


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel for a layer, a low format and a target."""

    kernel: str
    layout: Layout
    low_format: LowFormat
    dtype: str
    target: int
    ladder: tuple[LowFormat, ...] = ()
    """Low formats of the decode kernel; without them, :attr:`low_format` only."""

    @property
    def name(self) -> str:
        layout = self.layout
        parts = [self.kernel, f"{layout.head_dim}x{layout.queries_per_kv_head}", self.dtype]
        if self.ladder:
            parts.append(f"{len(self.ladder)} formats")
        elif self.kernel in BY_FORMAT:
            parts.append(self.low_format.name)
        if layout.high_bits != 8:
            parts.append(f"high{layout.high_bits}")
        return " ".join(parts)


@dataclass(frozen=True)
class Needs:
    """Resources of a compiled kernel."""

    registers: int
    stack: int
    """Bytes of local memory per thread. More than 0 means that registers are spilled."""
    shared: int
    """Bytes of shared memory per program."""
    warps: int
    kernel: sass.Kernel


@cache
def compile_job(job: Job) -> Needs:
    """Compile a kernel and read its resources from the binary."""
    kernel = KERNELS[job.kernel]
    low = job.low_format
    constants = {
        "LAYER": job.layout,
        "FORMAT": LowLines(job.layout.head_dim, low),
        "FORMATS": LowFormats(job.layout.head_dim, job.ladder or (low,)),
        "SOFTCAP": 0.0,
        "HAS_SINKS": False,
        "PARTS": PARTS,
        "ROWS": SCORE_ROWS,
        "DTYPE": {"bf16": tl.bfloat16, "fp16": tl.float16}[job.dtype],
    }
    signature, constexprs, attributes = {}, {}, {}
    for i, name in enumerate(kernel.names):
        if name in kernel.integers:
            signature[name] = "i32"
        else:
            signature[name] = f"*{job.dtype}" if name in NATIVE else TYPES[name]
        if signature[name] != "fp32" and name not in kernel.counts | kernel.tables:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name in kernel.constants:
        signature[name], constexprs[name] = "constexpr", constants[name]
    options = dict(kernel.options)
    if job.kernel == "attend":
        options["num_warps"] = job.layout.warps
    if job.kernel == "write_low":
        options |= job.layout.write_options
    compiled = triton.compile(
        ASTSource(fn=kernel.jit, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", job.target, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage = sass.run_tool("cuobjdump", "-res-usage", binary.name)
        code = sass.disassemble(Path(binary.name))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Needs(
        int(registers),
        int(stack),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        code,
    )


def jobs(quick: bool, targets: list[int]) -> list[Job]:
    """Return the compilations.

    The heads of Llama-3.1-8B are compiled for all low formats, other heads for some.
    """
    llama, balanced = Layout(128, 4, 64, 8), LADDERS["balanced"]
    formats = LADDER[3:4] + balanced[1:2] if quick else LADDER + balanced
    shapes = [(llama, "bf16", formats)]
    shapes += [(Layout(128, 8, 64, 8), "bf16", LADDER[3:4])]
    if not quick:
        shapes += [
            (Layout(64, 4, 64, 8), "bf16", LADDER),
            (Layout(128, 4, 64, 16), "bf16", LADDER[3:4]),
            (Layout(128, 4, 64, 8), "fp16", LADDER[3:4]),
            (Layout(80, 1, 64, 8), "fp16", LADDER[4:5]),
            (Layout(96, 1, 64, 8), "bf16", LADDER[4:5]),
            (Layout(256, 8, 64, 8), "bf16", LADDER[3:4]),
        ]
    by_format = {"attend", "write_low"} if quick else BY_FORMAT
    every = []
    for target in targets:
        for i, (layout, dtype, formats) in enumerate(shapes):
            for j, low_format in enumerate(formats):
                first = not i and not j
                if first or not quick or target == 90:
                    names = KERNELS if first else by_format
                    every += [Job(name, layout, low_format, dtype, target) for name in names]
            if not quick:
                every += [
                    Job("attend", layout, family[0], dtype, target, family)
                    for family in families_of(formats)
                    if len(family) > 1
                ]
    return every


def table(every: list[Job], needs: list[Needs]) -> str:
    """Format the resources, one line per job."""
    head = f"{'kernel':28} {'target':>7} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>7}"
    lines = [f"{head} {'instructions':>12}"]
    for job, need in zip(every, needs, strict=True):
        lines.append(
            f"{job.name:28} {f'sm_{job.target}':>7} {need.warps:5} {need.registers:9} "
            f"{need.stack:5} {need.shared:7} {len(need.kernel.code):12}"
        )
    return "\n".join(lines)


def decode_table(every: list[Job], needs: list[Needs]) -> str:
    """Format the instructions of the decode kernel per byte of cache.

    They show whether the kernel is limited by instructions rather than by memory.
    """
    slots = H100_SLOTS / H100_BANDWIDTH
    lines = [
        "decode: instructions of all warps per block of 32 tokens; an H100 issues "
        f"{slots:.3f} in the time in which it reads one byte",
        f"{'kernel':28} {'target':>7} {'tier':>5} {'instructions':>12} {'bytes':>6} "
        f"{'per byte':>9}",
    ]
    for job, need in zip(every, needs, strict=True):
        layout, low = job.layout, job.low_format
        loops = need.kernel.matrix_loops
        if job.kernel != "attend" or layout.high_bits != 8 or len(loops) != 2:
            continue
        blocks = (layout.geometry.low(low).num_bytes, 2 * layout.geometry.high.num_bytes)
        for tier, loop, size in zip(("low", "high"), loops, blocks, strict=True):
            count = len(loop) * need.warps
            lines.append(
                f"{job.name:28} {f'sm_{job.target}':>7} {tier:>5} {count:12} {size:6} "
                f"{count / size:9.3f}"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one low format of each codec")
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    every = [job for job in jobs(args.quick, args.targets) if job.kernel in args.kernels]
    with ProcessPoolExecutor(args.jobs) as pool:
        needs = list(pool.map(compile_job, every))
    print(table(every, needs))
    print()
    print(decode_table(every, needs))
    spilling = {job.name for job, need in zip(every, needs, strict=True) if need.stack}
    if spilling:
        print(f"spills: {', '.join(sorted(spilling))}", file=sys.stderr)
    return 1 if any(name.startswith("attend") for name in spilling) else 0


if __name__ == "__main__":
    sys.exit(main())
