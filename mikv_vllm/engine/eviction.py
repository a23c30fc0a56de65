"""Order in which the pages of the prefix cache are evicted."""

from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock


class SpentPages:
    """Free pages whose tokens are also in other pages; they are evicted before all others.

    These are native pages of requests that were compressed, and pages of tails that another tail
    continues. vLLM's pool evicts in LRU order only. A spent page stays in the prefix cache until
    pages without a hash are used up.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._pages: dict[int, tuple[KVCacheBlock, object]] = {}

    def add(self, pages: Iterable[KVCacheBlock]) -> None:
        """Pages that are spent once no request holds them."""
        for page in pages:
            if page.block_hash is not None:
                self._pages[page.block_id] = page, page.block_hash

    def evict_first(self, count: int) -> None:
        """Let the next ``count`` pages that the pool allocates be spent ones, as far as needed."""
        if not self._pages or not self._has_hashed(count):
            return
        chosen: list[KVCacheBlock] = []
        for page_id in [*self._pages]:
            if len(chosen) == count:
                break
            page, its_hash = self._pages.pop(page_id)
            # Another request may hold it, or may have overwritten it.
            if page.ref_cnt == 0 and page.block_hash == its_hash:
                self._pool.free_block_queue.remove(page)
                chosen.append(page)
        self._pool.free_block_queue.prepend_n(chosen)

    def _has_hashed(self, count: int) -> bool:
        """Whether one of the next ``count`` pages is in the prefix cache."""
        page = self._pool.free_block_queue.fake_free_list_head.next_free_block
        for _ in range(min(count, self._pool.get_num_free_blocks())):
            assert page is not None
            if page.block_hash is not None:
                return True
            page = page.next_free_block
        return False
