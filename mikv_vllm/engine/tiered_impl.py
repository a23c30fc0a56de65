"""What the attention implementations of all devices share: the operations on tiered rows."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionImpl

from mikv_vllm.engine.tiered_metadata import ExtendedRow, ScoredRow, SealedRow
from mikv_vllm.engine.worker_context import context
from mikv_vllm.kernels.layer_ops import LayerOps


class TieredImpl(AttentionImpl[Any]):
    """Base class of an implementation that scores, compresses, decodes and extends tiered rows.

    A subclass also inherits vLLM's implementation, which computes native rows. Its ``forward``
    calls :meth:`run_tiered_rows` after it.
    """

    num_kv_heads: int
    logits_soft_cap: float
    sinks: torch.Tensor | None
    _layer_ops: LayerOps[Any] | None = None

    @abstractmethod
    def _make_ops(self, layer: Any, kv_cache: torch.Tensor, **parameters: Any) -> LayerOps[Any]:
        """Set up the kernels of the device.

        Args:
            parameters: those that all devices share, by their names in
                :class:`~mikv_vllm.kernels.layer_ops.LayerOps`.
        """

    def _ops(self, layer: Any, kv_cache: torch.Tensor) -> LayerOps[Any]:
        """Return the kernels of this layer. They are set up at the first call."""
        if self._layer_ops is None:
            assert context.compression is not None
            self._layer_ops = self._make_ops(
                layer,
                kv_cache,
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
            )
        return self._layer_ops

    def run_tiered_rows(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        scored: Iterable[ScoredRow],
        begun: tuple[list[int], list[int]],
        decode: Iterable[Any],
        sealed: Iterable[SealedRow],
        extended: Iterable[tuple[ExtendedRow, Any]],
    ) -> None:
        """Run the operations of a step on one layer.

        Args:
            query, key, value, output: of the whole batch. Only tiered rows of ``output`` are
                written.
            begun: pages of new tails, see
                :class:`~mikv_vllm.engine.tiered_metadata.BatchSplit`.
            decode: batches of compressed rows that decode, one after the other.
            sealed: tails that it fills.
            extended: rows with a prompt chunk, and vLLM's metadata of each in the workspace.
        """
        for row in scored:
            self._score(layer, query, kv_cache, row)
        if begun[0]:
            self._ops(layer, kv_cache).begin(kv_cache, *begun)
        for rows in decode:
            self._ops(layer, kv_cache).decode(kv_cache, rows, query, key, value, output)
        for full in sealed:
            self._seal(self._ops(layer, kv_cache), kv_cache, full)
        for extend, metadata in extended:
            t = extend.tokens
            self._extend(layer, query[t], key[t], value[t], kv_cache, extend, metadata, output[t])

    def _score(
        self, layer: Any, query: torch.Tensor, kv_cache: torch.Tensor, row: ScoredRow
    ) -> None:
        """Score a native row from its last queries, and compress it if the plan says so."""
        ops, step = self._ops(layer, kv_cache), row.score
        scores = row.scores.get(layer.layer_name)
        if scores is None:
            scores = torch.zeros(self.num_kv_heads, step.capacity, device=kv_cache.device)
            row.scores[layer.layer_name] = scores
        queries = query[row.queries]
        ops.score(kv_cache, row.native_pages, step.num_tokens, queries, scores)
        if row.compress is not None:
            assert context.compression is not None
            window = queries[-context.compression.window :]
            self._compress(ops, kv_cache, row, row.native_pages, scores, window)

    def _compress(
        self,
        ops: Any,
        kv_cache: torch.Tensor,
        row: ScoredRow,
        native_pages: torch.Tensor,
        scores: torch.Tensor,
        window: torch.Tensor,
        **source: torch.Tensor,
    ) -> None:
        """Compress a native row into the blocks of its plan.

        Args:
            native_pages: page ids, int32 ``[pages]``.
            window: its last queries.
            source: further arguments of ``compress``, for subclasses.
        """
        assert row.compress is not None
        assert context.compression is not None
        block_size, recent = kv_cache.shape[2], context.compression.recent
        for index, block in enumerate(row.blocks):
            if index in row.compress.shared:
                continue
            ops.compress(
                kv_cache,
                native_pages[block.first_token // block_size :],
                block.table,
                block.sizes,
                block.low_format,
                scores[:, block.first_token :],
                window,
                min(recent, block.sizes.high_tokens) if block is row.blocks[-1] else 0,
                **source,
            )

    def _seal(self, ops: LayerOps[Any], kv_cache: torch.Tensor, row: SealedRow) -> None:
        """Write a full tail anew as a sealed block."""
        assert context.compression is not None
        tail, block = row.tail, row.block
        ops.seal_tail(
            kv_cache,
            (tail.table, tail.sizes, tail.low_format),
            (block.table, block.sizes, block.low_format),
            context.workspace(kv_cache, -(-tail.sizes.num_tokens // kv_cache.shape[2])),
            context.compression.recent,
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
        """Compute attention of a prompt chunk after a compressed beginning, then add the chunk.

        Args:
            query, key, value, output: of the tokens of the row only.
            metadata: vLLM's, of the row in the workspace.
        """
        assert context.compression is not None
        ops, step = self._ops(layer, kv_cache), row.step
        pages = metadata.block_table[0]
        native = context.workspace(kv_cache, len(pages))
        block_size = native.shape[2]
        for block in row.blocks:
            target = native[block.first_token // block_size :]
            ops.restore(kv_cache, block.table, block.sizes, block.low_format, target)
        self.do_kv_cache_update(layer, key, value, native, metadata.slot_mapping)
        super().forward(layer, query, key, value, native, metadata, output)
        num_tokens = step.first_token + step.num_tokens
        scores = torch.zeros(self.num_kv_heads, num_tokens, device=kv_cache.device)
        ops.score(native, pages, num_tokens, query[-step.num_queries :], scores)
        keep = float(context.compression.importance == "h2o")
        recent, joined = context.compression.recent, 0
        for change in row.changes:
            if change.source is not None:
                ops.begin(kv_cache, [change.source], [change.target])
            count = change.step.append.new_tokens
            newest = recent if change is row.changes[-1] else 0
            added = scores[:, change.first_token :]
            if sealed := change.step.sealed:
                if keep and not change.step.begins:
                    tail = row.blocks[-1]
                    stored = ops.high_scores(kv_cache, tail.table, tail.sizes)
                    added[:, : tail.sizes.high_tokens] += keep * stored
                source = native[change.first_token // block_size :]
                form = sealed.sizes, sealed.low_format
                ops.seal(kv_cache, change.table, *form, source, added, newest)
            else:
                ops.extend(
                    kv_cache,
                    change.table,
                    change.step.before,
                    change.step.append,
                    change.step.low_format,
                    key[joined : joined + count],
                    value[joined : joined + count],
                    added,
                    newest,
                    keep,
                )
            joined += count
