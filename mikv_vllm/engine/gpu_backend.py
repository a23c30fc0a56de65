"""The GPU attention backends: vLLM's FlashAttention and Triton backends with tiered pages."""

from vllm.v1.attention.backend import AttentionBackend
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

from mikv_vllm.engine.gpu_impl import TieredGPUImpl
from mikv_vllm.engine.gpu_metadata import TieredMetadataBuilder
from mikv_vllm.engine.spec import tiered_spec
from mikv_vllm.engine.worker_context import context


class TieredBackend(AttentionBackend):
    """The overrides that both backends share."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        assert context.compression is not None
        return tiered_spec(spec, context.compression)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # In these layouts, the part of a page that belongs to a head is contiguous.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.BHLNC, KVCacheLayout.LHBNC)


class TieredFlashAttentionMetadataBuilder(TieredMetadataBuilder, FlashAttentionMetadataBuilder):
    pass


class TieredFlashAttentionImpl(TieredGPUImpl, FlashAttentionImpl):
    pass


class TieredFlashAttentionBackend(TieredBackend, FlashAttentionBackend):
    """vLLM's FlashAttention backend with tiered pages."""

    @staticmethod
    def get_impl_cls() -> type[TieredFlashAttentionImpl]:
        return TieredFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TieredFlashAttentionMetadataBuilder]:
        return TieredFlashAttentionMetadataBuilder


class TieredTritonAttentionMetadataBuilder(TieredMetadataBuilder, TritonAttentionMetadataBuilder):
    pass


class TieredTritonAttentionImpl(TieredGPUImpl, TritonAttentionImpl):
    pass


class TieredTritonAttentionBackend(TieredBackend, TritonAttentionBackend):
    """vLLM's Triton backend with tiered pages."""

    @staticmethod
    def get_impl_cls() -> type[TieredTritonAttentionImpl]:
        return TieredTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TieredTritonAttentionMetadataBuilder]:
        return TieredTritonAttentionMetadataBuilder
