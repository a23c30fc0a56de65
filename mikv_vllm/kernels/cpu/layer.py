"""The tier operations of one attention layer on the CPU."""

from typing import Any

import numpy as np
import torch

from mikv_vllm.kernels.cpu import _C
from mikv_vllm.kernels.cpu.batch import DecodeBatch
from mikv_vllm.tiers.formats import LINE_BYTES, HeaderLayout, LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierSizes

HEAD_DIMS: tuple[int, ...] = (64, 80, 96, 128, 256)
"""Head sizes that the kernels are compiled for."""
_DTYPES = {torch.bfloat16: 0, torch.float16: 1}


def _place(cache: torch.Tensor) -> tuple[int, int, int]:
    """Address, page stride and head stride of a cache, in bytes."""
    size = cache.element_size()
    return cache.data_ptr(), cache.stride(0) * size, cache.stride(1) * size


def _size_arguments(sizes: TierSizes, low_format: LowFormat) -> tuple[int, int, int, int, int]:
    """Sizes and format as the kernels take them; ends count in lines."""
    return (
        sizes.high_tokens,
        sizes.low_records,
        sizes.low_end_bytes // LINE_BYTES,
        low_format.key_code,
        low_format.value_bits,
    )


class LayerOps:
    """Score, compress and decode on one layer's cache.

    Args:
        head_dim: channels of a head, one of :data:`HEAD_DIMS`.
        num_heads, num_kv_heads: query heads, and the KV heads that they share evenly.
        block_size: tokens of a native page, a multiple of 16.
        high_bits: 8 or 16.
        dtype: bfloat16 or float16, of the cache, queries, keys, values and output.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off.
        sinks: ``[num_heads]`` logits that only join the softmax's denominator, or None.
        decay: factor on every importance score at each decode step.
        recent: newest tokens that are never demoted.
        key_index, value_index: int32 ``[block_size * head_dim]``; channel ``c`` of token ``t`` of
            a native page lies at element ``[t * head_dim + c]`` of its head's part of the page.

    A cache is a tensor of any dtype whose first axes are ``[pages, kv_heads]`` and whose rest is
    contiguous.

    Raises:
        ValueError: a parameter that the kernels are not compiled for.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        high_bits: int,
        dtype: torch.dtype,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
        decay: float,
        recent: int,
        key_index: torch.Tensor,
        value_index: torch.Tensor,
    ) -> None:
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim is {head_dim}, but must be one of {HEAD_DIMS}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}, but must be bfloat16 or float16")
        if block_size % 16:
            raise ValueError(f"block_size is {block_size}, but must be a multiple of 16")
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly")
        index = [i.to(torch.int32).contiguous().flatten() for i in (key_index, value_index)]
        assert all(len(i) == block_size * head_dim for i in index), "index of the wrong size"
        sinks = None if sinks is None else sinks.float().contiguous()
        self._header_bytes = HeaderLayout(head_dim).num_bytes
        self._layer = _C.Layer(
            head_dim,
            num_heads,
            num_kv_heads,
            block_size,
            high_bits,
            _DTYPES[dtype],
            scale,
            softcap or 0.0,
            0 if sinks is None else sinks.data_ptr(),
            decay,
            recent,
            index[0].data_ptr(),
            index[1].data_ptr(),
        )

    def decode(
        self,
        cache: torch.Tensor,
        batch: DecodeBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """One decode step of every row of ``batch``: move, demote, append, attend, score.

        Args:
            q: ``[tokens, heads, head_dim]``; heads and channels contiguous, as in the others.
            k, v: ``[tokens, kv_heads, head_dim]``, the new tokens.
            out: like ``q``; only the batch's rows are written.
        """
        self._layer.decode(
            *_place(cache),
            *batch.addresses,
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            out.data_ptr(),
            out.stride(0),
        )

    def score(
        self,
        cache: torch.Tensor,
        native_table: Any,
        num_tokens: int,
        q: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """Add the attention that queries pay to each token of a native request to its scores.

        Args:
            native_table: page ids, integers.
            q: ``[n, heads, head_dim]``, of the last ``n`` of ``num_tokens`` tokens, causal.
            scores: ``[kv_heads, >= num_tokens]``, float32, contiguous.
        """
        table = np.ascontiguousarray(native_table, np.int32)
        self._layer.score(
            *_place(cache),
            table.ctypes.data,
            num_tokens,
            q.data_ptr(),
            q.stride(0),
            len(q),
            scores.data_ptr(),
            scores.stride(0),
        )

    def compress(
        self,
        cache: torch.Tensor,
        native_table: Any,
        tiered_table: Any,
        sizes: TierSizes,
        low_format: LowFormat,
        scores: torch.Tensor,
        q: torch.Tensor,
        recent: int,
    ) -> None:
        """Write native tokens into a block.

        Args:
            native_table, tiered_table: page ids, integers; they may share pages.
            sizes: sizes to reach.
            scores: ``[kv_heads, >= sizes.num_tokens]``, float32, contiguous.
            q: ``[n, heads, head_dim]``, the prompt's last queries, at least one: the channels
                of low keys whose rounding would cost these most get more bits.
            recent: newest tokens that stay high, at most ``sizes.high_tokens``.
        """
        native = np.ascontiguousarray(native_table, np.int32)
        tiered = np.ascontiguousarray(tiered_table, np.int32)
        self._layer.compress(
            *_place(cache),
            native.ctypes.data,
            tiered.ctypes.data,
            sizes.num_tokens,
            sizes.pages,
            *_size_arguments(sizes, low_format),
            recent,
            scores.data_ptr(),
            scores.stride(0),
            q.data_ptr(),
            q.stride(0),
            len(q),
        )

    def restore(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        low_format: LowFormat,
        native: torch.Tensor,
    ) -> None:
        """Lay a compressed request out as native pages: its high tokens, then its low ones.

        Args:
            tiered_table: page ids, integers.
            native: the pages to write, from the first on; like ``cache``.
        """
        tiered = np.ascontiguousarray(tiered_table, np.int32)
        self._layer.restore(
            *_place(cache), tiered.ctypes.data, *_size_arguments(sizes, low_format), *_place(native)
        )

    def extend(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        step: AppendStep,
        low_format: LowFormat,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: torch.Tensor,
        recent: int,
        keep: float,
    ) -> None:
        """Take the next tokens of a prompt into a compressed request's tiers.

        Args:
            tiered_table: page ids, integers; the step's new ones included.
            sizes: sizes before.
            step: what :meth:`~mikv_vllm.tiers.plan.TierPlanner.extend` planned.
            k, v: ``[tokens, kv_heads, head_dim]``; heads and channels contiguous.
            scores: ``[kv_heads, sizes.num_tokens + tokens]``, float32, contiguous, in the order
                of :meth:`restore`, the new tokens last.
            recent: newest tokens that stay high.
            keep: factor on the high tokens' own scores, to which theirs are added.
        """
        tiered = np.ascontiguousarray(tiered_table, np.int32)
        self._layer.extend(
            *_place(cache),
            tiered.ctypes.data,
            *_size_arguments(sizes, low_format),
            step.moved_records,
            step.demoted_records,
            step.after.low_end_bytes // LINE_BYTES,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            len(k),
            scores.data_ptr(),
            scores.stride(0),
            recent,
            keep,
        )

    def begin(self, cache: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Give new tails the headers of the blocks before them.

        Args:
            source, target: first pages of the blocks and of the new tails, integers ``[tails]``.
        """
        parts = cache.flatten(2)
        size = self._header_bytes // cache.element_size()
        parts[target, :, :size] = parts[source, :, :size]
