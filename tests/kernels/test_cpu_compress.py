"""Scoring and compressing a prompt on the CPU, compared with the torch oracle."""

import pytest
import torch

from mikv_vllm.tiers import attention, reference
from mikv_vllm.tiers.formats import LowFormat

from .cpu_layer import RECENT, layer
from .tiered_cache import (
    Shape,
    assert_same_tiers,
    last_queries,
    live_bytes,
    new_pages,
    permutation,
    read_tiers,
    sizes_of,
    tokens,
    write_native,
)

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize(
    ("shape", "low_format", "high", "low_records", "order"),
    [
        (Shape(), LowFormat((6, 4, 3, 3), 3), 40, 9, None),
        (Shape(64, block_size=16, queries_per_kv_head=1), LowFormat((6, 5, 5, 4), 4), 16, 4, 1),
        (Shape(80, block_size=32, dtype=torch.float16), LowFormat((6, 5, 5, 4), 3), 47, 5, 2),
        (Shape(96, block_size=32), LowFormat((5, 3, 2, 2), 2), 33, 6, None),
        (Shape(128, block_size=128), LowFormat((4, 2, 2, 2), 2), 64, 12, None),
        (Shape(64), LowFormat((3, 2, 1, 1), 2), 35, 6, 1),
        (Shape(80, block_size=32), LowFormat((2, 2, 2, 1), 3), 21, 5, None),
        (Shape(128, dtype=torch.float16), LowFormat((3, 2, 2, 1), 2), 19, 4, None),
        (Shape(128, high_bits=16), LowFormat((4, 2, 2, 2), 4), 20, 7, 3),
        (Shape(256, kv_heads=1, block_size=16), LowFormat((4, 2, 2, 2), 3), 17, 5, 4),
        (Shape(256, high_bits=16, dtype=torch.float16), LowFormat((6, 4, 3, 3), 5), 31, 3, None),
        (Shape(64, high_bits=16), LowFormat((5, 3, 2, 2), 4), 130, 0, None),
        (Shape(), LowFormat.parse("B3V3"), 40, 9, None),
        (Shape(128, dtype=torch.float16), LowFormat.parse("B2V4"), 20, 7, 3),
        (Shape(80, block_size=32), LowFormat.parse("B5V2"), 47, 5, 2),
        (Shape(96, high_bits=16), LowFormat.parse("B4V4"), 130, 0, None),
    ],
)
def test_compress_writes_the_oracles_bytes(shape, low_format, high, low_records, order, threads):
    sizes = sizes_of(shape, low_format, high, low_records)
    keys, values = tokens(shape, sizes.num_tokens, seed=high)
    scores = torch.rand(shape.kv_heads, sizes.num_tokens + 5)
    scores[:, : sizes.num_tokens // 2] = scores[:, :1]  # ties
    q = last_queries(shape)
    index = permutation(shape, order)
    num_native = -(-sizes.num_tokens // shape.block_size)
    order = torch.randperm(num_native + sizes.pages + 2).tolist()
    native, tiered = order[:num_native], order[num_native : num_native + sizes.pages]
    pages = new_pages(shape, len(order), poison=None)
    write_native(pages, native, shape, keys, values, index)
    expected, before = pages.clone(), pages.clone()
    reference.compress(
        expected,
        tiered,
        shape.geometry,
        low_format,
        sizes,
        keys,
        values,
        scores[:, : sizes.num_tokens],
        q,
        RECENT,
    )
    layer(shape, index).compress(pages, native, tiered, sizes, low_format, scores, q, RECENT)
    assert_same_tiers(pages, expected, tiered, shape, low_format, sizes)
    others = [p for p in range(len(order)) if p not in tiered]
    assert torch.equal(pages[others], before[others])

    in_place = before.clone()
    table = native[: sizes.pages]
    layer(shape, index).compress(in_place, native, table, sizes, low_format, scores, q, RECENT)
    for head in range(shape.kv_heads):
        arguments = (head, shape, low_format, sizes)
        assert torch.equal(
            live_bytes(in_place, table, *arguments), live_bytes(pages, tiered, *arguments)
        )


@pytest.mark.parametrize(
    ("shape", "num_tokens", "num_queries", "kwargs"),
    [
        (Shape(), 300, 32, {}),
        (Shape(64, queries_per_kv_head=1, block_size=16), 65, 65, {"softcap": 5.0}),
        (Shape(80, queries_per_kv_head=4, dtype=torch.float16), 129, 7, {"sinks": True}),
        (Shape(96, queries_per_kv_head=8, kv_heads=1, block_size=32), 500, 40, {}),
        (Shape(128, block_size=128), 257, 1, {"softcap": 3.0, "sinks": True}),
        (Shape(256), 1025, 33, {}),
    ],
)
@pytest.mark.parametrize("order", [None, 5])
def test_scores_of_a_prompt(shape, num_tokens, num_queries, kwargs, order, threads):
    kwargs = dict(kwargs)
    if kwargs.get("sinks"):
        kwargs["sinks"] = torch.randn(shape.heads)
    keys, values = tokens(shape, num_tokens, seed=num_tokens)
    q = torch.randn(num_queries, shape.heads + 2, shape.head_dim).to(shape.dtype)
    q = q[:, : shape.heads]
    index = permutation(shape, order)
    table = torch.randperm(-(-num_tokens // shape.block_size) + 3)[:-3]
    pages = new_pages(shape, len(table) + 3)
    write_native(pages, table.tolist(), shape, keys, values, index)
    ops = layer(shape, index, **kwargs)
    scores = torch.ones(shape.kv_heads, num_tokens + 3)
    ops.score(pages, table, num_tokens, q, scores)
    expected = attention.score_prompt(q, keys, shape.head_dim**-0.5, **kwargs)
    assert torch.equal(scores[:, num_tokens:], torch.ones(shape.kv_heads, 3))
    torch.testing.assert_close(scores[:, :num_tokens] - 1, expected, rtol=1e-4, atol=2e-6)


def test_scores_add_up_over_the_chunks_of_a_prefill(threads):
    shape = Shape()
    keys, values = tokens(shape, 400, seed=0)
    q = torch.randn(400, shape.heads, shape.head_dim).to(shape.dtype)
    index = permutation(shape, None)
    table = list(range(7))
    pages = new_pages(shape, 7)
    ops = layer(shape, index)
    scores = torch.zeros(shape.kv_heads, 400)
    for start, stop in ((0, 100), (100, 257), (257, 400)):
        write_native(pages, table, shape, keys[:stop], values[:stop], index)
        ops.score(pages, table, stop, q[start:stop], scores)
    expected = attention.score_prompt(q, keys, shape.head_dim**-0.5)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_low_keys_serve_the_queries_that_they_were_rounded_for():
    shape, low_format = Shape(), LowFormat((5, 3, 2, 2), 3)
    sizes = sizes_of(shape, low_format, 16, 20)
    keys, values = tokens(shape, sizes.num_tokens, seed=0)
    q = last_queries(shape, 40)
    index = permutation(shape, None)
    native = list(range(-(-sizes.num_tokens // shape.block_size)))
    tiered = [len(native) + page for page in range(sizes.pages)]
    scores = torch.arange(sizes.num_tokens).float().expand(shape.kv_heads, -1).contiguous()
    errors = {}
    for name, rounded_for in (("these", q), ("none", torch.zeros_like(q))):
        pages = new_pages(shape, len(native) + len(tiered))
        write_native(pages, native, shape, keys, values, index)
        layer(shape, index).compress(
            pages, native, tiered, sizes, low_format, scores, rounded_for[-32:], RECENT
        )
        error = 0.0
        for head in range(shape.kv_heads):
            stored = read_tiers(pages, tiered, head, shape, low_format, sizes).keys[16:]
            of_head = q.unflatten(1, (shape.kv_heads, -1))[:8, head].flatten(0, 1).double()
            error += ((stored - keys[:-16, head].double()) @ of_head.T).square().sum().item()
        errors[name] = error
    assert errors["these"] < 0.6 * errors["none"]
