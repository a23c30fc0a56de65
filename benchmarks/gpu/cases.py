"""Measured cases: layers with compressed requests, and attention on uncompressed tokens."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu import xformers_int4
from benchmarks.gpu.timing import device_time
from mikv_vllm.kernels.batch import DecodeRow
from mikv_vllm.kernels.triton import DecodeBatch, LayerOps, Scratch
from mikv_vllm.tiers.blocks import BlockForm, BlockPlanner, TailStep
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS, TierGeometry
from mikv_vllm.tiers.plan import TierSizes

BLOCK_SIZE, WINDOW, RECENT, DECAY = 64, 32, 16, 0.98
CACHE_BYTES = 256 << 20
"""Least memory that consecutive runs read: several times the L2 cache of a GPU."""
TOGETHER = "score + compress"
DTYPE = torch.bfloat16
DEVICE = "cuda"


@dataclass(frozen=True)
class Heads:
    """Attention heads of a layer of a model."""

    model: str
    head_dim: int
    kv_heads: int
    queries_per_kv_head: int

    @property
    def heads(self) -> int:
        return self.kv_heads * self.queries_per_kv_head

    def ops(self, scratch: Scratch, high_bits: int = 8) -> LayerOps:
        return LayerOps(
            self.head_dim,
            self.heads,
            self.kv_heads,
            BLOCK_SIZE,
            high_bits,
            self.head_dim**-0.5,
            0.0,
            None,
            DECAY,
            RECENT,
            scratch,
        )

    def native_bytes(self, tokens: int) -> int:
        return 4 * self.head_dim * self.kv_heads * tokens


MODELS = (Heads("Llama-3.1-8B", 128, 8, 4), Heads("Qwen3-32B", 128, 8, 8))


class Prompt:
    """A native request with random tokens, its last queries and its scores."""

    def __init__(self, heads: Heads, tokens: int, scratch: Scratch) -> None:
        self.heads, self.tokens, self.scratch = heads, tokens, scratch
        pages = -(-tokens // BLOCK_SIZE)
        size = (pages, heads.kv_heads, BLOCK_SIZE, 2 * heads.head_dim)
        self.cache = torch.randn(size, dtype=DTYPE, device=DEVICE)
        self.table = torch.randperm(pages, device=DEVICE).to(torch.int32)
        size = (WINDOW, heads.heads, heads.head_dim)
        self.q = torch.randn(size, dtype=DTYPE, device=DEVICE)
        self.scores = torch.zeros(heads.kv_heads, tokens, device=DEVICE)
        self.ops = heads.ops(scratch)

    def score(self) -> None:
        self.ops.score(self.cache, self.table, self.tokens, self.q, self.scores)

    def blocks(self, ratio: float, demoting: bool = False) -> list[BlockForm]:
        """Return the blocks at a ratio. At ratio 1, all tokens are 16-bit high tokens.

        Args:
            demoting: leave out the newest tokens so that the next token causes a demotion.
        """
        geometry = TierGeometry(self.heads.head_dim, BLOCK_SIZE, 16 if ratio == 1 else 8)
        planner = BlockPlanner(geometry, 1.5 if ratio == 1 else ratio, RECENT)
        tokens = self.tokens
        while demoting:
            start, tail = planner.starts(tokens)[-1], planner.blocks(tokens)[-1].sizes
            if planner.append(start, tail).demoted_records:
                break
            tokens -= 1
        blocks = []
        for block in planner.blocks(tokens):
            stored = sizes = block.sizes
            if ratio == 1:
                pages = -(-geometry.high_bytes(sizes.num_tokens + 1) // geometry.page_bytes)
                end = pages * geometry.page_bytes
                stored = TierSizes(pages, sizes.num_tokens, 0, end)
            elif sizes.num_tokens < planner.block_tokens:
                stored = planner.lengthen(sizes, sizes.pages + 1)  # room for the new token
            blocks.append(BlockForm(block.low_format, stored))
        return blocks

    def compress(self, ops: LayerOps, blocks: list[BlockForm], pages: torch.Tensor) -> None:
        """Compress the request into consecutive pages, from page 0 on."""
        first_token = first_page = 0
        for block in blocks:
            sizes = block.sizes
            table = torch.arange(first_page, first_page + sizes.pages, device=DEVICE)
            ops.compress(
                pages,
                self.table[first_token // BLOCK_SIZE :],
                table.to(torch.int32),
                sizes,
                block.low_format,
                self.scores[:, first_token:],
                self.q,
                RECENT if block is blocks[-1] else 0,
                native=self.cache,
            )
            first_token += sizes.num_tokens
            first_page += sizes.pages


class Compressed:
    """A decode step of ``batch`` copies of a compressed prompt, each with its own pages."""

    def __init__(self, prompt: Prompt, ratio: float, batch: int, demote: bool = False) -> None:
        heads, self.scratch = prompt.heads, prompt.scratch
        self.blocks = prompt.blocks(ratio, demote)
        geometry = TierGeometry(heads.head_dim, BLOCK_SIZE, 16 if ratio == 1 else 8)
        self.ops = heads.ops(self.scratch, geometry.high_bits)
        names = dict.fromkeys(block.low_format.name for block in self.blocks)
        self.name = "16-bit" if ratio == 1 else "/".join(names)
        stored = sum(
            geometry.high_bytes(sizes.high_tokens)
            + sizes.low_records * geometry.low(low_format).num_bytes
            for low_format, sizes in ((block.low_format, block.sizes) for block in self.blocks)
        )
        self.num_bytes = heads.kv_heads * batch * stored
        pages = sum(block.sizes.pages for block in self.blocks)
        sets = max(1, min(32, -(-CACHE_BYTES // self.num_bytes)))
        size = (sets * batch * pages, heads.kv_heads, geometry.page_bytes)
        self.pages = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
        prompt.compress(self.ops, self.blocks, self.pages)
        self.pages.view(-1, pages, *size[1:])[1:] = self.pages[:pages]
        order = torch.randperm(sets * batch).tolist()
        self.batches = []
        for i in range(sets):
            rows = [
                row
                for request in range(batch)
                for row in self.rows(request, order[i * batch + request] * pages, demote)
            ]
            self.batches.append(DecodeBatch.build(rows, DEVICE))
        self.q = torch.randn(batch, heads.heads, heads.head_dim, dtype=DTYPE, device=DEVICE)
        self.out = torch.empty_like(self.q)

    def rows(self, request: int, first_page: int, demote: bool) -> Iterator[DecodeRow]:
        """Return the rows of the blocks of a request, whose pages begin at ``first_page``."""
        for block in self.blocks:
            sizes, is_tail = block.sizes, block is self.blocks[-1]
            demoted = int(demote and is_tail)
            after = TierSizes(
                sizes.pages,
                sizes.high_tokens + is_tail - LOW_RECORD_TOKENS * demoted,
                sizes.low_records + demoted,
                sizes.low_end_bytes,
            )
            step = TailStep(int(is_tail), (), False, demoted, after)
            table = range(first_page, first_page + sizes.pages)
            yield request, table, sizes, step, block.low_format
            first_page += sizes.pages

    def attend(self) -> list[Callable[[], object]]:
        """Return a function for each set of pages that launches attention on it."""
        return [
            lambda batch=batch: self.ops.attend(self.pages, batch, self.q, self.out)
            for batch in self.batches
        ]

    def change(self) -> list[Callable[[], object]]:
        """Return a function for each set of pages that launches a demotion in it."""
        return [
            lambda batch=batch: self.ops.change(self.pages, batch, DTYPE) for batch in self.batches
        ]


def flash_attention(heads: Heads, tokens: int, batch: int) -> float:
    """Measure torch's flash attention on bf16 keys and values of the same shape, in seconds.

    The query heads of a KV head are passed as a sequence of queries, so that keys and values are
    read once.
    """
    sets = max(1, min(32, -(-CACHE_BYTES // (batch * heads.native_bytes(tokens)))))
    shape = (sets, 2, batch, heads.kv_heads, tokens, heads.head_dim)
    cache = torch.empty(shape, dtype=DTYPE, device=DEVICE)
    for part in cache.flatten(0, 2):
        part.normal_()
    size = (batch, heads.kv_heads, heads.queries_per_kv_head, heads.head_dim)
    q = torch.randn(size, dtype=DTYPE, device=DEVICE)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return device_time(
            [lambda one=one: F.scaled_dot_product_attention(q, one[0], one[1]) for one in cache]
        )


def int4_attention(heads: Heads, tokens: int, batch: int) -> tuple[int, float]:
    """Measure xformers' attention on int4 keys and values of the same shape.

    Returns the bytes of the keys and values, and the seconds.
    """
    words = 1 + heads.head_dim // 8
    num_bytes = 2 * batch * tokens * heads.kv_heads * words * 4
    sets = max(1, min(32, -(-CACHE_BYTES // num_bytes)))
    shape = (sets, 2, batch, tokens, heads.kv_heads, words)
    cache = torch.empty(shape, dtype=torch.int32, device=DEVICE)
    for part in cache.flatten(0, 2):
        rows = torch.randn(tokens, heads.kv_heads, heads.head_dim, device=DEVICE)
        part.copy_(xformers_int4.pack_rows(rows))
    q = torch.randn(
        batch, heads.kv_heads, heads.queries_per_kv_head, heads.head_dim, dtype=DTYPE, device=DEVICE
    )
    return num_bytes, device_time(
        [lambda one=one: xformers_int4.decode(q, one[0], one[1]) for one in cache]
    )


def prefill_attention(heads: Heads, tokens: int) -> float:
    """Measure torch's causal flash attention over a prompt, in seconds."""
    size = (1, heads.heads, tokens, heads.head_dim)
    q, k, v = (torch.randn(size, dtype=DTYPE, device=DEVICE) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return device_time([lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)], 3)


