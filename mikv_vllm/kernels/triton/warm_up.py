"""Compile the kernels before the first request needs them."""

from collections.abc import Iterable

import torch

from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.layer import LayerOps
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import AppendStep, TierSizes


def warm_up(
    ops: LayerOps,
    geometry: TierGeometry,
    num_heads: int,
    kv_cache: torch.Tensor,
    low_formats: Iterable[LowFormat],
) -> None:
    """Run every operation once for each low format, on pages apart from the cache.

    Args:
        num_heads: query heads.
        kv_cache: ``[pages, kv_heads, block_size, 2 * head_dim]``; only its shape, dtype and device
            are looked at.
    """
    high, low, chunk = 2 * LOW_RECORD_TOKENS, LOW_RECORD_TOKENS, HIGH_RECORD_TOKENS
    pages = -(-2 * (high + low + chunk) // geometry.block_size)
    cache = kv_cache.new_zeros(2 * pages, *kv_cache.shape[1:])
    keys, values = cache.transpose(1, 2).split(geometry.head_dim, -1)
    device, kv_heads = cache.device, cache.shape[1]
    native, tiered = torch.arange(2 * pages, dtype=torch.int32, device=device).split(pages)
    queries = cache.new_zeros(chunk, num_heads, geometry.head_dim)
    new = cache.new_zeros(chunk, kv_heads, geometry.head_dim)
    scores = torch.zeros(kv_heads, high + low + chunk + 1, device=device)
    end = pages * geometry.page_bytes
    before = TierSizes(pages, high, 1, end)
    demoting = AppendStep(1, 0, 0, 1, TierSizes(pages, high - LOW_RECORD_TOKENS + 1, 2, end))
    extending = AppendStep(
        chunk, 0, 1, 1, TierSizes(pages, high - LOW_RECORD_TOKENS + chunk, 2, end)
    )
    ops.score(keys, native, before.num_tokens, queries, scores)
    for low_format in low_formats:
        ops.compress(keys, values, native, cache, tiered, before, low_format, scores, queries)
        ops.restore(cache, tiered, before, low_format, keys, values)
        ops.extend(cache, tiered, before, extending, low_format, new, new, scores, 1.0)
        ops.compress(keys, values, native, cache, tiered, before, low_format, scores, queries)
        row = (0, tiered.cpu().numpy(), before, demoting, low_format)
        batch = DecodeBatch.build([row], device)
        ops.decode(cache, batch, queries, new, new, torch.empty_like(queries))
