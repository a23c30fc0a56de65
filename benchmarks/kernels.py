"""Measure the CPU kernels: bytes, GB/s, and the share of this machine's read bandwidth.

    python -m benchmarks.kernels

The decode step reads the caches of many layers in turn, as in a model, so the data comes from
memory and not from a cache of the CPU.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from mikv_vllm.kernels import cpu
from mikv_vllm.tiers.blocks import BlockPlanner, TailStep
from mikv_vllm.tiers.formats import LADDER, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import TierSizes

HEAD_DIM, HEADS, KV_HEADS, BLOCK_SIZE, RECENT = 64, 9, 3, 64, 16
"""The embedded model's attention."""
LOW_FORMAT = LowFormat((6, 4, 3, 3), 3)
NAME = LOW_FORMAT.name


def seconds(run: Callable[[], None], repeat: int = 7) -> float:
    """Return the median time of a call, after one call that is not timed."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def read_bandwidth() -> float:
    """Measure the bytes per second that the threads in use read from memory."""
    data = torch.ones(512 << 20, dtype=torch.uint8).view(torch.int64)
    return data.nbytes / seconds(data.max, 5)


def layer_ops(geometry: TierGeometry, heads: int, kv_heads: int) -> cpu.LayerOps:
    """Set up the kernels of a layer for vLLM's plain layout: keys transposed, values in rows."""
    size = geometry.block_size * geometry.head_dim
    keys = torch.arange(size, dtype=torch.int32).view(geometry.head_dim, geometry.block_size)
    return cpu.LayerOps(
        geometry.head_dim,
        heads,
        kv_heads,
        geometry.block_size,
        geometry.high_bits,
        torch.bfloat16,
        geometry.head_dim**-0.5,
        0.0,
        None,
        0.98,
        RECENT,
        keys.T.flatten(),
        size + torch.arange(size, dtype=torch.int32),
    )


