"""MiKV as this package serves it, in plain torch."""

from dataclasses import dataclass

import torch

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache, Stored
from mikv_vllm.tiers import codec
from mikv_vllm.tiers.blocks import BlockPlanner
from mikv_vllm.tiers.formats import LADDERS, LOW_RECORD_TOKENS, Codec, LowFormat, TierGeometry
from mikv_vllm.tiers.key_codecs import key_codec
from mikv_vllm.tiers.reference import select_high

DEFAULT_PAGE = 32
"""Tokens of a native page, unless a method or a command says otherwise."""


@dataclass(frozen=True)
class MiKV(CacheMethod):
    """Keep all tokens in the two tiers of this package, as the planner sizes them for a ratio.

    Bytes are those of whole pages. Source: :class:`~mikv_vllm.tiers.blocks.BlockPlanner` and the
    codecs of :mod:`mikv_vllm.tiers`, which the kernels are tested against.

    Args:
        ratio (float): requested compression ratio, above 1.
        block_size (int, default 32): tokens of a native page.
        recent (int, default 16): newest tokens, which stay in the high tier.
        codec (str, default ``channel``): codec of the keys in the low tier, ``channel`` or
            ``balanced``.
        ladder (tuple of LowFormat, optional): low formats, richest first; None for those of the
            codec.
    """

    ratio: float
    block_size: int = DEFAULT_PAGE
    recent: int = 16
    codec: Codec = "channel"
    ladder: tuple[LowFormat, ...] | None = None

    @property
    def family(self) -> str:  # type: ignore[override]
        return "MiKV for vLLM" + ("" if self.codec == "channel" else f", {self.codec}")

    @property
    def setting(self) -> str:
        pages = "" if self.block_size == DEFAULT_PAGE else f", pages of {self.block_size}"
        return f"ratio {self.ratio:g}{pages}"

    def store(self, cache: HeadCache) -> Stored:
        geometry = TierGeometry(cache.head_dim, self.block_size)
        ladder = self.ladder or LADDERS[self.codec]
        planner = BlockPlanner(geometry, self.ratio, self.recent, ladder)
        blocks = planner.compress(cache.num_tokens)
        if blocks is None:
            return Stored(cache.keys, cache.values, cache.native_bytes)
        keys, values, num_pages, first = [], [], 0, 0
        for block in blocks:
            sizes = block.sizes
            part = cache.part(first, first + sizes.num_tokens)
            recent = min(self.recent, sizes.high_tokens) if block is blocks[-1] else 0
            stored = store_tiers(part, sizes.high_tokens, recent, block.low_format)
            keys.append(stored[0])
            values.append(stored[1])
            num_pages += sizes.pages
            first += sizes.num_tokens
        return Stored(torch.cat(keys), torch.cat(values), num_pages * geometry.page_bytes)


def store_tiers(
    cache: HeadCache, num_high: int, recent: int, low_format: LowFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Store ``num_high`` tokens in the 8-bit high tier and the others in the low tier.

    Args:
        cache: the cache of one head. The number of low tokens must be a multiple of 32, or 0.
        num_high: tokens in the high tier.
        recent: newest tokens, which stay in the high tier.
        low_format: format of the low tier.

    Returns:
        Keys and values ``[tokens, head_dim]`` as they are read back, high tokens first, and the
        position of each of these tokens in the prompt, int64 ``[tokens]``.
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
