"""Attention metadata of the GPU backends.

vLLM's kernel runs over the whole batch, so that no rows are gathered or scattered. There, a tiered
row is as short as its queries, and its output is overwritten by our kernels.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from mikv_vllm.engine.spec import TieredAttentionSpec
from mikv_vllm.engine.tiered_metadata import (
    ExtendedRow,
    ScoredRow,
    SealedRow,
    restored_part,
    split_batch,
)
from mikv_vllm.engine.worker_context import context
from mikv_vllm.kernels.batch import TOKEN
from mikv_vllm.kernels.triton import DecodeBatch
from mikv_vllm.kernels.triton.batch import high_starts


@dataclass(frozen=True)
class TieredMetadata:
    """Metadata of a step in which the plan changes or reads tiers."""

    native: Any
    """vLLM's metadata of the whole batch."""
    decode: DecodeBatch | None
    """Blocks of the compressed rows with one token; None if there are none."""
    begun: tuple[list[int], list[int]]
    """See :class:`~mikv_vllm.engine.tiered_metadata.BatchSplit`."""
    sealed: Sequence[SealedRow]
    """Tails that the step fills."""
    scored: Sequence[ScoredRow]
    extended: list[tuple[ExtendedRow, Any]]
    """Rows with a prompt chunk, and vLLM's metadata of each in the workspace."""


class TieredMetadataBuilder(AttentionMetadataBuilder[Any]):
    """Splits the batch of a step by the plan. A step without tiers gets vLLM's own metadata."""

    # The worker runs steps with tiers outside of full graphs, because their kernels differ.
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
        split = split_batch(context, starts[:-1], starts[1:], batch.block_table_tensor)
        native = copy(batch)
        native.seq_lens = batch.seq_lens.clone()
        decode = None
        if len(split.rows):
            decode, rows = self._upload(*split.decode, split.rows)
            native.seq_lens.index_fill_(0, rows, 1)
            # vLLM's slots of these tokens are in pages that the request has released.
            batch.slot_mapping.index_fill_(0, decode.rows[:, TOKEN].long(), -1)
        extended = []
        for chunk in split.extended:
            native.seq_lens[chunk.row] = chunk.tokens.stop - chunk.tokens.start
            batch.slot_mapping[chunk.tokens] = -1
            part = restored_part(batch, chunk, self.kv_cache_spec.block_size)
            built = super().build(0, part, fast_build)
            # It is in a buffer of the builder, which the next build overwrites.
            built.scheduler_metadata = None
            extended.append((chunk, built))
        metadata = super().build(common_prefix_len, native, fast_build)
        begun, sealed, scored = split.begun, split.sealed, split.scored
        return TieredMetadata(metadata, decode, begun, sealed, scored, extended)

    def _upload(
        self, rows: np.ndarray, tables: np.ndarray, batch_rows: np.ndarray
    ) -> tuple[DecodeBatch, torch.Tensor]:
        """Copy the compressed rows to the device, in one transfer.

        Args:
            rows, tables: a row and a table for each block.
            batch_rows: indices of the compressed rows in the batch.

        Returns:
            The blocks, and ``batch_rows`` on the device, int64.
        """
        assert context.compression is not None
        # The tables come first, because their size keeps the rows aligned.
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
