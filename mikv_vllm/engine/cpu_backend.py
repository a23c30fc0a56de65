"""The CPU attention backend: vLLM's kernel for native rows, ours for tiered rows."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from mikv_vllm.engine.native_layout import native_layout
from mikv_vllm.engine.spec import TieredAttentionSpec, tiered_spec
from mikv_vllm.engine.tiered_metadata import (
    ExtendedRow,
    ScoredRow,
    native_part,
    restored_part,
    split_batch,
    token_selection,
)
from mikv_vllm.engine.worker_context import context
from mikv_vllm.kernels.batch import TOKEN
from mikv_vllm.kernels.cpu import DecodeBatch, LayerOps
from mikv_vllm.tiers.blocks import block_tokens


class TieredCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with a second kind of page."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        assert context.compression is not None
        return tiered_spec(spec, context.compression)

    @staticmethod
    def get_impl_cls() -> type["TieredCPUAttentionImpl"]:
        return TieredCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["TieredCPUAttentionMetadataBuilder"]:
        return TieredCPUAttentionMetadataBuilder


@dataclass
class TieredCPUAttentionMetadata(CPUAttentionMetadata):
    """Metadata of a step in which the plan touches a tier.

    The inherited fields describe the native rows alone.
    """

    native_tokens: slice | torch.Tensor | None = None
    """Which tokens of the batch are native; None if none is."""
    decode: DecodeBatch | None = None
    """Blocks of the compressed rows; None if there are none."""
    begun: tuple[list[int], list[int]] = ([], [])
    """First pages of the blocks before new tails, and of the new tails."""
    scored: list[ScoredRow] = field(default_factory=list)
    extended: list[tuple[ExtendedRow, CPUAttentionMetadata]] = field(default_factory=list)
    """Rows with a chunk of a prompt, and vLLM's metadata of each in a workspace."""


class TieredCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits a step's batch by the plan; a step without tiers gets vLLM's own metadata."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        if context.is_native or not isinstance(self.kv_cache_spec, TieredAttentionSpec):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        batch = common_attn_metadata
        starts = batch.query_start_loc_cpu.numpy()
        split = split_batch(context, starts, batch.block_table_tensor)
        native_tokens: slice | torch.Tensor | None = None
        native = batch
        if len(split.native_rows):
            native_tokens = token_selection(split.native_rows, starts)
            if len(split.native_rows) < len(starts) - 1:
                native = native_part(batch, split.native_rows, starts)
            metadata = super().build(common_prefix_len, native, fast_build)
        else:
            metadata = CPUAttentionMetadata(
                num_actual_tokens=0,
                max_query_len=0,
                query_start_loc=batch.query_start_loc,
                max_seq_len=0,
                seq_lens=batch.seq_lens,
                block_table=batch.block_table_tensor,
                slot_mapping=batch.slot_mapping,
                scheduler_metadata=None,
            )
        decode = None
        if len(split.rows):
            decode = DecodeBatch.of(*split.decode)
            # vLLM's slots of these tokens lie in pages that the request gave back.
            batch.slot_mapping[torch.from_numpy(decode.rows[:, TOKEN])] = -1
        extended = []
        for chunk in split.extended:
            batch.slot_mapping[chunk.tokens] = -1
            part = restored_part(batch, chunk, self.block_size)
            extended.append((chunk, super().build(common_prefix_len, part, fast_build)))
        return TieredCPUAttentionMetadata(
            **vars(metadata),
            native_tokens=native_tokens,
            decode=decode,
            begun=split.begun,
            scored=split.scored,
            extended=extended,
        )


