"""Measure the host time to launch the kernels of a decode step of one layer, without a GPU.

    python -m benchmarks.gpu.launches

Triton's compiler and launcher for an H100 are used with a driver that does nothing. The time that
CUDA needs for a launch, some microseconds, is not included.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from mikv_vllm.evaluation.tables import markdown_table
from mikv_vllm.kernels.batch import DecodeRow
from mikv_vllm.kernels.triton import DecodeBatch, LayerOps, Scratch
from mikv_vllm.kernels.triton.jit import Kernel
from mikv_vllm.tiers.blocks import BlockPlanner, TailStep
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS, TierGeometry

HEAD_DIM, HEADS, KV_HEADS, BLOCK_SIZE, RECENT = 128, 32, 8, 16, 16
CONTEXT, RATIO = 2048, 4.0


class Driver:
    """A driver of Triton that describes an H100 and launches nothing.

    ``loaded`` counts the compiled binaries by kernel.
    """

    def __init__(self) -> None:
        self.loaded: Counter[str] = Counter()
        self.utils = SimpleNamespace(
            load_binary=self._load, get_device_properties=lambda _: {"max_shared_mem": 227 << 10}
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        return lambda *_: None

    def _load(self, name: str, _binary: bytes, _shared: int, _device: int) -> tuple:
        self.loaded[name] += 1
        return 1, 1, 0, 0, 1024


def decode_step(requests: int, demoting: bool) -> Callable[[], None]:
    """Set up the decode step of one layer with equal requests, one of which can demote.

    Returns the function that launches it.
    """
    ops = LayerOps(
        HEAD_DIM,
        HEADS,
        KV_HEADS,
        BLOCK_SIZE,
        high_bits=8,
        scale=HEAD_DIM**-0.5,
        softcap=0.0,
        sinks=None,
        decay=0.98,
        recent=RECENT,
        scratch=Scratch("cpu"),
        programs=2112,
    )
    geometry = TierGeometry(HEAD_DIM, BLOCK_SIZE, 8)
    planner = BlockPlanner(geometry, RATIO, RECENT)
    *sealed, last = planner.blocks(CONTEXT - 1)
    tail = planner.lengthen(last.sizes, last.sizes.pages + 1)  # room for the new token
    rows: list[DecodeRow] = []
    for row in range(requests):
        for block in sealed:
            read = TailStep(0, (), False, 0, block.sizes)
            rows.append((row, range(block.sizes.pages), block.sizes, read, block.low_format))
        demoted = int(demoting and row == 0)
        after = replace(
            tail,
            high_tokens=tail.high_tokens + 1 - LOW_RECORD_TOKENS * demoted,
            low_records=tail.low_records + demoted,
        )
        step = TailStep(1, (), False, demoted, after)
        rows.append((row, range(tail.pages), tail, step, last.low_format))
    batch = DecodeBatch.build(rows, "cpu")
    shape = (
        max(tail.pages, *(block.sizes.pages for block in sealed)),
        KV_HEADS,
        BLOCK_SIZE,
        2 * HEAD_DIM,
    )
    cache = torch.zeros(shape, dtype=torch.bfloat16)
    q = torch.zeros(requests, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    k = torch.zeros(requests, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    return lambda: ops.decode(cache, batch, q, k, k, q)


def microseconds(run: Callable[[], None], times: int = 50) -> float:
    """Mean time of a run. A first run, which compiles, is not measured."""
    run()
    start = time.perf_counter()
    for _ in range(times):
        run()
    return 1e6 * (time.perf_counter() - start) / times


def tritons_launch(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., object]:
    """Launch a kernel as Triton does."""
    return partial(kernel.jit[grid], **kernel.options)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    triton.runtime.driver.set_active(Driver())
    rows = []
    for name, demoting in (("no demotion", False), ("one request demotes", True)):
        run = decode_step(args.requests, demoting)
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(microseconds(run))
            with patch.object(Kernel, "__getitem__", tritons_launch):
                theirs.append(microseconds(run))
        rows.append(
            {
                "step": name,
                "Triton's launch, us": round(median(theirs)),
                "MiKV, us": round(median(ours)),
            }
        )
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
