"""The GPU attention backends: vLLM's FlashAttention or Triton kernels for native rows, ours for
tiered rows.

vLLM's kernel runs over the whole batch, so that nothing is gathered or scattered: a tiered row's
sequence is as short as its queries there, and what comes out for it is overwritten by ours.
"""

from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from mikv_vllm.engine.spec import TieredAttentionSpec, tiered_spec
from mikv_vllm.engine.tiered_metadata import ExtendedRow, ScoredRow, restored_part, split_batch
from mikv_vllm.engine.worker_context import context
from mikv_vllm.kernels.batch import TOKEN
from mikv_vllm.kernels.triton import DecodeBatch, LayerOps, Scratch
from mikv_vllm.kernels.triton.batch import high_starts
from mikv_vllm.kernels.triton.warm_up import warm_up
from mikv_vllm.tiers.formats import TierGeometry


class TieredBackend(AttentionBackend):
    """What both backends change of vLLM's."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        assert context.compression is not None
        return tiered_spec(spec, context.compression)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A tier is a stream of bytes in each head's part of a page.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.BHLNC, KVCacheLayout.LHBNC)


@dataclass(frozen=True)
class TieredMetadata:
    """Metadata of a step in which the plan touches a tier."""

    native: Any
    """vLLM's, of the whole batch."""
    decode: DecodeBatch | None
    """The compressed rows; None if there are none."""
    scored: list[ScoredRow]
    extended: list[tuple[ExtendedRow, Any]]
    """Rows with a chunk of a prompt, and vLLM's metadata of each in a workspace."""


class TieredMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Splits a step's batch by the plan; a step without tiers gets vLLM's own metadata."""

    # The worker keeps steps that touch a tier out of full graphs: which kernels run differs.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, *args: Any) -> AttentionCGSupport:
        return cls._cudagraph_support

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        batch = common_attn_metadata
        if context.is_native or not isinstance(self.kv_cache_spec, TieredAttentionSpec):
            return super().build(common_prefix_len, batch, fast_build)
        starts = batch.query_start_loc_cpu.numpy()
        split = split_batch(context, starts, batch.block_table_tensor)
        native = copy(batch)
        native.seq_lens = batch.seq_lens.clone()
        decode = None
        if len(split.rows):
            decode, rows = self._upload(*split.decode, split.rows)
            native.seq_lens.index_fill_(0, rows, 1)
            # vLLM's slots of these tokens lie in pages that the request gave back.
            batch.slot_mapping.index_fill_(0, decode.rows[:, TOKEN].long(), -1)
        extended = []
        for chunk in split.extended:
            native.seq_lens[chunk.row] = chunk.tokens.stop - chunk.tokens.start
            batch.slot_mapping[chunk.tokens] = -1
            on_device = replace(chunk, table=async_tensor_h2d(chunk.table, device=self.device))
            part = restored_part(batch, chunk, self.kv_cache_spec.block_size)
            built = super().build(0, part, fast_build)
            built.scheduler_metadata = None  # a buffer of the builder's, which comes to hold more
            extended.append((on_device, built))
        metadata = super().build(common_prefix_len, native, fast_build)
        return TieredMetadata(metadata, decode, split.scored, extended)

    def _upload(
        self, rows: np.ndarray, tables: np.ndarray, batch_rows: np.ndarray
    ) -> tuple[DecodeBatch, torch.Tensor]:
        """The compressed rows on the device, and which rows of the batch they are, in one copy."""
        assert context.compression is not None
        # Tables first: their size keeps the rows aligned.
        arrays = (tables, rows, high_starts(rows), batch_rows)
        parts = [array.astype(np.int32, copy=False).ravel() for array in arrays]
        staged = async_tensor_h2d(np.concatenate(parts), device=self.device)
        tables_, rows_, starts, chosen = staged.split([len(part) for part in parts])
        batch = DecodeBatch.of(
            rows_.view(rows.shape),
            tables_.view(tables.shape),
            starts,
            rows,
            context.compression.ladder,
        )
        return batch, chosen.long()


class TieredImpl(AttentionImpl[Any]):
    """Runs native rows on vLLM's kernel; scores, compresses and decodes tiered rows on ours."""

    num_kv_heads: int
    logits_soft_cap: float
    sinks: torch.Tensor | None
    _layer_ops: LayerOps | None = None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False  # our kernels write the output as it is

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        scales = (output_scale, output_block_scale)
        if not isinstance(attn_metadata, TieredMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        native = attn_metadata.native
        super().forward(layer, query, key, value, kv_cache, native, output, *scales)
        for row in attn_metadata.scored:
            self._score(layer, query, kv_cache, row)
        if attn_metadata.decode is not None:
            ops = self._ops(kv_cache)
            ops.decode(kv_cache, attn_metadata.decode, query, key, value, output)
        for chunk, metadata in attn_metadata.extended:
            t = chunk.tokens
            self._extend(layer, query[t], key[t], value[t], kv_cache, chunk, metadata, output[t])
        return output

    @property
    def shape(self) -> tuple[Any, ...]:
        """What kernels are compiled for."""
        heads = (self.head_size, self.num_heads, self.num_kv_heads)
        return (*heads, self.logits_soft_cap, self.sinks is not None)

    @torch.inference_mode()
    def warm_up(self, kv_cache: torch.Tensor) -> None:
        """Compile the tier kernels for every low format that a request may get."""
        assert context.compression is not None
        settings = context.compression
        geometry = TierGeometry(self.head_size, kv_cache.shape[2], settings.high_bits)
        warm_up(self._ops(kv_cache), geometry, self.num_heads, kv_cache, settings.ladder)

    def _score(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, row: ScoredRow
    ) -> None:
        """Score a native row from its last queries, and compress it if the plan says so."""
        ops, step = self._ops(kv_cache), row.score
        by_layer = context.scores[row.request_id]
        scores = by_layer.get(layer.layer_name)
        if scores is None:
            scores = torch.zeros(self.num_kv_heads, step.capacity, device=kv_cache.device)
            by_layer[layer.layer_name] = scores
        queries = query[row.queries]
        pages = row.native_pages
        keys, values = self._native(kv_cache)
        ops.score(keys, pages, step.num_tokens, queries, scores)
        if row.compress is None or row.tiered_pages is None:
            return
        assert context.compression is not None
        if row.compress.in_place:
            # The kernels write while others of them still read.
            pages = pages[: len(row.compress.native_pages)]
            copied = context.workspace(kv_cache, len(pages))
            torch.index_select(kv_cache, 0, pages, out=copied)
            keys, values = self._native(copied)
            pages = torch.arange(len(pages), dtype=torch.int32, device=kv_cache.device)
        ops.compress(
            keys,
            values,
            pages,
            kv_cache,
            row.tiered_pages,
            row.compress.sizes,
            row.compress.low_format,
            scores,
            queries[-context.compression.window :],
        )

    def _extend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        row: ExtendedRow,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """Attend to a compressed beginning and the chunk behind it, then take the chunk in.

        Args:
            query, key, value, output: of the row's tokens alone.
        """
        assert context.compression is not None
        ops, step = self._ops(kv_cache), row.step
        pages = metadata.block_table[0]
        native = context.workspace(kv_cache, len(pages))
        keys, values = self._native(native)
        ops.restore(kv_cache, row.table, step.before, step.low_format, keys, values)
        self.do_kv_cache_update(layer, key, value, native, metadata.slot_mapping)
        super().forward(layer, query, key, value, native, metadata, output)
        num_tokens = step.append.after.num_tokens
        scores = torch.zeros(self.num_kv_heads, num_tokens, device=kv_cache.device)
        ops.score(keys, pages, num_tokens, query[-step.num_queries :], scores)
        keep = float(context.compression.importance == "h2o")
        ops.extend(
            kv_cache, row.table, step.before, step.append, step.low_format, key, value, scores, keep
        )

    def _native(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of native pages, ``[pages, block_size, kv_heads, head_dim]`` each."""
        return kv_cache.transpose(1, 2).split(self.head_size, dim=-1)

    def _ops(self, kv_cache: torch.Tensor) -> LayerOps:
        """The tier kernels, set up for this layer at its first use."""
        if self._layer_ops is None:
            assert context.compression is not None
            self._layer_ops = LayerOps(
                head_dim=self.head_size,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                block_size=kv_cache.shape[2],
                high_bits=context.compression.high_bits,
                scale=self.scale,
                softcap=self.logits_soft_cap,
                sinks=self.sinks,
                decay=context.compression.decay,
                recent=context.compression.recent,
                scratch=scratch(kv_cache.device),
            )
        return self._layer_ops


@cache
def scratch(device: torch.device) -> Scratch:
    """Memory that all layers on a device share."""
    return Scratch(device)


class TieredFlashAttentionMetadataBuilder(TieredMetadataBuilder, FlashAttentionMetadataBuilder):
    pass


class TieredFlashAttentionImpl(TieredImpl, FlashAttentionImpl):
    pass


class TieredFlashAttentionBackend(TieredBackend, FlashAttentionBackend):
    """vLLM's FlashAttention backend with a second kind of page."""

    @staticmethod
    def get_impl_cls() -> type[TieredFlashAttentionImpl]:
        return TieredFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TieredFlashAttentionMetadataBuilder]:
        return TieredFlashAttentionMetadataBuilder


class TieredTritonAttentionMetadataBuilder(TieredMetadataBuilder, TritonAttentionMetadataBuilder):
    pass


class TieredTritonAttentionImpl(TieredImpl, TritonAttentionImpl):
    pass


class TieredTritonAttentionBackend(TieredBackend, TritonAttentionBackend):
    """vLLM's Triton backend with a second kind of page."""

    @staticmethod
    def get_impl_cls() -> type[TieredTritonAttentionImpl]:
        return TieredTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TieredTritonAttentionMetadataBuilder]:
        return TieredTritonAttentionMetadataBuilder
