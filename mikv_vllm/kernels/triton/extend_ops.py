"""Launches that restore and extend a compressed request."""

from typing import Any

import torch
import triton

from mikv_vllm.kernels.triton.extend import (
    choose_kernel,
    extend_high_kernel,
    extend_low_kernel,
)
from mikv_vllm.kernels.triton.layer_setup import LayerSetup, words
from mikv_vllm.kernels.triton.layout import LowLines
from mikv_vllm.kernels.triton.restore import (
    RECORDS_AT_ONCE,
    restore_high_kernel,
    restore_low_kernel,
)
from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LINE_BYTES, LOW_RECORD_TOKENS, LowFormat
from mikv_vllm.tiers.plan import TierSizes


class ExtendOps(LayerSetup):
    """``restore`` and ``extend`` of :class:`~mikv_vllm.kernels.layer_ops.LayerOps`."""

    def restore(
        self,
        cache: torch.Tensor,
        tiered_table: torch.Tensor,
        sizes: TierSizes,
        low_format: LowFormat,
        native: torch.Tensor,
    ) -> None:
        layout, heads = self._layout, self.num_kv_heads
        keys, values = self._native(native)
        places = (keys, values, *keys.stride()[:3], *words(cache), tiered_table)
        high, records = sizes.high_tokens, sizes.low_records
        restore_high_kernel[(triton.cdiv(high, 32), heads)](*places, high, LAYER=layout)
        if not records:
            return
        restore_low_kernel[(triton.cdiv(records, RECORDS_AT_ONCE.value), heads)](
            *places,
            high,
            records,
            sizes.low_end_bytes // LINE_BYTES,
            self._hadamard,
            self._hadamard_scale,
            LAYER=layout,
            FORMAT=LowLines(layout.head_dim, low_format),
        )

    def read_native(
        self, native: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pages = native[: triton.cdiv(num_tokens, self.geometry.block_size)]
        keys, values = (part.flatten(0, 1)[:num_tokens] for part in self._native(pages))
        return keys.contiguous(), values.contiguous()

    def extend(
        self,
        cache: torch.Tensor,
        tiered_table: torch.Tensor,
        sizes: TierSizes,
        step: TailStep,
        low_format: LowFormat,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: torch.Tensor,
        recent: int,
        keep: float,
    ) -> None:
        layout, heads, take = self._layout, self.num_kv_heads, self._scratch.take
        low = LowLines(layout.head_dim, low_format)
        tiered = (*words(cache), tiered_table)
        high = sizes.high_tokens
        count, leaving = high + len(k), LOW_RECORD_TOKENS * step.demoted_records
        copied = self._copy_high(tiered[0], tiered_table, high)
        merged = take("scores", (heads, count), torch.float32)
        order = take("order", (heads, count), torch.int32)
        choose_kernel[(heads,)](
            *copied,
            scores,
            scores.stride(0),
            keep,
            high,
            sizes.num_tokens,
            count,
            recent,
            leaving,
            merged,
            order,
            LAYER=layout,
        )
        tokens = (*copied, *tiered, k, k.stride(0), v, v.stride(0))
        extend_high_kernel[(triton.cdiv(step.after.high_tokens, HIGH_RECORD_TOKENS), heads)](
            *tokens, merged, order, high, count, leaving, LAYER=layout
        )
        if not leaving:
            return
        shape = (heads, step.demoted_records, 2, LOW_RECORD_TOKENS, layout.head_dim)
        integers = take("integers", shape, torch.uint8)
        extend_low_kernel[(step.demoted_records, heads)](
            *tokens,
            order,
            high,
            count,
            sizes.low_end_bytes // LINE_BYTES - sizes.low_records * low.count,
            integers,
            self._hadamard,
            self._hadamard_scale,
            LAYER=layout,
            FORMAT=low,
        )

    def _copy_high(
        self, cache: torch.Tensor, tiered_table: torch.Tensor, high_tokens: int
    ) -> tuple[Any, ...]:
        """Copy the pages that contain the high tier of a request.

        Args:
            cache: as words.

        Returns:
            The copy, its page and head strides, and a block table of it.
        """
        geometry = self._layout.geometry
        count = -(-geometry.high_bytes(high_tokens) // geometry.page_bytes)
        shape = (count, *cache.shape[1:])
        copied = self._scratch.take("tokens", shape, torch.int32)
        torch.index_select(cache, 0, tiered_table[:count], out=copied)
        table = torch.arange(count, dtype=torch.int32, device=cache.device)
        return copied, copied.stride(0), copied.stride(1), table