class Prompt:
    """A native request in one layer, and the blocks that it is compressed into.

    Args:
        geometry: sizes of pages and records.
        heads, kv_heads: query heads and KV heads.
        num_tokens: tokens of the request.
        ratio: requested compression ratio.
    """

    def __init__(
        self, geometry: TierGeometry, heads: int, kv_heads: int, num_tokens: int, ratio: float
    ) -> None:
        self.ops = layer_ops(geometry, heads, kv_heads)
        self.num_tokens = num_tokens
        self.planner = BlockPlanner(geometry, ratio, RECENT)
        self.blocks = self.planner.blocks(num_tokens)
        count = self.planner.native_pages(num_tokens)
        pages = [block.sizes.pages for block in self.blocks]
        shape = (count + sum(pages), kv_heads, geometry.page_bytes // 2)
        self.cache = torch.randn(shape).to(torch.bfloat16)
        self.native = torch.arange(count, dtype=torch.int32)
        self.tables = torch.arange(count, len(self.cache), dtype=torch.int32).split(pages)
        self.q = torch.randn(32, heads, geometry.head_dim, dtype=torch.bfloat16)
        self.scores = torch.rand(kv_heads, num_tokens)

    def score(self) -> None:
        self.ops.score(self.cache, self.native, self.num_tokens, self.q, self.scores)

    def compress(self) -> None:
        first = 0
        for block, table in zip(self.blocks, self.tables, strict=True):
            self.ops.compress(
                self.cache,
                self.native[first // BLOCK_SIZE :],
                table,
                block.sizes,
                block.low_format,
                self.scores[:, first:],
                self.q,
                RECENT if block is self.blocks[-1] else 0,
            )
            first += block.sizes.num_tokens


class FullTail:
    """A full tail in one layer, which is written anew as a sealed block.

    Args:
        geometry: sizes of pages and records.
        heads, kv_heads: query heads and KV heads.
        ratio: requested compression ratio.
    """

    def __init__(self, geometry: TierGeometry, heads: int, kv_heads: int, ratio: float) -> None:
        self.ops = layer_ops(geometry, heads, kv_heads)
        planner = BlockPlanner(geometry, ratio, RECENT)
        self.tail, self.block = planner.tail_form(0), planner.sealed_form(0)
        self.num_tokens, pages = planner.block_tokens, self.tail.sizes.pages
        count = planner.native_pages(self.num_tokens)
        self.native = torch.randn(count, kv_heads, geometry.page_bytes // 2).to(torch.bfloat16)
        self.cache = torch.cat([self.native, torch.zeros_like(self.native[:pages])])
        self.table = torch.arange(count, count + pages, dtype=torch.int32)
        q = torch.randn(32, heads, geometry.head_dim, dtype=torch.bfloat16)
        scores = torch.rand(kv_heads, self.num_tokens)
        table = torch.arange(count, dtype=torch.int32)
        form = self.tail.sizes, self.tail.low_format
        self.ops.compress(self.cache, table, self.table, *form, scores, q, RECENT)
        self.filled = self.cache.clone()

    def seal(self) -> None:
        self.cache.copy_(self.filled)
        tail = self.table, self.tail.sizes, self.tail.low_format
        block = self.table[: self.block.sizes.pages], self.block.sizes, self.block.low_format
        self.ops.seal_tail(self.cache, tail, block, self.native, RECENT)


class Decode:
    """A decode step of several layers and requests, all with the same sizes.

    Args:
        head_dim: channels of a head.
        heads, kv_heads: query heads and KV heads.
        low_format: format of the low tier.
        high_tokens, low_records: sizes of each block.
        blocks: blocks of each request.
        requests: number of requests.
        layers: number of layers.
    """

    def __init__(
        self,
        head_dim: int,
        heads: int,
        kv_heads: int,
        low_format: LowFormat,
        high_tokens: int,
        low_records: int,
        blocks: int,
        requests: int,
        layers: int,
    ) -> None:
        geometry = TierGeometry(head_dim, BLOCK_SIZE)
        record, page = geometry.low(low_format).num_bytes, geometry.page_bytes
        pages = -(-(geometry.high_bytes(high_tokens + 1) + low_records * record) // page)
        before = TierSizes(pages, high_tokens, low_records, pages * page)
        after = TierSizes(pages, high_tokens + 1, low_records, pages * page)
        read, append = TailStep(0, (), False, 0, before), TailStep(1, (), False, 0, after)
        rows = requests * blocks
        order = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
        self.batch = cpu.DecodeBatch.build(
            [
                (
                    row // blocks,
                    order[row].numpy(),
                    before,
                    append if row % blocks == blocks - 1 else read,
                    low_format,
                )
                for row in range(rows)
            ]
        )
        # All bytes are valid integers. As fp16 metadata, bytes from 40 to 79 are moderate numbers.
        self.caches = [
            torch.randint(40, 80, (rows * pages, kv_heads, page), dtype=torch.uint8)
            for _ in range(layers)
        ]
        self.ops = layer_ops(geometry, heads, kv_heads)
        self.q = torch.randn(requests, heads, head_dim).to(torch.bfloat16)
        self.k, self.v = (torch.randn(2, requests, kv_heads, head_dim)).to(torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.items = rows * kv_heads * layers
        self.bytes = self.items * (geometry.high_bytes(high_tokens) + low_records * record)
        self.low_records = self.items * low_records

    def __call__(self) -> None:
        for cache in self.caches:
            self.ops.decode(cache, self.batch, self.q, self.k, self.v, self.out)


def decode_rows(isa: str, bandwidth: float) -> None:
    """Print a line for each decode step: sizes, low formats, head sizes and query heads."""
    for name, head_dim, queries_per_kv_head, low_format, high, low, blocks, requests, layers in (
        (f"1 x 528 tokens, {NAME}, in the CPU cache", 64, 3, LOW_FORMAT, 16, 16, 1, 1, 1),
        *((f"4 x 8k, {f.name}", 64, 3, f, 16, 62, 4, 4, 12) for f in LADDER),
        (f"4 x 8k, {NAME}, 10 % high", 64, 3, LOW_FORMAT, 200, 56, 4, 4, 12),
        (f"16 x 2k, {NAME}", 64, 3, LOW_FORMAT, 16, 62, 1, 16, 12),
        (f"4 x 8k, {NAME}, 1 query per KV head", 64, 1, LOW_FORMAT, 16, 62, 4, 4, 12),
        (f"4 x 8k, {NAME}, head size 128, 4 queries", 128, 4, LOW_FORMAT, 16, 62, 4, 4, 6),
        (f"4 x 8k, {NAME}, head size 128, 8 queries", 128, 8, LOW_FORMAT, 16, 62, 4, 4, 6),
        ("4 x 4k, high tier only", 64, 3, LOW_FORMAT, 2000, 0, 2, 4, 12),
    ):
        count = min(layers, 2) if isa == "scalar" else layers
        heads = KV_HEADS * queries_per_kv_head
        step = Decode(head_dim, heads, KV_HEADS, low_format, high, low, blocks, requests, count)
        time_taken = seconds(step, 200 if count == 1 else 7)
        rate = step.bytes / time_taken
        per_record = f"{1e9 * time_taken / step.low_records:.1f}" if step.low_records else ""
        print(
            f"{isa:7} {name:42} {1e-6 * step.bytes:8.2f} {1e3 * time_taken:9.3f} {1e-9 * rate:6.1f}"
            f" {rate / bandwidth:9.0%} {per_record:>17} {1e6 * time_taken / count:12.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument(
        "--isas",
        nargs="+",
        choices=cpu.isas(),
        default=cpu.isas(),
        help="instruction sets to measure (default: all of this machine)",
    )
    parser.add_argument(
        "--tokens", type=int, default=4096, help="tokens of the prompt (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    print(f"{args.threads} thread(s); reading memory: {1e-9 * bandwidth:.1f} GB/s")
    print(
        f"{'ISA':7} {'requests, or operation':42} {'MB':>8} {'ms':>9} {'GB/s':>6}"
        f" {'of memory':>9} {'ns per low record':>17} {'us per layer':>12}"
    )
    geometry = TierGeometry(HEAD_DIM, BLOCK_SIZE)
    for isa in args.isas:
        cpu.set_isa(isa)
        decode_rows(isa, bandwidth)
        prompt = Prompt(geometry, HEADS, KV_HEADS, args.tokens, 4.0)
        full = FullTail(geometry, HEADS, KV_HEADS, 4.0)
        for name, run, tokens in (
            ("score 32 queries", prompt.score, args.tokens),
            ("compress", prompt.compress, args.tokens),
            ("seal a tail", full.seal, full.num_tokens),
        ):
            taken, time_taken = tokens * KV_HEADS * geometry.token_bytes, seconds(run)
            print(
                f"{isa:7} {f'{name}, {tokens} tokens':42} {1e-6 * taken:8.2f}"
                f" {1e3 * time_taken:9.3f} {1e-9 * taken / time_taken:6.1f}"
            )


if __name__ == "__main__":
    main()
