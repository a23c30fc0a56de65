"""The fused decode step on the CPU over requests of several blocks, compared with the oracle."""

import pytest
import torch

from mikv_vllm.kernels import cpu
from mikv_vllm.tiers.formats import LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierSizes

from .cpu_layer import DECAY, RECENT, layer
from .test_cpu_decode import assert_close_attention
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

pytestmark = pytest.mark.usefixtures("isa")

RICH, POOR = LowFormat((6, 5, 5, 4), 4), LowFormat((5, 3, 2, 2), 3)
BALANCED = LowFormat.parse("B4V4")

# High tokens, low records and format of each block of each request; the last block takes the token.
REQUESTS = [
    [(48, 14, RICH), (32, 15, POOR), (17, 3, POOR)],
    [(30, 2, BALANCED)],
    [(0, 16, RICH), (200, 0, RICH), (64, 10, BALANCED), (0, 0, POOR)],
    [(512, 0, RICH), (100, 9, POOR)],
]


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        (Shape(), {}),
        (Shape(64, queries_per_kv_head=8, kv_heads=1, dtype=torch.float16), {"sinks": True}),
        (Shape(80, queries_per_kv_head=5, block_size=32), {"softcap": 8.0}),
        (Shape(128, queries_per_kv_head=6, kv_heads=1, high_bits=16), {}),
    ],
)
@pytest.mark.parametrize("requests", [REQUESTS, REQUESTS[:1], REQUESTS[2:3]])
def test_a_request_of_several_blocks(shape, kwargs, requests, threads):
    kwargs = dict(kwargs)
    if kwargs.get("sinks"):
        kwargs["sinks"] = 2 * torch.randn(shape.heads)
    pages = new_pages(shape, 900)
    free = torch.randperm(len(pages)).tolist()
    rows, blocks = [], []
    for token, request in enumerate(requests):
        blocks.append([])
        for i, (high, low, low_format) in enumerate(request):
            is_tail = i == len(request) - 1
            sizes = sizes_of(shape, low_format, high + is_tail, low)
            sizes = TierSizes(sizes.pages, high, low, sizes.low_end_bytes)
            table = [free.pop() for _ in range(sizes.pages)]
            # An empty tail has a header.
            first = sizes if sizes.num_tokens else TierSizes(sizes.pages, 1, 0, sizes.low_end_bytes)
            filled(shape, low_format, first, pages, table, seed=17 * token + i, recent=0)
            demoted = int(is_tail and high >= 64)
            after = TierSizes(
                sizes.pages, high + is_tail - 32 * demoted, low + demoted, sizes.low_end_bytes
            )
            step = AppendStep(int(is_tail), 0, 0, demoted, after)
            rows.append((len(requests) - token, table, sizes, step, low_format))
            blocks[-1].append((table, sizes, step, low_format))
    size = len(requests) + 1
    q = torch.randn(size, shape.heads, shape.head_dim).to(shape.dtype)
    k, v = torch.randn(2, size, shape.kv_heads, shape.head_dim).to(shape.dtype)
    out = torch.full_like(q, 7.0)
    oracle = pages.clone()
    layer(shape, **kwargs).decode(pages, cpu.DecodeBatch.build(rows), q, k, v, out)
    assert (out[0] == 7.0).all()
    for i, request in enumerate(blocks):
        token = len(requests) - i
        for table, _, _, _ in request[:-1]:
            assert torch.equal(pages[table], oracle[table]), "a sealed block was written"
        table, sizes, step, low_format = request[-1]
        oracle_step(oracle, table, shape, low_format, sizes, step, k[token], v[token], RECENT)
        for head in range(shape.kv_heads):
            arguments = (table, head, shape, low_format, step.after)
            ours, theirs = live_bytes(pages, *arguments), live_bytes(oracle, *arguments)
            assert (ours != theirs).float().mean() < 0.001
            parts = [
                read_tiers(oracle, table, head, shape, low_format, step.after)
                for table, _, step, low_format in request
            ]
            tiers = Tiers(*(torch.cat([getattr(p, f) for p in parts]) for f in vars(parts[0])))
            heads = slice(head * shape.queries_per_kv_head, (head + 1) * shape.queries_per_kv_head)
            sinks = kwargs.get("sinks")
            expected, mass = expected_attention(
                q[token, heads],
                tiers,
                shape.head_dim**-0.5,
                kwargs.get("softcap", 0.0),
                None if sinks is None else sinks[heads],
            )
            assert_close_attention(out[token, heads], expected, shape.dtype)
            start = len(tiers.keys) - len(parts[-1].keys)
            mass = mass[start : start + step.after.high_tokens]
            mine = read_tiers(pages, *arguments).scores
            scores = parts[-1].scores * DECAY + mass
            torch.testing.assert_close(mine.double(), scores, rtol=5e-3, atol=1e-6)
