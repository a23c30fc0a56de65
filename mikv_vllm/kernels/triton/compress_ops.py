"""Launches that score and compress a native request."""

from typing import Any

import torch
import triton

from mikv_vllm.kernels.triton.compress import (
    frame_kernel,
    measure_kernel,
    select_kernel,
    write_high_kernel,
    write_low_kernel,
)
from mikv_vllm.kernels.triton.layer_setup import LayerSetup, words
from mikv_vllm.kernels.triton.layout import LowLines
from mikv_vllm.kernels.triton.native import PARTS
from mikv_vllm.kernels.triton.score import (
    KEYS,
    SCORE_ROWS,
    prompt_scores_kernel,
    prompt_sums_kernel,
)
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LINE_BYTES, LOW_RECORD_TOKENS, LowFormat
from mikv_vllm.tiers.plan import TierSizes


class CompressOps(LayerSetup):
    """``score`` and ``compress`` of :class:`~mikv_vllm.kernels.layer_ops.LayerOps`."""

    def score(
        self,
        cache: torch.Tensor,
        native_table: torch.Tensor,
        num_tokens: int,
        q: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        layout, heads = self._layout, self.num_kv_heads
        rows = len(q) * layout.queries_per_kv_head
        sums = self._scratch.take("sums", (heads, PARTS, 2, rows), torch.float32)
        keys, _ = self._native(cache)
        native = (keys, *keys.stride()[:3], native_table, num_tokens)
        queries = (q, q.stride(0), len(q))
        prompt_sums_kernel[(triton.cdiv(rows, SCORE_ROWS), PARTS, heads)](
            *native,
            *queries,
            sums,
            self._scale,
            SOFTCAP=self._softcap,
            PARTS=PARTS,
            ROWS=SCORE_ROWS,
            LAYER=layout,
        )
        prompt_scores_kernel[(triton.cdiv(num_tokens, KEYS.value), heads)](
            *native,
            *queries,
            sums,
            scores,
            scores.stride(0),
            self._sinks,
            self._scale,
            SOFTCAP=self._softcap,
            HAS_SINKS=self._sinks is not None,
            PARTS=PARTS,
            ROWS=SCORE_ROWS,
            LAYER=layout,
        )

    def compress(
        self,
        cache: torch.Tensor,
        native_table: torch.Tensor,
        tiered_table: torch.Tensor,
        sizes: TierSizes,
        low_format: LowFormat,
        scores: torch.Tensor,
        q: torch.Tensor,
        recent: int,
        native: torch.Tensor | None = None,
    ) -> None:
        """See :meth:`mikv_vllm.kernels.layer_ops.LayerOps.compress`.

        Args:
            native: tensor with the native pages, ``[pages, kv_heads, block_size, 2 * head_dim]``,
                if they are not in ``cache``. The tables must not share pages of one tensor, because
                some programs write while others read: pass a copy.
        """
        layout, heads, tokens = self._layout, self.num_kv_heads, sizes.num_tokens
        key_cache, value_cache = self._native(cache if native is None else native)
        strides_and_table = (*key_cache.stride()[:3], native_table)
        both = (key_cache, value_cache, *strides_and_table)
        tiered = (*words(cache), tiered_table)
        take = self._scratch.take
        order = take("order", (heads, tokens), torch.int32)
        high = sizes.high_tokens
        select_kernel[(heads,)](scores, scores.stride(0), tokens, high, recent, order, tokens)
        low = LowLines(layout.head_dim, low_format)
        self._write_header((key_cache, *strides_and_table), tiered, order, sizes, low, q)
        write_high_kernel[(triton.cdiv(high, HIGH_RECORD_TOKENS), heads)](
            *both, *tiered, scores, scores.stride(0), order, tokens, high, LAYER=layout
        )
        if not sizes.low_records:
            return
        shape = (heads, sizes.low_records, 2, LOW_RECORD_TOKENS, layout.head_dim)
        integers = take("tokens", shape, torch.uint8)
        write_low_kernel[(sizes.low_records, heads)](
            *both,
            *tiered,
            order,
            tokens,
            high,
            sizes.low_records,
            sizes.low_end_bytes // LINE_BYTES,
            integers,
            self._hadamard,
            self._hadamard_scale,
            LAYER=layout,
            FORMAT=low,
            **layout.write_options,
        )

    def _write_header(
        self,
        keys: tuple[Any, ...],
        tiered: tuple[Any, ...],
        order: torch.Tensor,
        sizes: TierSizes,
        low: LowLines,
        q: torch.Tensor,
    ) -> None:
        """Write the header of each head: :meth:`~mikv_vllm.tiers.key_codecs.KeyCodec.frame`.

        Args:
            keys: native keys, their strides and their block table.
            tiered: cache as words, its strides and the block table of the tiers.
            order: of ``select_kernel``.
        """
        layout, heads, tokens = self._layout, self.num_kv_heads, sizes.num_tokens
        take = self._scratch.take
        partial = take("keys", (heads, PARTS, 3, layout.padded), torch.float32)
        ranges = take("ranges", (heads, PARTS, layout.padded), torch.float64)
        ranked = sizes.low_records > 0 and not low.keys_per_token
        first_low = sizes.high_tokens if ranked else 0
        measure_kernel[(PARTS, heads)](
            *keys, order, tokens, tokens, first_low, partial, ranges, PARTS=PARTS, LAYER=layout
        )
        by_kv_head = q.unflatten(1, (heads, -1))
        if ranked:
            squares = by_kv_head.double().square().sum((0, 2))
            cost = (squares * ranges.sum(1)[:, : layout.head_dim]).float()
            channels = cost.argsort(dim=-1, descending=True, stable=True)
        else:
            channels = torch.arange(layout.head_dim, device=q.device).repeat(heads, 1)
        largest = by_kv_head.abs().amax((0, 2)).float() if low.keys_per_token else None
        frame_kernel[(heads,)](
            *tiered, partial, channels, largest, tokens, PARTS=PARTS, LAYER=layout, FORMAT=low
        )