def decode_rows(
    heads: Heads,
    tokens: int,
    batches: list[int],
    ratios: list[float],
    bandwidth: float,
    memory: int,
    int4: bool,
) -> Iterator[dict]:
    """Measure decode attention: a table row for each contender and each batch size that fits.

    Args:
        bandwidth: bytes per second that a copy reads and writes.
        memory: bytes of device memory.
        int4: whether to measure xformers.
    """
    scratch = Scratch(DEVICE)
    prompt = Prompt(heads, tokens, scratch)
    prompt.score()
    for batch in batches:
        native = batch * heads.native_bytes(tokens)
        if 1.5 * native > memory:
            continue
        flash = flash_attention(heads, tokens, batch)
        measured = [("torch flash", 1.0, native, flash)]
        if int4:
            num_bytes, seconds = int4_attention(heads, tokens, batch)
            measured.append(("xformers int4", round(native / num_bytes, 2), num_bytes, seconds))
        for ratio in ratios:
            case = Compressed(prompt, ratio, batch)
            seconds = device_time(case.attend())
            measured.append((f"ours {case.name}", ratio, case.num_bytes, seconds))
            del case
            gc.collect()
            torch.cuda.empty_cache()
        fastest = min(seconds for _, ratio, _, seconds in measured if ratio == 1)
        for name, ratio, num_bytes, seconds in measured:
            yield {
                "model": heads.model,
                "context": tokens,
                "batch": batch,
                "contender": name,
                "ratio": ratio,
                "MB": round(num_bytes / 1e6, 3),
                "us": round(1e6 * seconds, 1),
                "GB/s": round(num_bytes / seconds / 1e9),
                "of copy": f"{num_bytes / seconds / bandwidth:.0%}",
                "copy us": round(1e6 * num_bytes / bandwidth, 1),
                "speed-up": round(fastest / seconds, 2),
            }


