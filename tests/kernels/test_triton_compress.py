"""Scoring and compressing a prompt in Triton, compared with the torch oracle."""

import pytest
import torch

from mikv_vllm.tiers import attention, reference
from mikv_vllm.tiers.formats import LowFormat

from .tiered_cache import (
    Shape,
    assert_same_tiers,
    last_queries,
    new_pages,
    sizes_of,
    tokens,
)
from .triton_layer import RECENT, layer


def native_cache(shape, keys, values, table, num_pages, device):
    """Native pages with tokens outside heads in memory, and NaN where no token is."""
    size = (num_pages, shape.block_size, shape.kv_heads, 2 * shape.head_dim)
    cache = torch.full(size, float("nan"), dtype=shape.dtype)
    for data, part in zip((keys, values), cache.split(shape.head_dim, -1), strict=True):
        for page, start in zip(table, range(0, len(data), shape.block_size), strict=False):
            tokens = data[start : start + shape.block_size]
            part[page, : len(tokens)] = tokens
    return cache.to(device).transpose(1, 2)


def table_tensor(table, device):
    return torch.tensor(table, dtype=torch.int32, device=device)


@pytest.mark.parametrize(
    ("shape", "low_format", "high", "records"),
    [
        (Shape(), LowFormat((5, 3, 2, 2), 3), 40, 4),
        (Shape(64, block_size=16, queries_per_kv_head=1), LowFormat((6, 5, 5, 4), 4), 16, 3),
        (Shape(80, block_size=32, dtype=torch.float16), LowFormat((5, 5, 4, 2), 3), 47, 2),
        (Shape(96, block_size=32), LowFormat((6, 4, 3, 3), 2), 33, 3),
        (Shape(128, block_size=128), LowFormat((4, 2, 2, 2), 2), 64, 3),
        (Shape(128, high_bits=16), LowFormat((2, 2, 2, 2), 4), 20, 2),
        (Shape(), LowFormat((3, 2, 1, 1), 2), 35, 2),
        (Shape(80, block_size=32), LowFormat((3, 2, 2, 1), 2), 19, 2),
        (Shape(256, kv_heads=1, block_size=16), LowFormat((6, 6, 3, 2), 3), 17, 2),
        (
            Shape(256, kv_heads=1, high_bits=16, dtype=torch.float16),
            LowFormat((5, 4, 4, 4), 5),
            31,
            1,
        ),
        (Shape(64, high_bits=16), LowFormat((6, 4, 3, 3), 4), 130, 0),
        (Shape(), LowFormat.parse("B3V3"), 40, 4),
        (Shape(80, block_size=32, dtype=torch.float16), LowFormat.parse("B5V5"), 47, 2),
        (Shape(96, queries_per_kv_head=1, block_size=16), LowFormat.parse("B4V4"), 33, 3),
        (Shape(128, high_bits=16), LowFormat.parse("B2V2"), 20, 2),
        (Shape(256, kv_heads=1, block_size=16), LowFormat.parse("B6V4"), 17, 0),
    ],
)
def test_compress_writes_the_oracles_bytes(shape, low_format, high, records, device):
    sizes = sizes_of(shape, low_format, high, records)
    keys, values = tokens(shape, sizes.num_tokens, seed=high)
    scores = torch.rand(shape.kv_heads, sizes.num_tokens + 5)
    scores[:, : sizes.num_tokens // 2] = scores[:, :1]  # ties
    q = last_queries(shape)
    num_native = -(-sizes.num_tokens // shape.block_size)
    native = torch.randperm(num_native + 2).tolist()[:num_native]
    table = torch.randperm(sizes.pages + 2).tolist()[: sizes.pages]
    before = new_pages(shape, sizes.pages + 2, poison=None)
    expected = before.clone()
    reference.compress(
        expected,
        table,
        shape.geometry,
        low_format,
        sizes,
        keys,
        values,
        scores[:, : sizes.num_tokens],
        q,
        RECENT,
    )
    pages = before.to(device)
    layer(shape, device).compress(
        pages,
        table_tensor(native, device),
        table_tensor(table, device),
        sizes,
        low_format,
        scores.to(device),
        q.to(device),
        RECENT,
        native=native_cache(shape, keys, values, native, num_native + 2, device),
    )
    pages = pages.cpu()
    assert_same_tiers(pages, expected, table, shape, low_format, sizes)
    others = [page for page in range(len(pages)) if page not in table]
    assert torch.equal(pages[others], before[others])


@pytest.mark.parametrize(
    ("shape", "num_tokens", "num_queries", "kwargs"),
    [
        (Shape(), 150, 32, {}),
        (Shape(64, queries_per_kv_head=1, block_size=16), 65, 65, {"softcap": 5.0}),
        (Shape(80, queries_per_kv_head=4, dtype=torch.float16), 129, 7, {"sinks": True}),
        (Shape(96, queries_per_kv_head=8, kv_heads=1, block_size=32), 200, 20, {}),
        (Shape(128, block_size=128), 257, 1, {"softcap": 3.0, "sinks": True}),
    ],
)
def test_scores_of_a_prompt(shape, num_tokens, num_queries, kwargs, device):
    kwargs = dict(kwargs)
    if kwargs.get("sinks"):
        kwargs["sinks"] = torch.randn(shape.heads)
    keys, values = tokens(shape, num_tokens, seed=num_tokens)
    q = torch.randn(num_queries, shape.heads + 2, shape.head_dim).to(shape.dtype)
    q = q[:, : shape.heads]
    table = torch.randperm(-(-num_tokens // shape.block_size) + 3)[:-3].tolist()
    cache = native_cache(shape, keys, values, table, len(table) + 3, device)
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }
    scores = torch.ones(shape.kv_heads, num_tokens + 3, device=device)
    layer(shape, device, **on_device).score(
        cache, table_tensor(table, device), num_tokens, q.to(device), scores
    )
    scores = scores.cpu()
    expected = attention.score_prompt(q, keys, shape.head_dim**-0.5, **kwargs)
    assert torch.equal(scores[:, num_tokens:], torch.ones(shape.kv_heads, 3))
    torch.testing.assert_close(scores[:, :num_tokens] - 1, expected, rtol=1e-3, atol=2e-5)


def test_scores_add_up_over_the_chunks_of_a_prefill(device):
    shape = Shape()
    keys, values = tokens(shape, 200, seed=0)
    q = torch.randn(200, shape.heads, shape.head_dim).to(shape.dtype)
    table = list(range(4))
    ops = layer(shape, device)
    scores = torch.zeros(shape.kv_heads, 200, device=device)
    for start, stop in ((0, 50), (50, 129), (129, 200)):
        cache = native_cache(shape, keys[:stop], values[:stop], table, 4, device)
        ops.score(cache, table_tensor(table, device), stop, q[start:stop].to(device), scores)
    expected = attention.score_prompt(q, keys, shape.head_dim**-0.5)
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-3, atol=2e-5)
