"""Sealing a tail, compared with the torch oracle."""

import torch

from mikv_vllm.kernels.layer_ops import MOST_IMPORTANT
from mikv_vllm.tiers import records, reference
from mikv_vllm.tiers.formats import LowFormat

from .tiered_cache import Shape, assert_same_tiers, filled, new_pages, sizes_of

RECENT = 16
SEALS = [
    # shape; low format, high tokens and low records of the tail; low format and low records of the
    # block
    (Shape(block_size=32), "K6433V4", 160, 3, "K5332V3", 7),
    (Shape(64, block_size=16, dtype=torch.float16), "K6655V5", 128, 0, "K4322V2", 3),
    (Shape(64, block_size=16), "K5332V3", 64, 6, "K4322V2", 4),  # low tokens become high ones
    (Shape(80, block_size=32), "B5V5", 200, 2, "B3V3", 7),
    (Shape(128, block_size=16), "K6544V4", 96, 2, "K3211V2", 4),
    (Shape(128, high_bits=16), "K6544V4", 130, 2, "K5332V3", 4),
    (Shape(256, kv_heads=1, block_size=16), "K6544V4", 48, 3, "K5332V3", 4),
]


def check_seal(ops, shape, tail_name, high, low, name, low_after, on_device):
    """Seal a tail, and compare the bytes with the oracle.

    Args:
        on_device: moves a tensor to the device.
    """
    tail_format, low_format = LowFormat.parse(tail_name), LowFormat.parse(name)
    tail = sizes_of(shape, tail_format, high, low)
    sizes = sizes_of(shape, low_format, tail.num_tokens - 32 * low_after, low_after)
    pages = new_pages(shape, max(tail.pages, sizes.pages) + 3, poison=None)
    free = torch.randperm(len(pages)).tolist()
    table = [free.pop() for _ in range(tail.pages)]
    filled(shape, tail_format, tail, pages, table, seed=high)
    block = (table + free)[: sizes.pages]
    before = pages.clone()
    count = -(-tail.num_tokens // shape.block_size)
    native_shape = (count, shape.kv_heads, shape.block_size, 2 * shape.head_dim)
    native = on_device(torch.full(native_shape, 7.0, dtype=shape.dtype))
    cache = on_device(pages)
    tables = [on_device(torch.tensor(t, dtype=torch.int32)) for t in (table, block)]
    blocks = (tables[0], tail, tail_format), (tables[1], sizes, low_format)
    ops.seal_tail(cache, *blocks, native, RECENT)
    # They may differ from the oracle's by rounding, so the block is compared with their seal.
    keys, values = (part.cpu() for part in ops.read_native(native, tail.num_tokens))
    expected, geometry = before.clone(), shape.geometry
    for head in range(shape.kv_heads):
        stream = records.Stream(before, table, head)
        restored = reference.restore(stream, geometry, tail_format, tail, shape.dtype)
        for part, numbers in zip((keys, values), restored, strict=True):
            torch.testing.assert_close(part[:, head].float(), numbers, rtol=2**-7, atol=1e-5)
        scores = torch.full((tail.num_tokens,), -1.0)
        scores[:high] = records.read_high(stream, geometry, high, shape.dtype)[2]
        assert len(scores[:high].unique()) > 1
        scores[high - RECENT : high] = MOST_IMPORTANT
        tokens = (keys[:, head], values[:, head], scores)
        stream = records.Stream(expected, block, head)
        reference.seal(stream, geometry, low_format, sizes, *tokens)
    pages.copy_(cache)
    assert_same_tiers(pages, expected, block, shape, low_format, sizes)
    for head in range(shape.kv_heads):
        ours, theirs = (
            records.read_high(
                records.Stream(part, block, head), shape.geometry, sizes.high_tokens, shape.dtype
            )
            for part in (pages, expected)
        )
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    others = [page for page in range(len(pages)) if page not in block]
    assert torch.equal(pages[others], before[others])