def compile_kernels(heads: Heads, tokens: int, ratio: float, batches: list[int]) -> None:
    """Run every kernel of :func:`decode_rows` once, so that it is in Triton's cache."""
    prompt = Prompt(heads, tokens, Scratch(DEVICE))
    prompt.score()
    for batch in batches:
        Compressed(prompt, ratio, batch).attend()[0]()


def prompt_rows(heads: Heads, tokens: int, ratio: float) -> Iterator[dict]:
    """Measure score, compress and demote, a table row each."""
    scratch = Scratch(DEVICE)
    prompt = Prompt(heads, tokens, scratch)
    prefill = prefill_attention(heads, tokens)
    case = Compressed(prompt, ratio, 8, demote=True)

    def compress() -> None:
        prompt.compress(prompt.ops, case.blocks, case.pages)

    score, written = device_time([prompt.score]), device_time([compress])
    for name, seconds in (
        ("score", score),
        ("compress", written),
        (TOGETHER, score + written),
        ("demote, batch 8", device_time(case.change())),
    ):
        yield {
            "model": heads.model,
            "context": tokens,
            "operation": name,
            "us": round(1e6 * seconds, 1),
            "us per 1k tokens": round(1e9 * seconds / tokens, 2),
            "of prefill attention": f"{seconds / prefill:.1%}",
        }
