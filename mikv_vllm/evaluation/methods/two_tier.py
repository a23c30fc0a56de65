"""Every token kept, the important ones at more bits."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import (
    NATIVE_BYTES,
    CacheMethod,
    HeadCache,
    Stored,
    by_groups,
)
from mikv_vllm.evaluation.methods.uniform import GROUP_CHANNELS, PAIR_BYTES, balancer
from mikv_vllm.tiers import codec
from mikv_vllm.tiers.formats import LADDERS, LOW_RECORD_TOKENS, Codec, LowFormat, TierGeometry
from mikv_vllm.tiers.key_codecs import key_codec
from mikv_vllm.tiers.plan import TierPlanner
from mikv_vllm.tiers.reference import select_high


@dataclass(frozen=True)
class PaperMiKV(CacheMethod):
    """The paper's own: heavy hitters and recent tokens high, the rest per token with its balancer.

    Args:
        low_bits: 2, 3 or 4.
        high_bits: 16, or 8 per token.
        high_share: share of tokens in the high tier, half of it recent ones.
        inverted: put the least important tokens there instead, to see what importance is worth.

    Source: arXiv:2402.18096, section 3.
    """

    low_bits: int
    high_bits: int
    high_share: float = 0.2
    inverted: bool = False

    @property
    def family(self) -> str:  # type: ignore[override]
        return f"MiKV (paper), {self.high_bits}-bit high"

    @property
    def setting(self) -> str:
        which = "least important " if self.inverted else ""
        return f"{self.low_bits} bits, {which}{self.high_share:.0%} high"

    def store(self, cache: HeadCache) -> Stored:
        tokens, head_dim = cache.keys.shape
        num_high = int(self.high_share * tokens)
        priority = cache.attention.clone()
        priority[tokens - num_high // 2 :] = torch.inf
        high = priority.topk(num_high, largest=not self.inverted).indices
        factor = balancer(cache)
        keys = by_groups(cache.keys * factor, self.low_bits, GROUP_CHANNELS) / factor
        values = by_groups(cache.values, self.low_bits, GROUP_CHANNELS)
        keys[high], values[high] = cache.keys[high], cache.values[high]
        if self.high_bits < 8 * NATIVE_BYTES:
            keys[high] = by_groups(keys[high], self.high_bits, GROUP_CHANNELS)
            values[high] = by_groups(values[high], self.high_bits, GROUP_CHANNELS)
        groups = max(1, head_dim // GROUP_CHANNELS)
        low_bytes = 2 * (head_dim * self.low_bits / 8 + PAIR_BYTES * groups)
        high_bytes = 2 * head_dim * self.high_bits / 8
        if self.high_bits < 8 * NATIVE_BYTES:
            high_bytes += 2 * PAIR_BYTES * groups
        total = num_high * high_bytes + (tokens - num_high) * low_bytes
        return Stored(keys, values, total + NATIVE_BYTES * head_dim)


@dataclass(frozen=True)
class MiKV(CacheMethod):
    """What this package serves, in plain torch; bytes are whole pages.

    Args:
        ratio: requested compression ratio.
        block_size: tokens of a native page.
        recent: newest tokens that stay high.
        codec: of the low tier.
    """

    ratio: float
    block_size: int = 32
    recent: int = 16
    codec: Codec = "channel"

    @property
    def family(self) -> str:  # type: ignore[override]
        return "MiKV for vLLM" + ("" if self.codec == "channel" else f", {self.codec}")

    @property
    def setting(self) -> str:
        return f"ratio {self.ratio:g}"

    def store(self, cache: HeadCache) -> Stored:
        geometry = TierGeometry(cache.head_dim, self.block_size)
        planner = TierPlanner.choose(
            geometry, self.ratio, self.recent, cache.num_tokens, LADDERS[self.codec]
        )
        sizes = planner.compress(cache.num_tokens)
        if sizes is None:
            return Stored(cache.keys, cache.values, cache.native_bytes)
        keys, values, _ = store_tiers(cache, sizes.high_tokens, self.recent, planner.low_format)
        return Stored(keys, values, sizes.pages * geometry.page_bytes)


def store_tiers(
    cache: HeadCache, num_high: int, recent: int, low_format: LowFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put ``num_high`` tokens into the 8-bit high tier and the others, if any, into the low one.

    Returns:
        Keys and values ``[tokens, head_dim]`` as they are read back, high tokens first, and the
        position of each.
    """
    high = select_high(cache.window_attention, num_high, recent)
    is_low = torch.ones(cache.num_tokens, dtype=torch.bool)
    is_low[high] = False
    keys, values = (
        codec.dequantize_high(*codec.quantize_high(x[high])) for x in (cache.keys, cache.values)
    )
    if num_high < cache.num_tokens:
        low_keys, low_values = (x[is_low] for x in (cache.keys, cache.values))
        keys_of = key_codec(low_format)
        frame = keys_of.frame(cache.keys, low_keys, cache.queries, low_format)
        records = low_keys.unflatten(0, (-1, LOW_RECORD_TOKENS))
        quantized = keys_of.quantize(records, frame, low_format)
        low_keys = keys_of.dequantize(quantized, frame).flatten(0, 1)
        rotated = codec.quantize_values(low_values, low_format.value_bits)
        low_values = codec.rotate(codec.merge_value_groups(rotated.dequantize()))
        keys, values = torch.cat([keys, low_keys]), torch.cat([values, low_values])
    return keys, values, torch.cat([high, is_low.nonzero().flatten()])
