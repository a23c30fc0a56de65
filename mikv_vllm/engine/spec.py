"""The KV cache spec of a layer whose requests can be compressed."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    replace_as,
)
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.block_manager import TieredBlockManager
from mikv_vllm.tiers.blocks import pages_needed
from mikv_vllm.tiers.formats import NATIVE_BYTES, TierGeometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LEAST_HEAD_DIM, LARGEST_HEAD_DIM = 64, 256


@register_kv_cache_spec(manager_class=TieredBlockManager, uniform_type_base_spec=FullAttentionSpec)
@dataclass(frozen=True, kw_only=True)
class TieredAttentionSpec(FullAttentionSpec):
    """vLLM's spec of full attention, with :class:`TieredBlockManager` as manager."""

    compression: CompressionConfig
    num_layers: int = 1
    """Layers of all pipeline stages that share this spec."""

    @property
    def geometry(self) -> TierGeometry:
        """Sizes of records and pages."""
        return TierGeometry(self.head_size, self.block_size, self.compression.high_bits)

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Return the bytes of the longest request at the server's default ratio.

        vLLM requires that they fit, and logs how many such requests fit. If other layers attend to
        a part of the context, they use pages of the same pool, and a request counts as native.
        """
        model = vllm_config.model_config
        layer_types = getattr(model.hf_text_config, "layer_types", None) or ()
        if model.get_sliding_window() or set(layer_types) - {"full_attention"}:
            return super().max_memory_usage_bytes(vllm_config)
        settings = self.compression
        pages = pages_needed(
            self.geometry, settings.ratio, settings.recent, model.max_model_len, settings.ladder
        )
        return pages * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """Merge the specs of the layers of a group, which have to be equal."""
        if any(spec != specs[0] for spec in specs):
            # vLLM handles this error: it does not put these layers into one group.
            raise AssertionError("all layers of a tiered group need the same spec")
        return replace(specs[0], num_layers=sum(spec.num_layers for spec in specs))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Whether vLLM can put all these layers into one group without merging their specs.

        The specs have to be equal, because a group has one manager and one size for each request.
        """
        return all(spec == self for spec in kv_cache_specs.values())


def tiered_spec(spec: AttentionSpec, compression: CompressionConfig) -> AttentionSpec:
    """Return the tiered form of ``spec``, or ``spec`` if its layer has to stay native."""
    if (
        type(spec) is not FullAttentionSpec
        or spec.sliding_window is not None
        or spec.attention_chunk_size is not None
        or spec.head_size != spec.head_size_v
        or not LEAST_HEAD_DIM <= spec.head_size <= LARGEST_HEAD_DIM
        or spec.head_size % 16
        or spec.dtype.itemsize != NATIVE_BYTES
    ):
        return spec
    return replace_as(spec, TieredAttentionSpec, compression=compression)
