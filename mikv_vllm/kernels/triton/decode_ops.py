"""Launches of the decode step."""

from typing import Any

import torch

from mikv_vllm.kernels.triton.attend import attend_kernel
from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.change import append_kernel, change_kernel
from mikv_vllm.kernels.triton.layer_setup import DTYPES, LayerSetup, words
from mikv_vllm.kernels.triton.layout import LowFormats, LowLines
from mikv_vllm.kernels.triton.merge import merge_kernel
from mikv_vllm.kernels.triton.splits import most_splits
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS


class DecodeOps(LayerSetup):
    """``decode`` of :class:`~mikv_vllm.kernels.layer_ops.LayerOps`, and its parts."""

    def decode(
        self,
        cache: torch.Tensor,
        batch: DecodeBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        if batch.changing:
            self.change(cache, batch, k.dtype)
        append_kernel[(self.num_kv_heads, len(batch.rows))](
            *self._pages(cache, batch), k, k.stride(0), v, v.stride(0), LAYER=self._layout
        )
        self.attend(cache, batch, q, out)

    def _pages(self, cache: torch.Tensor, batch: DecodeBatch) -> tuple[Any, ...]:
        return (*words(cache), batch.rows, batch.tables, batch.tables.stride(0))

    def change(self, cache: torch.Tensor, batch: DecodeBatch, dtype: torch.dtype) -> None:
        """Demote, in the rows whose step says so.

        Args:
            cache: in and out, tiered pages.
            dtype: dtype of 16-bit high tokens.
        """
        heads, rows = self.num_kv_heads, len(batch.rows)
        take, stride = self._scratch.take, batch.num_high + rows * LOW_RECORD_TOKENS
        scores = take("scores", (heads, stride), torch.float32)
        order = take("order", (heads, stride), torch.int32)
        shape = (rows, heads, 2, LOW_RECORD_TOKENS, self._layout.head_dim)
        integers = take("integers", shape, torch.uint8)
        for low_format in batch.changing:
            change_kernel[(heads, rows)](
                *self._pages(cache, batch),
                self._hadamard,
                self._hadamard_scale,
                self._recent,
                scores,
                order,
                batch.starts,
                stride,
                integers,
                DTYPE=DTYPES[dtype],
                LAYER=self._layout,
                FORMAT=LowLines(self._layout.head_dim, low_format),
            )

    def attend(
        self, cache: torch.Tensor, batch: DecodeBatch, q: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compute attention over all blocks, and update the scores of the high tokens of tails.

        Arguments are as in ``decode``. ``out`` can have any floating-point dtype.
        """
        layout, heads, rows = self._layout, self.num_kv_heads, len(batch.rows)
        splits = most_splits(self._programs, rows * heads)
        take = self._scratch.take
        shape = (rows, heads, splits, layout.heads, layout.padded)
        partial_out = take("partial_out", shape, torch.float32)
        shape = (rows, heads, splits, 2, layout.heads)
        partial_sums = take("partial_sums", shape, torch.float32)
        logits = take("logits", (heads, layout.queries_per_kv_head, batch.num_high), torch.float32)
        partials = (partial_out, partial_sums, logits, batch.starts, batch.num_high)
        for family in batch.families:
            attend_kernel[(splits, heads, rows)](
                *self._pages(cache, batch),
                q,
                q.stride(0),
                *partials,
                self._scale,
                SOFTCAP=self._softcap,
                LAYER=layout,
                FORMATS=LowFormats(layout.head_dim, family),
                num_warps=layout.warps,
            )
        merge_kernel[(splits, heads, rows)](
            *self._pages(cache, batch),
            *partials,
            out,
            out.stride(0),
            self._hadamard,
            self._hadamard_scale,
            self._sinks,
            self._decay,
            HAS_SINKS=self._sinks is not None,
            LAYER=layout,
        )
