"""The tier operations of one attention layer on a CPU."""

from typing import Any

import numpy as np
import torch

from mikv_vllm.kernels import layer_ops
from mikv_vllm.kernels.batch import round_up
from mikv_vllm.kernels.cpu._C import Layer
from mikv_vllm.kernels.cpu.batch import DecodeBatch
from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import LINE_BYTES, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import TierSizes

HEAD_DIMS: tuple[int, ...] = (64, 80, 96, 128, 256)
"""Head sizes that the kernels are compiled for."""
_DTYPES = {torch.bfloat16: 0, torch.float16: 1}


def _place(cache: torch.Tensor) -> tuple[int, int, int]:
    """Address, page stride and head stride of a cache, in bytes."""
    size = cache.element_size()
    return cache.data_ptr(), cache.stride(0) * size, cache.stride(1) * size


def _size_arguments(sizes: TierSizes, low_format: LowFormat) -> tuple[int, int, int, int, int]:
    """Sizes and low format as arguments of the kernels; the low end is in lines."""
    return (
        sizes.high_tokens,
        sizes.low_records,
        sizes.low_end_bytes // LINE_BYTES,
        low_format.key_code,
        low_format.value_bits,
    )


class LayerOps(layer_ops.LayerOps[DecodeBatch]):
    """The operations of :class:`~mikv_vllm.kernels.layer_ops.LayerOps` in C++.

    ``compress`` accepts tables that share pages. The operations return when their results are
    valid.

    Args:
        head_dim: one of :data:`HEAD_DIMS`.
        dtype: of the cache, queries, keys, values and output; bfloat16 or float16.
        key_index, value_index: int32 ``[block_size * head_dim]``. Channel ``c`` of token ``t`` of a
            native page is element ``index[t * head_dim + c]`` of the part of the page that belongs
            to its head.

    Other parameters are described in :class:`~mikv_vllm.kernels.layer_ops.LayerOps`.

    Raises:
        ValueError: the kernels do not support a parameter.
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
        layer_ops.check_shape(head_dim, HEAD_DIMS, num_heads, num_kv_heads, block_size)
        if dtype not in _DTYPES:
            raise ValueError(f"dtype is {dtype}, but must be bfloat16 or float16")
        index = [i.to(torch.int32).contiguous().flatten() for i in (key_index, value_index)]
        assert all(len(i) == block_size * head_dim for i in index), "index of the wrong size"
        sinks = None if sinks is None else sinks.float().contiguous()
        self.head_dim = head_dim
        self.num_kv_heads = num_kv_heads
        self.geometry = TierGeometry(head_dim, block_size, high_bits)
        self._native_index = tuple(i.long().unflatten(0, (block_size, head_dim)) for i in index)
        self._layer = Layer(
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
        self._draft_weights = torch.zeros(0, num_kv_heads, 0, 0)

    def score(
        self,
        cache: torch.Tensor,
        native_table: Any,
        num_tokens: int,
        q: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
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

    def decode(
        self,
        cache: torch.Tensor,
        batch: DecodeBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
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
            *self._draft_place(batch.drafts),
        )

    def _draft_place(self, least: tuple[int, int, int] | None) -> tuple[int, int, int, int]:
        """Address and strides of the draft weights, float32 ``[slots, kv_heads, drafts, high]``.

        Weights of a draft are kept until the next step of its request, which knows whether the
        draft was accepted.

        Args:
            least: slots, drafts and high tokens to make room for.
        """
        if least is None:
            return 0, 0, 0, 0
        known = self._draft_weights
        slots, _, drafts, high = known.shape
        if slots < least[0] or drafts < least[1] or high < least[2]:
            slots, drafts = max(slots, round_up(least[0], 8)), max(drafts, least[1])
            high = max(high, round_up(least[2], 256))
            self._draft_weights = torch.zeros(slots, self.num_kv_heads, drafts, high)
            self._draft_weights[: len(known), :, : known.shape[2], : known.shape[3]] = known
        weights = self._draft_weights
        return weights.data_ptr(), weights.stride(0), weights.stride(1), weights.stride(2)

    def restore(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        low_format: LowFormat,
        native: torch.Tensor,
    ) -> None:
        tiered = np.ascontiguousarray(tiered_table, np.int32)
        self._layer.restore(
            *_place(cache), tiered.ctypes.data, *_size_arguments(sizes, low_format), *_place(native)
        )

    def extend(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        step: TailStep,
        low_format: LowFormat,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: torch.Tensor,
        recent: int,
        keep: float,
    ) -> None:
        tiered = np.ascontiguousarray(tiered_table, np.int32)
        self._layer.extend(
            *_place(cache),
            tiered.ctypes.data,
            *_size_arguments(sizes, low_format),
            step.demoted_records,
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

    def read_native(
        self, native: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        block_size = self.geometry.block_size
        parts = native[: -(-num_tokens // block_size)].flatten(2)
        keys, values = (
            parts[:, :, index].transpose(1, 2).flatten(0, 1)[:num_tokens].contiguous()
            for index in self._native_index
        )
        return keys, values
