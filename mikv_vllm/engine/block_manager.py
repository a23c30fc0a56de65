"""The block manager whose requests have native pages or tiered blocks."""

from collections.abc import Sequence

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.request import Request

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.block_cache import Hit
from mikv_vllm.engine.step_plan import CompressStep
from mikv_vllm.engine.tier_store import TierStore
from mikv_vllm.tiers.formats import TierGeometry


class TieredBlockManager(FullAttentionManager):
    """A ``FullAttentionManager`` that leaves compressed requests to a :class:`TierStore`.

    vLLM manages native requests as usual. A compressed request gets no new pages from vLLM, because
    the workers take them from the plan.

    Args:
        kv_cache_spec: a :class:`~mikv_vllm.engine.spec.TieredAttentionSpec`.
        kwargs: those of ``FullAttentionManager``.
    """

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        geometry: TierGeometry = kv_cache_spec.geometry
        settings: CompressionConfig = kv_cache_spec.compression
        self.store = TierStore(self.block_pool, geometry, settings, self.enable_caching)
        self.hits: dict[str, Hit] = {}
        """Blocks that waiting requests will begin with."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        *args,
        **kwargs,
    ) -> int:
        store = self.store
        if tiered := store.requests.get(request_id):
            return tiered.pages_to_grow(num_tokens_main_model)
        # A request that is admitted leaves the running ones their next pages.
        is_admission = kwargs.get("apply_admission_cap", False)
        reserved = store.next_pages() if is_admission else 0
        if hit := self.hits.get(request_id):
            return reserved + store.pages_to_adopt(request_id, hit, num_tokens_main_model)
        if is_admission and request_id in store.ratios:
            # The whole prompt has to fit, but at most this much of it at once.
            pages = store.pages_needed(request_id, num_tokens)
            most = max(self.native_limit(request_id), pages * self.block_size)
            num_tokens = min(num_tokens, most)
        return reserved + super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            *args,
            **kwargs,
        )

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args, **kwargs
    ) -> None:
        hit = self.hits.pop(request_id, None)
        if hit is None:
            super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
            return
        self.store.adopt(request_id, hit)
        self.num_cached_block[request_id] = 0  # marks the request as known
        self._take_over(request_id)

    def native_limit(self, request_id: str) -> int:
        """Tokens beyond which a prompt is compressed while it is computed.

        Native pages take a share of the pool at most, and no pages of kept blocks.
        """
        store, settings, pool = self.store, self.store.settings, self.block_pool
        total = pool.num_gpu_blocks - 1
        # Pages that several requests share cannot take their blocks: these need others.
        most = total / (1 + 1 / store.ratios[request_id])
        share = int(min(settings.native_share * total, most))
        unused = pool.get_num_free_blocks() - store.cache.num_kept_pages
        unused += len(self.req_to_blocks.get(request_id, ()))
        least = -(-(settings.min_tokens + settings.window) // self.block_size)
        return max(least, min(share, unused)) * self.block_size

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        if request_id not in self.store.requests:
            held = len(self.req_to_blocks.get(request_id, ()))
            self.store.spent.evict_first(-(-num_tokens // self.block_size) - held)
            blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            self.store.dirty.clean(blocks)
            return blocks
        # num_tokens includes slots for draft layers, which use only pages that the tail has.
        if not self.store.append_token(request_id, num_tokens_main_model):
            self.store.grow(request_id, num_tokens_main_model)
            self._take_over(request_id)
        return []

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        if request.request_id not in self.store.requests:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.store.release(request_id)
        return super().pop_blocks_for_free(request_id)

    def compress(self, request: Request, num_tokens: int) -> CompressStep | None:
        """Move a native request into blocks; see :meth:`TierStore.compress`."""
        native = self.req_to_blocks[request.request_id]
        step = self.store.compress(request, num_tokens, native)
        if step:
            self._take_over(request.request_id)
        return step

    def _take_over(self, request_id: str) -> None:
        """Let vLLM see the pages of a compressed request."""
        blocks = self.store.requests[request_id].all_blocks()
        self.req_to_blocks[request_id] = [page for block in blocks for page in block.pages]


def tiered_manager(
    managers: Sequence[SingleTypeKVCacheManager], block_size: int
) -> TieredBlockManager:
    """Return the manager of the one cache group that has tiers.

    Args:
        block_size: tokens of a native page, as the user set them.

    Raises:
        ValueError: there is none, there are several, or its pages are too large; the message is
            the reason.
    """
    tiered = [manager for manager in managers if isinstance(manager, TieredBlockManager)]
    if not tiered:
        raise ValueError("it has no 16-bit full-attention layer of a head size that MiKV supports")
    if len(tiered) > 1:
        raise ValueError(f"vLLM puts its full-attention layers into {len(tiered)} cache groups")
    is_padded = tiered[0].kv_cache_spec.page_size_padded is not None
    if tiered[0].block_size != block_size or is_padded:
        raise ValueError("its other layers have larger pages than its full-attention layers")
    return tiered[0]
