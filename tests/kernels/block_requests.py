"""Requests of several blocks, and the comparison of a decode step with the torch oracle."""

import torch

from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import LowFormat
from mikv_vllm.tiers.plan import TierSizes

from .tiered_cache import (
    Shape,
    Tiers,
    expected_attention,
    filled,
    live_bytes,
    new_pages,
    oracle_step,
    read_tiers,
    sizes_of,
)

RICH, POOR = LowFormat((6, 5, 5, 4), 4), LowFormat((5, 3, 2, 2), 3)
BALANCED = LowFormat.parse("B4V4")

# High tokens, low records and format of each block of each request. The new token joins the last
# block.
REQUESTS = [
    [(48, 14, RICH), (32, 15, POOR), (17, 3, POOR)],
    [(30, 2, BALANCED)],
    [(0, 16, RICH), (200, 0, RICH), (64, 10, BALANCED), (0, 0, POOR)],
    [(512, 0, RICH), (100, 9, POOR)],
]
SHORT_REQUESTS = [
    [(48, 3, RICH), (32, 4, POOR), (17, 3, POOR)],
    [(30, 2, BALANCED)],
    [(0, 3, RICH), (40, 0, RICH), (64, 2, BALANCED), (0, 0, POOR)],
]
"""For Triton's interpreter, which takes long for each record."""


class BlockStep:
    """A decode step of several requests.

    Args:
        requests: as :data:`REQUESTS`. A request also reads the sealed blocks of the request before
            it, if it has the same first block.
    """

    def __init__(self, shape: Shape, requests: list) -> None:
        self.shape = shape
        self.pages = new_pages(shape, 900)
        free = torch.randperm(len(self.pages)).tolist()
        self.rows, self.blocks = [], []
        size = len(requests) + 1
        known: dict = {}
        for index, request in enumerate(requests):
            self.blocks.append([])
            for i, (high, low, low_format) in enumerate(request):
                is_tail = i == len(request) - 1
                sizes = sizes_of(shape, low_format, high + is_tail, low)
                sizes = TierSizes(sizes.pages, high, low, sizes.low_end_bytes)
                table = None if is_tail else known.get((i, high, low, low_format))
                if table is None:
                    table = [free.pop() for _ in range(sizes.pages)]
                    known[i, high, low, low_format] = table
                    # An empty tail has a header.
                    first = sizes
                    if not sizes.num_tokens:
                        first = TierSizes(sizes.pages, 1, 0, sizes.low_end_bytes)
                    filled(shape, low_format, first, self.pages, table, 17 * index + i, recent=0)
                demoted = int(is_tail and high >= 64)
                after = TierSizes(
                    sizes.pages, high + is_tail - 32 * demoted, low + demoted, sizes.low_end_bytes
                )
                step = TailStep(int(is_tail), (), False, demoted, after)
                self.rows.append((self.token(index, size), table, sizes, step, low_format))
                self.blocks[-1].append((table, sizes, step, low_format))
        self.q = torch.randn(size, shape.heads, shape.head_dim).to(shape.dtype)
        self.k, self.v = torch.randn(2, size, shape.kv_heads, shape.head_dim).to(shape.dtype)
        self.before = self.pages.clone()

    @staticmethod
    def token(index: int, size: int) -> int:
        """Row of q, k, v and out of a request; row 0 belongs to none."""
        return size - 1 - index

    def check(self, out, assert_close_output, decay, recent, softcap=0.0, sinks=None, rtol=5e-3):
        """Compare ``pages`` and ``out`` after the step with the oracle."""
        shape, pages = self.shape, self.pages
        for index, request in enumerate(self.blocks):
            token = self.token(index, len(self.q))
            for table, _, _, _ in request[:-1]:
                assert torch.equal(pages[table], self.before[table]), "a sealed block was written"
            oracle = self.before.clone()
            table, sizes, step, low_format = request[-1]
            arguments = (table, shape, low_format, sizes, step)
            oracle_step(oracle, *arguments, self.k[token], self.v[token], recent)
            for head in range(shape.kv_heads):
                arguments = (table, head, shape, low_format, step.after)
                ours, theirs = live_bytes(pages, *arguments), live_bytes(oracle, *arguments)
                # A rotation may differ in its last bit, which changes a few integers by one.
                assert (ours != theirs).float().mean() < 0.002
                parts = [
                    read_tiers(oracle, table, head, shape, low_format, step.after)
                    for table, _, step, low_format in request
                ]
                tiers = Tiers(*(torch.cat([getattr(p, f) for p in parts]) for f in vars(parts[0])))
                heads = slice(
                    head * shape.queries_per_kv_head, (head + 1) * shape.queries_per_kv_head
                )
                expected, mass = expected_attention(
                    self.q[token, heads],
                    tiers,
                    shape.head_dim**-0.5,
                    softcap,
                    None if sinks is None else sinks[heads],
                )
                assert_close_output(out[token, heads], expected)
                start = len(tiers.keys) - len(parts[-1].keys)
                mass = mass[start : start + step.after.high_tokens]
                mine = read_tiers(pages, *arguments).scores
                scores = parts[-1].scores * decay + mass
                torch.testing.assert_close(mine.double(), scores, rtol=rtol, atol=0.1 * rtol)
