"""Temporary memory of the Triton kernels."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from mikv_vllm.kernels.triton import (
    DecodeBatch,
    LayerOps,
    Scratch,
    compress_ops,
    decode_ops,
    extend_ops,
)
from mikv_vllm.tiers.blocks import BlockPlanner, TailStep
from mikv_vllm.tiers.formats import TierGeometry

HEAD_DIM, HEADS, KV_HEADS, BLOCK_SIZE, RECENT = 128, 32, 8, 16, 16
TOKENS, CHUNK, ROWS = 32768, 2048, 256


class NoKernel:
    """A kernel that does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.fixture
def scratch(monkeypatch):
    for module in (compress_ops, decode_ops, extend_ops):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, NoKernel())
    return Scratch("cpu")


def zeros(*shape):
    """A tensor of any size that needs no memory."""
    return torch.zeros(1, dtype=torch.bfloat16).expand(shape)


def test_scratch_is_little_more_than_one_layer_of_the_longest_request(scratch):
    ops = LayerOps(
        HEAD_DIM, HEADS, KV_HEADS, BLOCK_SIZE, 8, 0.1, 0.0, None, 0.9, RECENT, scratch, 2112
    )
    geometry = TierGeometry(HEAD_DIM, BLOCK_SIZE, 8)
    native = torch.zeros(1, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM, dtype=torch.bfloat16)
    pages = TOKENS // BLOCK_SIZE
    cache = torch.zeros(pages, KV_HEADS, geometry.page_bytes // 4, dtype=torch.int32)
    table = torch.zeros(pages, dtype=torch.int32)
    scores = torch.zeros(KV_HEADS, TOKENS + CHUNK)
    q, new = zeros(ROWS, HEADS, HEAD_DIM), zeros(ROWS, KV_HEADS, HEAD_DIM)
    chunk = zeros(CHUNK, KV_HEADS, HEAD_DIM)
    for ratio in (1.5, 2.0, 4.0, 6.0):
        planner = BlockPlanner(geometry, ratio, RECENT)
        block, low = planner.sealed_form(0).sizes, planner.tail_form(0).low_format
        ops.score(native, table, TOKENS, q[:32], scores)
        ops.compress(cache, table, table, block, low, scores, q[:32], 0, native=native)
        ops.restore(cache, table, block, low, native)
        tail = planner.tail(0, 1)
        extended = planner.extend(0, tail, planner.block_tokens - 1)
        tail = planner.lengthen(tail, extended.after.pages)
        ops.extend(cache, table, tail, extended, low, chunk, chunk, scores, RECENT, 1.0)
        # One of the longest requests and many short ones.
        rows = []
        for request, num_tokens in enumerate([TOKENS] + (ROWS - 1) * [1024 + 256]):
            *sealed, tail = (block.sizes for block in planner.blocks(num_tokens - 1))
            step = TailStep(1, (), False, 0, tail)
            for sizes in sealed:
                read = TailStep(0, (), False, 0, sizes)
                rows.append((request, range(sizes.pages), sizes, read, low))
            rows.append((request, range(tail.pages), tail, step, low))
        ops.decode(cache, DecodeBatch.build(rows, "cpu"), q, new, new, q)
        print(f"up to ratio {ratio}: {scratch.num_bytes / cache.nbytes:.2f} of a layer")
    assert scratch.num_bytes / cache.nbytes < 1.5  # the GPU worker reserves 2
