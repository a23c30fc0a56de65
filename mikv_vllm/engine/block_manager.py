"""The block manager whose requests have native pages or tiers."""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.step_plan import CompressStep
from mikv_vllm.engine.tier_store import TierStore
from mikv_vllm.tiers.formats import TierGeometry
from mikv_vllm.tiers.plan import pages_needed


class TieredBlockManager(FullAttentionManager):
    """A ``FullAttentionManager`` that leaves compressed requests to a :class:`TierStore`.

    vLLM manages native requests as usual. A compressed request gets no new pages from vLLM, because
    the workers take them from the plan, and its pages never enter the prefix cache.

    Args:
        kv_cache_spec: a :class:`~mikv_vllm.engine.spec.TieredAttentionSpec`.
        kwargs: those of ``FullAttentionManager``.
    """

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        geometry: TierGeometry = kv_cache_spec.geometry
        settings: CompressionConfig = kv_cache_spec.compression
        self.store = TierStore(self.block_pool, geometry, settings)
        share = int(settings.native_share * (self.block_pool.num_gpu_blocks - 1))
        least = -(-(settings.min_tokens + settings.window) // self.block_size)
        self.native_limit = max(share, least) * self.block_size
        """Tokens beyond which a prompt is compressed while it is computed."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args,
        **kwargs,
    ) -> int:
        store = self.store
        if tiered := store.requests.get(request_id):
            return tiered.pages_to_grow(num_tokens)
        if kwargs.get("apply_admission_cap") and request_id in store.ratios:
            # The whole prompt has to fit, but at most this much of it at once.
            settings, ratio = store.settings, store.ratios[request_id]
            pages = pages_needed(
                store.geometry, ratio, settings.recent, num_tokens, settings.ladder
            )
            num_tokens = min(num_tokens, max(self.native_limit, pages * self.block_size))
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if request_id not in self.store.requests:
            blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            self.store.dirty.clean(blocks)
            return blocks
        if not self.store.append_token(request_id, num_tokens):
            self.req_to_blocks[request_id] += self.store.grow(request_id, num_tokens)
        return []

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        if request.request_id not in self.store.requests:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.store.release(request_id)
        return super().pop_blocks_for_free(request_id)

    def compress(self, request: Request, num_tokens: int) -> CompressStep | None:
        """Move a native request with ``num_tokens`` tokens into tiers.

        Returns:
            The step; None if compression saves no page or too few pages are available.
        """
        request_id = request.request_id
        most_tokens = max(num_tokens, request.num_tokens)
        native = self.req_to_blocks[request_id]
        compressed = self.store.compress(request_id, num_tokens, most_tokens, native)
        if compressed is None:
            return None
        step, self.req_to_blocks[request_id] = compressed
        return step
