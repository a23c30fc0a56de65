"""The CPU attention backend: vLLM's kernel for native rows, ours for tiered rows.

The batch is split, and vLLM's kernel runs over the native rows only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
from mikv_vllm.engine.tiered_impl import TieredImpl
from mikv_vllm.engine.tiered_metadata import (
    BatchSplit,
    ExtendedRow,
    ScoredRow,
    SealedRow,
    native_part,
    native_selection,
    restored_part,
    split_batch,
    split_draft_pass,
    split_first_draft_pass,
)
from mikv_vllm.engine.worker_context import context
from mikv_vllm.kernels.cpu import DecodeBatch, LayerOps


class TieredCPUAttentionBackend(CPUAttentionBackend):
    """vLLM's CPU backend with tiered pages."""

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
    """Metadata of a step in which the plan changes or reads tiers.

    The inherited fields describe the native rows only.
    """

    native_tokens: slice | torch.Tensor | None = None
    """The tokens of native rows; None if there are none."""
    decode: list[DecodeBatch] = field(default_factory=list)
    """Blocks of the compressed rows that decode; in the first pass of a draft model, then those of
    the rows that one more token joins."""
    begun: tuple[list[int], list[int]] = ([], [])
    """See :class:`~mikv_vllm.engine.tiered_metadata.BatchSplit`."""
    sealed: Sequence[SealedRow] = ()
    """Tails that the step fills."""
    scored: Sequence[ScoredRow] = ()
    extended: list[tuple[ExtendedRow, CPUAttentionMetadata]] = field(default_factory=list)
    """Rows with a prompt chunk, and vLLM's metadata of each in the workspace."""
    skipped: torch.Tensor | None = None
    """Tokens whose output is 0, int64 ``[tokens]``; None if there are none."""


class TieredCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Splits the batch of a step by the plan. A step without tiers gets vLLM's own metadata."""

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
        split = split_batch(context, starts[:-1], starts[1:], batch.block_table_tensor)
        return self._build_split(batch, split)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> CPUAttentionMetadata:
        """Build the metadata of a pass of draft layers.

        The first pass computes the tokens of the step, and its plan changes the tiers of draft
        layers as it does those of the model. Each later pass computes one drafted token a request.
        """
        batch, spec = common_attn_metadata, self.kv_cache_spec
        if not isinstance(spec, TieredAttentionSpec):
            return super().build_for_drafting(batch, draft_index)
        if draft_index == 0:
            speculative = self.vllm_config.speculative_config
            assert speculative is not None
            if context.is_native or not speculative.uses_draft_model():
                return super().build_for_drafting(batch, draft_index)
            return self._build_split(batch, split_first_draft_pass(context, batch, spec.geometry))
        context.end_step()
        if not len(context.tiers):
            return super().build_for_drafting(batch, draft_index)
        return self._build_split(batch, split_draft_pass(context, batch, spec.geometry))

    def _build_split(
        self, batch: CommonAttentionMetadata, split: BatchSplit
    ) -> TieredCPUAttentionMetadata:
        """Build the metadata of a batch that is split."""
        slots = batch.slot_mapping[: int(batch.query_start_loc_cpu[-1])]
        native_tokens: slice | torch.Tensor | None = None
        if len(split.native_rows):
            native_tokens = native_selection(split)
            native_slots = slots[native_tokens].clone()
            is_whole = len(native_slots) == len(slots)
            metadata = super().build(0, batch if is_whole else native_part(batch, split))
            # vLLM's slots of the other tokens are in pages that the requests have released.
            slots[:] = -1
            slots[native_tokens] = native_slots
        else:
            slots[:] = -1
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
        extended = []
        for chunk in split.extended:
            part = restored_part(batch, chunk, self.block_size)
            extended.append((chunk, super().build(0, part)))
        decode = [split.decode, split.joined] if split.joined else [split.decode]
        skipped = split.skipped_tokens
        return TieredCPUAttentionMetadata(
            **vars(metadata),
            native_tokens=native_tokens,
            decode=[DecodeBatch.of(*part) for part in decode if len(part[0])],
            begun=split.begun,
            sealed=split.sealed,
            scored=split.scored,
            extended=extended,
            skipped=torch.from_numpy(skipped) if len(skipped) else None,
        )


class TieredCPUAttentionImpl(TieredImpl, CPUAttentionBackendImpl):
    """Computes native rows with vLLM's kernel and tiered rows with ours."""

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
            scales = (output_scale, output_block_scale)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        tokens = attn_metadata.native_tokens
        if tokens is not None:
            # Indexing with a slice returns a view of the output, with a tensor a copy.
            part = output[tokens]
            super().forward(
                layer, query[tokens], key[tokens], value[tokens], kv_cache, attn_metadata, part
            )
            if isinstance(tokens, torch.Tensor):
                output[tokens] = part
        m = attn_metadata
        if m.skipped is not None:
            output[m.skipped] = 0
        rows = (m.scored, m.begun, m.decode, m.sealed, m.extended)
        self.run_tiered_rows(layer, query, key, value, kv_cache, output, *rows)
        return output

    def _make_ops(self, layer: Any, kv_cache: torch.Tensor, **parameters: Any) -> LayerOps:
        layout = native_layout(layer.isa, kv_cache.shape[2], self.head_size, kv_cache.dtype)
        return LayerOps(
            **parameters,
            dtype=kv_cache.dtype,
            key_index=layout.key_index,
            value_index=layout.value_index,
        )
