"""CPU kernels alone: bytes moved, GB/s and share of this machine's read bandwidth.

``python -m benchmarks.kernels``. Single thread unless ``--threads`` says otherwise. The decode
table reads a cache that no CPU cache holds: many layers in turn, as a model does.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from mikv_vllm.kernels import cpu
from mikv_vllm.tiers.formats import LADDER, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import AppendStep, TierPlanner, TierSizes

HEAD_DIM, HEADS, KV_HEADS, BLOCK_SIZE, RECENT = 64, 9, 3, 64, 16
"""The embedded model's attention."""
K4V3 = LowFormat((6, 4, 3, 3), 3)


def seconds(run: Callable[[], None], repeat: int = 7) -> float:
    """Median time of a call, after one that does not count."""
    run()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def read_bandwidth() -> float:
    """Bytes per second that the threads in use read from memory."""
    data = torch.ones(512 << 20, dtype=torch.uint8).view(torch.int64)
    return data.nbytes / seconds(data.max, 5)


def layer_ops(geometry: TierGeometry, heads: int, kv_heads: int) -> cpu.LayerOps:
    """A layer's kernels on pages in vLLM's plain layout: keys transposed, values in rows."""
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
    """Native requests of one layer, and their compressed pages."""

    def __init__(
        self, geometry: TierGeometry, heads: int, kv_heads: int, num_tokens: int, ratio: float
    ) -> None:
        self.ops = layer_ops(geometry, heads, kv_heads)
        self.num_tokens = num_tokens
        planner = TierPlanner.choose(geometry, ratio, RECENT, num_tokens)
        sizes = planner.compress(num_tokens)
        assert sizes is not None
        self.sizes, self.low_format = sizes, planner.low_format
        count = planner.native_pages(num_tokens)
        shape = (count + sizes.pages, kv_heads, geometry.page_bytes // 2)
        self.cache = torch.randn(shape).to(torch.bfloat16)
        self.native = torch.arange(count, dtype=torch.int32)
        self.tiered = torch.arange(count, count + sizes.pages, dtype=torch.int32)
        self.q = torch.randn(32, heads, geometry.head_dim, dtype=torch.bfloat16)
        self.scores = torch.rand(kv_heads, num_tokens)

    def score(self) -> None:
        self.ops.score(self.cache, self.native, self.num_tokens, self.q, self.scores)

    def compress(self) -> None:
        self.ops.compress(
            self.cache,
            self.native,
            self.tiered,
            self.sizes,
            self.low_format,
            self.scores,
            self.q,
        )


class Decode:
    """A decode step over several layers and rows, all of them at the same length."""

    def __init__(
        self,
        head_dim: int,
        heads: int,
        kv_heads: int,
        low_format: LowFormat,
        high_tokens: int,
        low_records: int,
        rows: int,
        layers: int,
    ) -> None:
        geometry = TierGeometry(head_dim, BLOCK_SIZE)
        record, page = geometry.low(low_format).num_bytes, geometry.page_bytes
        pages = -(-(geometry.high_bytes(high_tokens + 1) + low_records * record) // page)
        before = TierSizes(pages, high_tokens, low_records, pages * page)
        step = AppendStep(1, 0, 0, 0, TierSizes(pages, high_tokens + 1, low_records, pages * page))
        order = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
        self.batch = cpu.DecodeBatch.build(
            [(row, order[row].numpy(), before, step, low_format) for row in range(rows)]
        )
        # Any bytes are a valid cache of integers; metadata of 0x3x bytes gives moderate numbers.
        self.caches = [
            torch.randint(40, 80, (rows * pages, kv_heads, page), dtype=torch.uint8)
            for _ in range(layers)
        ]
        self.ops = layer_ops(geometry, heads, kv_heads)
        self.q = torch.randn(rows, heads, head_dim).to(torch.bfloat16)
        self.k, self.v = (torch.randn(2, rows, kv_heads, head_dim)).to(torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.items = rows * kv_heads * layers
        self.bytes = self.items * (geometry.high_bytes(high_tokens) + low_records * record)
        self.chunks = self.items * low_records

    def __call__(self) -> None:
        for cache in self.caches:
            self.ops.decode(cache, self.batch, self.q, self.k, self.v, self.out)


def decode_rows(isa: str, bandwidth: float) -> None:
    for name, head_dim, group, low_format, high, low, rows, layers in (
        ("8k, in cache", 64, 3, K4V3, 16, 16, 1, 1),
        *((f"8k x 4 {f.name}", 64, 3, f, 16, 248, 4, 12) for f in LADDER),
        ("8k x 4 K4V3, 10% high", 64, 3, K4V3, 800, 224, 4, 12),
        ("2k x 16 K4V3", 64, 3, K4V3, 16, 62, 16, 12),
        ("8k x 4 K4V3, 1 query head", 64, 1, K4V3, 16, 248, 4, 12),
        ("8k x 4 K4V3, head_dim 128, 4 heads", 128, 4, K4V3, 16, 248, 4, 6),
        ("8k x 4 K4V3, head_dim 128, 8 heads", 128, 8, K4V3, 16, 248, 4, 6),
        ("8k x 4 all high", 64, 3, K4V3, 4000, 0, 4, 12),
    ):
        count = min(layers, 2) if isa == "scalar" else layers
        step = Decode(head_dim, KV_HEADS * group, KV_HEADS, low_format, high, low, rows, count)
        time_taken = seconds(step, 200 if count == 1 else 7)
        rate = step.bytes / time_taken
        per_chunk = 1e9 * time_taken / step.chunks if step.chunks else float("nan")
        print(
            f"{isa:7} {name:36} {1e-6 * step.bytes:8.2f} MB {1e3 * time_taken:8.3f} ms"
            f" {1e-9 * rate:6.1f} GB/s {100 * rate / bandwidth:4.0f} %"
            f" {per_chunk:7.1f} ns/chunk {1e6 * time_taken / count:8.1f} us/layer"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isas", nargs="+", default=cpu.isas())
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bandwidth = read_bandwidth()
    print(f"{args.threads} thread(s); memory reads {1e-9 * bandwidth:.1f} GB/s")
    geometry = TierGeometry(HEAD_DIM, BLOCK_SIZE)
    for isa in args.isas:
        cpu.set_isa(isa)
        decode_rows(isa, bandwidth)
        prompt = Prompt(geometry, HEADS, KV_HEADS, args.tokens, 4.0)
        taken = args.tokens * KV_HEADS * geometry.token_bytes
        for name, run in (("score 32 queries", prompt.score), ("compress", prompt.compress)):
            time_taken = seconds(run)
            print(
                f"{isa:7} {f'{name}, {args.tokens} tokens':36} {1e-6 * taken:8.2f} MB"
                f" {1e3 * time_taken:8.3f} ms {1e-9 * taken / time_taken:6.1f} GB/s"
            )


if __name__ == "__main__":
    main()
