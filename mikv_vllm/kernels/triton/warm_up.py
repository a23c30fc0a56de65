"""Compilation of the kernels before the first request needs them."""

from collections.abc import Sequence

import torch

from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.layer import LayerOps
from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import TierSizes


def warm_up(
    ops: LayerOps,
    geometry: TierGeometry,
    num_heads: int,
    kv_cache: torch.Tensor,
    low_formats: Sequence[LowFormat],
) -> None:
    """Run every operation once for each low format, on newly allocated pages.

    Args:
        num_heads: query heads.
        kv_cache: ``[pages, kv_heads, block_size, 2 * head_dim]``. Its shape, dtype and device are
            used, its data is neither read nor written.
    """
    high, low, more = 2 * LOW_RECORD_TOKENS, LOW_RECORD_TOKENS, HIGH_RECORD_TOKENS
    pages = -(-2 * (high + low + more) // geometry.block_size)
    cache = kv_cache.new_zeros(2 * pages, *kv_cache.shape[1:])
    device, kv_heads = cache.device, cache.shape[1]
    native, tiered = torch.arange(2 * pages, dtype=torch.int32, device=device).split(pages)
    queries = cache.new_zeros(more, num_heads, geometry.head_dim)
    new = cache.new_zeros(more, kv_heads, geometry.head_dim)
    scores = torch.zeros(kv_heads, high + low + more + 1, device=device)
    end = pages * geometry.page_bytes
    before = TierSizes(pages, high, 1, end)
    left = high - LOW_RECORD_TOKENS
    demoting = TailStep(1, (), False, 1, TierSizes(pages, left + 1, 2, end))
    extending = TailStep(more, (), False, 1, TierSizes(pages, left + more, 2, end))
    ops.score(cache, native, before.num_tokens, queries, scores)
    for low_format in low_formats:
        ops.compress(cache, native, tiered, before, low_format, scores, queries, 0)
        ops.restore(cache, tiered, before, low_format, cache)
        ops.extend(cache, tiered, before, extending, low_format, new, new, scores, 0, 1.0)
        ops.compress(cache, native, tiered, before, low_format, scores, queries, 0)
        row = (0, tiered.cpu().numpy(), before, demoting, low_format)
        batch = DecodeBatch.build([row], device, low_formats)
        ops.decode(cache, batch, queries, new, new, torch.empty_like(queries))
