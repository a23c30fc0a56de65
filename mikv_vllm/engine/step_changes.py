"""What has changed in the blocks of requests since the last plan."""

from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from mikv_vllm.engine.step_plan import BlockTable, DecodeStep


class StepChanges:
    """Collects the changes of a step, until its plan drains them.

    Args:
        pool: gets the pages that are released.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.steps: dict[str, list[DecodeStep]] = {}
        """Changes of the last blocks of requests."""
        self.adopted: dict[str, tuple[BlockTable, ...]] = {}
        """Requests that begin with blocks of the prefix cache."""
        self._copies: dict[int, int] = {}
        """Pages that begin the step as copies: the page that each one is a copy of."""
        self._released: list[KVCacheBlock] = []

    def copy(self, source: KVCacheBlock, target: KVCacheBlock) -> None:
        """Let workers copy a page before the step. They read all sources before they write."""
        self._copies[target.block_id] = self._copies.get(source.block_id, source.block_id)

    def begin_pages(self, pages: Iterable[KVCacheBlock]) -> None:
        """Pages were allocated. A copy to one that was freed again in this step is not made."""
        for page in pages:
            self._copies.pop(page.block_id, None)

    def release(self, pages: Iterable[KVCacheBlock]) -> None:
        """Return pages to the pool when the step is planned, because it reads them."""
        self._released += pages

    def forget(self, request_id: str) -> None:
        """Forget the changes of a request that ends."""
        self.steps.pop(request_id, None)
        self.adopted.pop(request_id, None)

    def drain_steps(self) -> dict[str, list[DecodeStep]]:
        """Drain the changes of last blocks that are more than one token in the high tier."""
        steps, self.steps = self.steps, {}
        return steps

    def drain_adopted(self) -> dict[str, tuple[BlockTable, ...]]:
        """Drain the requests that begin with blocks of the prefix cache."""
        adopted, self.adopted = self.adopted, {}
        return adopted

    def drain_copies(self) -> tuple[tuple[int, int], ...]:
        """Drain the pages to copy, from and to."""
        copies, self._copies = self._copies, {}
        return tuple((source, target) for target, source in copies.items())

    def release_pages(self) -> None:
        """Return the pages that are not needed after this step to the pool."""
        self._pool.free_blocks(self._released)
        self._released = []
