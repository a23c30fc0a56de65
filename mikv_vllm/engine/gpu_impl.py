"""Attention on a GPU: vLLM's kernel for native rows, ours for tiered rows."""

from functools import cache
from typing import Any

import torch

from mikv_vllm.engine.gpu_metadata import TieredMetadata
from mikv_vllm.engine.tiered_impl import TieredImpl
from mikv_vllm.engine.tiered_metadata import ScoredRow
from mikv_vllm.engine.worker_context import context
from mikv_vllm.kernels.triton import LayerOps, Scratch
from mikv_vllm.kernels.triton.warm_up import warm_up
from mikv_vllm.tiers.formats import TierGeometry


class TieredGPUImpl(TieredImpl):
    """Base class for use with any of vLLM's GPU implementations."""

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False  # the tier kernels do not quantize the output

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
        tiered = attn_metadata if isinstance(attn_metadata, TieredMetadata) else None
        super().forward(
            layer,
            query,
            key,
            value,
            kv_cache,
            attn_metadata if tiered is None else tiered.native,
            output,
            output_scale,
            output_block_scale,
        )
        if tiered is not None:
            decode = [] if tiered.decode is None else [tiered.decode]
            rows = (tiered.scored, tiered.begun, decode, tiered.sealed, tiered.extended)
            self.run_tiered_rows(layer, query, key, value, kv_cache, output, *rows)
        return output

    @property
    def shape(self) -> tuple[Any, ...]:
        """Everything of the layer that the kernels are compiled for."""
        heads = (self.head_size, self.num_heads, self.num_kv_heads)
        return (*heads, self.logits_soft_cap, self.sinks is not None)

    @torch.inference_mode()
    def warm_up(self, kv_cache: torch.Tensor) -> None:
        """Compile the tier kernels for every low format that a request can get."""
        assert context.compression is not None
        settings = context.compression
        geometry = TierGeometry(self.head_size, kv_cache.shape[2], settings.high_bits)
        ops = self._ops(None, kv_cache)
        assert isinstance(ops, LayerOps), ops
        warm_up(ops, geometry, self.num_heads, kv_cache, settings.ladder)

    def _compress(
        self,
        ops: LayerOps,
        kv_cache: torch.Tensor,
        row: ScoredRow,
        native_pages: torch.Tensor,
        scores: torch.Tensor,
        window: torch.Tensor,
        **source: torch.Tensor,
    ) -> None:
        assert row.compress is not None
        if row.compress.in_place:
            # Some programs of the kernels write while others still read, so they read a copy.
            used = native_pages[: len(row.compress.native_pages)]
            source["native"] = context.workspace(kv_cache, len(used))
            torch.index_select(kv_cache, 0, used, out=source["native"])
            native_pages = torch.arange(len(used), dtype=torch.int32, device=kv_cache.device)
        super()._compress(ops, kv_cache, row, native_pages, scores, window, **source)

    def _make_ops(self, layer: Any, kv_cache: torch.Tensor, **parameters: Any) -> LayerOps:
        return LayerOps(**parameters, scratch=scratch(kv_cache.device))


@cache
def scratch(device: torch.device) -> Scratch:
    """Temporary memory that all layers on a device share."""
    return Scratch(device)
