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
from mikv_vllm.tiers.formats import TierGeometry
from mikv_vllm.tiers.plan import AppendStep, TierPlanner

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
        planner = TierPlanner.choose(geometry, ratio, RECENT, TOKENS)
        low = planner.low_format
        sizes, short = planner.compress(TOKENS), planner.compress(1024)
        ops.score(native, table, TOKENS, q[:32], scores)
        ops.compress(cache, table, table, sizes, low, scores, q[:32], native=native)
        ops.restore(cache, table, sizes, low, native)
        extended = planner.extend(sizes, CHUNK)
        ops.extend(cache, table, sizes, extended, low, chunk, chunk, scores, 1.0)
        # One of the longest requests and many short ones.
        rows = [
            (0, range(one.pages), one, AppendStep(1, 0, 0, 0, one), low)
            for one in [sizes] + (ROWS - 1) * [short]
        ]
        ops.decode(cache, DecodeBatch.build(rows, "cpu"), q, new, new, q)
        print(f"up to ratio {ratio}: {scratch.num_bytes / cache.nbytes:.2f} of a layer")
    assert 0.8 < scratch.num_bytes / cache.nbytes < 1.5  # the GPU worker reserves 2
