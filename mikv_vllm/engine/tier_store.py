"""The tiers of all compressed requests: which pages they take, and what changes in a step."""

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.dirty_pages import DirtyPages
from mikv_vllm.engine.step_plan import CompressStep, DecodeStep
from mikv_vllm.engine.tiered_request import TieredRequest, TierTotals
from mikv_vllm.tiers.formats import TierGeometry
from mikv_vllm.tiers.plan import TierPlanner


class TierStore:
    """Allocates and counts the tiers of compressed requests in vLLM's pool.

    Calls come in pairs: :meth:`admit` and :meth:`forget`, :meth:`compress` and :meth:`release`. The
    store collects the changes of a step; the scheduler drains them into the plan.
    """

    def __init__(
        self, pool: BlockPool, geometry: TierGeometry, settings: CompressionConfig
    ) -> None:
        self.pool = pool
        self.geometry = geometry
        self.settings = settings
        self.ratios: dict[str, float] = {}
        """Requested ratio of each request that may be compressed."""
        self.requests: dict[str, TieredRequest] = {}
        """Compressed requests."""
        self.totals = TierTotals()
        self.operations = dict.fromkeys(("compress", "compress_in_place", "demote"), 0)
        """Counts since the start."""
        self.dirty = DirtyPages()
        self._steps: dict[str, DecodeStep] = {}
        self._released: list[KVCacheBlock] = []

    def admit(self, request_id: str, ratio: float) -> None:
        """Allow a request to be compressed."""
        self.ratios[request_id] = ratio

    def forget(self, request_id: str) -> None:
        """Undo :meth:`admit`."""
        assert request_id not in self.requests, "the tiers have to be released first"
        self.ratios.pop(request_id, None)

    def append_token(self, request_id: str, num_tokens: int) -> bool:
        """Fast path: append one token, the ``num_tokens``-th, to the last high record.

        Nothing else changes, and the plan omits the request.

        Returns:
            Whether the request is compressed and its last high record has a free slot.
        """
        tiered = self.requests.get(request_id)
        if tiered is None or not tiered.free_slots or num_tokens != tiered.num_tokens + 1:
            return False
        tiered.free_slots -= 1
        tiered.num_tokens = num_tokens
        self.totals.high_tokens += 1
        return True

    def grow(self, request_id: str, num_tokens: int) -> list[KVCacheBlock]:
        """Let a compressed request take tokens until it has ``num_tokens``.

        Returns:
            Its new pages.
        """
        tiered = self.requests[request_id]
        before = tiered.sizes
        append = tiered.grow(num_tokens)
        pages = self.pool.get_new_blocks(append.new_pages)
        self.dirty.add(pages)
        self.totals.count(tiered, -1)
        tiered.resize(append.after)
        self.totals.count(tiered)
        self.operations["demote"] += append.demoted_records
        page_ids = tuple(page.block_id for page in pages)
        self._steps[request_id] = DecodeStep(before, append, page_ids, tiered.planner.low_format)
        return pages

    def compress(
        self, request_id: str, num_tokens: int, most_tokens: int, native: list[KVCacheBlock]
    ) -> tuple[CompressStep, list[KVCacheBlock]] | None:
        """Move a native request into tiers.

        The native pages stay allocated until :meth:`release_pages`: other requests of the same step
        must not write to them before the workers have read them.

        Args:
            num_tokens: tokens of the request.
            most_tokens: tokens of its whole prompt.
            native: its pages.

        Returns:
            The step and the new pages of the request; None if compression saves no page or too few
            pages are available.
        """
        settings, ratio = self.settings, self.ratios[request_id]
        planner = TierPlanner.choose(
            self.geometry, ratio, settings.recent, most_tokens, settings.ladder
        )
        sizes = planner.compress(num_tokens)
        if sizes is None:
            return None
        targets = self._allocate_targets(native, sizes.pages)
        if targets is None:
            return None
        self.dirty.add(targets)
        kept = {page.block_id for page in targets}
        in_place = any(page.block_id in kept for page in native)
        step = CompressStep(
            tuple(page.block_id for page in native),
            tuple(page.block_id for page in targets),
            sizes,
            planner.low_format,
            in_place,
        )
        self._released += [page for page in reversed(native) if page.block_id not in kept]
        self.requests[request_id] = tiered = TieredRequest(planner, sizes)
        self.totals.count(tiered)
        self.operations["compress"] += 1
        self.operations["compress_in_place"] += in_place
        return step, targets

    def _allocate_targets(
        self, native: list[KVCacheBlock], num_pages: int
    ) -> list[KVCacheBlock] | None:
        """Pages to compress into: free pages, or pages of the request if too few are free."""
        num_free = self.pool.get_num_free_blocks()
        if num_pages <= num_free:
            return self.pool.get_new_blocks(num_pages)
        # A page that the workers write must have no other reader: neither a request that shares it
        # (ref_cnt) nor, later, one that finds it in the prefix cache (evict_blocks).
        own = [b for b in reversed(native) if b.ref_cnt == 1 and not b.is_null][:num_pages]
        if len(own) + num_free < num_pages:
            return None
        self.pool.evict_blocks({page.block_id for page in own})
        return own + self.pool.get_new_blocks(num_pages - len(own))

    def release(self, request_id: str) -> None:
        """Forget the tiers of a request. The caller returns their pages to the pool."""
        if tiered := self.requests.pop(request_id, None):
            self.totals.count(tiered, -1)
        self._steps.pop(request_id, None)

    def drain_steps(self) -> dict[str, DecodeStep]:
        """Return the changes since the last call, without those of :meth:`append_token`."""
        steps, self._steps = self._steps, {}
        return steps

    def release_pages(self) -> None:
        """Return the native pages of the requests that this step compresses to the pool."""
        self.pool.free_blocks(self._released)
        self._released = []