class TieredCPUAttentionImpl(CPUAttentionBackendImpl):
    """Runs native rows on vLLM's kernel; scores, compresses and decodes tiered rows on ours."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(attn_metadata, TieredCPUAttentionMetadata):
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        tokens = attn_metadata.native_tokens
        if tokens is not None:
            # A slice views the output, an index copies it.
            part = output[tokens]
            super().forward(
                layer, query[tokens], key[tokens], value[tokens], kv_cache, attn_metadata, part
            )
            if isinstance(tokens, torch.Tensor):
                output[tokens] = part
        for row in attn_metadata.scored:
            self._score(layer, query, kv_cache, row)
        if attn_metadata.decode is not None:
            ops = self._ops(layer, kv_cache)
            if attn_metadata.begun[0]:
                ops.begin(kv_cache, *attn_metadata.begun)
            ops.decode(kv_cache, attn_metadata.decode, query, key, value, output)
        for extended, metadata in attn_metadata.extended:
            t = extended.tokens
            self._extend(layer, query[t], key[t], value[t], kv_cache, extended, metadata, output[t])
        return output

    def _extend(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        row: ExtendedRow,
        metadata: CPUAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Attend to a compressed beginning and the chunk behind it, then take the chunk in.

        Args:
            query, key, value, output: of the row's tokens alone.
        """
        assert context.compression is not None
        ops, step = self._ops(layer, kv_cache), row.step
        pages = metadata.block_table[0]
        native = context.workspace(kv_cache, len(pages))
        first, block_pages = 0, 0
        for block in row.blocks:
            ops.restore(kv_cache, block.table, block.sizes, block.low_format, native[block_pages:])
            first = block_pages * native.shape[2]
            block_pages += block_tokens(native.shape[2]) // native.shape[2]
        self.do_kv_cache_update(layer, key, value, native, metadata.slot_mapping)
        super().forward(layer, query, key, value, native, metadata, output)
        num_tokens = step.first_token + step.num_tokens
        scores = torch.zeros(self.num_kv_heads, num_tokens)
        ops.score(native, pages, num_tokens, query[-step.num_queries :], scores)
        keep = float(context.compression.importance == "h2o")
        joined = 0
        for change in row.changes:
            if change.source is not None:
                ops.begin(kv_cache, [change.source], [change.target])
                first = step.first_token + joined
            append, count = change.step.append, change.step.append.new_tokens
            ops.extend(
                kv_cache,
                change.table,
                change.step.before,
                append,
                change.step.low_format,
                key[joined : joined + count],
                value[joined : joined + count],
                scores[:, first:],
                context.compression.recent if change is row.changes[-1] else 0,
                keep,
            )
            joined += count

    def _score(
        self, layer: AttentionLayer, query: torch.Tensor, kv_cache: torch.Tensor, row: ScoredRow
    ) -> None:
        """Score a native row from its last queries, and compress it if the plan says so."""
        ops, step = self._ops(layer, kv_cache), row.score
        by_layer = context.scores[row.request_id]
        scores = by_layer.get(layer.layer_name)
        if scores is None:
            scores = torch.zeros(self.num_kv_heads, step.capacity)
            by_layer[layer.layer_name] = scores
        queries = query[row.queries]
        ops.score(kv_cache, row.native_pages, step.num_tokens, queries, scores)
        if row.compress is not None:
            self._compress(ops, kv_cache, row, scores, queries)

    @staticmethod
    def _compress(
        ops: LayerOps,
        kv_cache: torch.Tensor,
        row: ScoredRow,
        scores: torch.Tensor,
        queries: torch.Tensor,
    ) -> None:
        """Compress a native row into its blocks."""
        assert context.compression is not None
        first = 0
        for block in row.blocks:
            is_tail = block is row.blocks[-1]
            ops.compress(
                kv_cache,
                row.native_pages[first // kv_cache.shape[2] :],
                block.table,
                block.sizes,
                block.low_format,
                scores[:, first:],
                queries[-context.compression.window :],
                min(context.compression.recent, block.sizes.high_tokens) if is_tail else 0,
            )
            first += block.sizes.num_tokens

    @cached_property
    def _layer_ops(self) -> dict[str, LayerOps]:
        return {}

    def _ops(self, layer: AttentionLayer, kv_cache: torch.Tensor) -> LayerOps:
        """The tier kernels, set up for this layer at its first use."""
        ops = self._layer_ops.get(layer.layer_name)
        if ops is None:
            assert context.compression is not None
            block_size = kv_cache.shape[2]
            layout = native_layout(layer.isa, block_size, self.head_size, kv_cache.dtype)
            ops = self._layer_ops[layer.layer_name] = LayerOps(
                head_dim=self.head_size,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                block_size=block_size,
                high_bits=context.compression.high_bits,
                dtype=kv_cache.dtype,
                scale=self.scale,
                softcap=self.logits_soft_cap,
                sinks=None if self.sinks is None else self.sinks.float(),
                decay=context.compression.decay,
                recent=context.compression.recent,
                key_index=layout.key_index,
                value_index=layout.value_index,
            )
        return ops
