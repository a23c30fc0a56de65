"""The block manager that gives a request's pages two precision tiers."""

from collections.abc import Sequence
from functools import wraps
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.request import Request

from mikv_vllm.engine.block_cache import BlockCache, Hit
from mikv_vllm.engine.step_plan import BlockTable, CompressStep, DecodeStep
from mikv_vllm.engine.tiered_request import Block, Growth, TieredRequest, TierTotals
from mikv_vllm.tiers.blocks import BlockPlanner, block_tokens, pages_needed, planner

if TYPE_CHECKING:
    from mikv_vllm.engine.spec import TieredAttentionSpec


class TieredBlockManager(FullAttentionManager):
    """A ``FullAttentionManager`` whose requests are native or tiered.

    vLLM manages a native request as usual. A tiered request consists of blocks; their pages follow
    from :class:`~mikv_vllm.tiers.blocks.BlockPlanner`. vLLM gets no new pages for it, since the
    workers take them from the plan.
    """

    kv_cache_spec: "TieredAttentionSpec"

    def __init__(self, kv_cache_spec: "TieredAttentionSpec", **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.geometry = kv_cache_spec.geometry
        self.ratios: dict[str, float] = {}
        """Requested ratio of each request that may be compressed; our scheduler's."""
        self.native_limit = 0
        """Tokens of a prompt beyond which it is compressed while it is computed."""
        self.tiered: dict[str, TieredRequest] = {}
        self.totals = TierTotals()
        self.num_compressed = 0
        self.num_compressed_in_place = 0
        self.num_demoted = 0
        self.cache = BlockCache(self.block_pool, block_tokens(self.block_size))
        self.hits: dict[str, Hit] = {}
        """Blocks that waiting requests will begin with."""
        self._unsealed: dict[str, int] = {}
        """Requests with full blocks that are not in the prefix cache, and the first such block."""
        self._adopted: dict[str, tuple[BlockTable, ...]] = {}
        self._copies: list[tuple[int, int]] = []
        self._steps: dict[str, list[DecodeStep]] = {}
        self._released: list[KVCacheBlock] = []
        self._dirty_pages: set[int] = set()
        self._to_zero: list[int] = []

    # What vLLM calls.

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args,
        **kwargs,
    ) -> int:
        tiered = self.tiered.get(request_id)
        if tiered is not None:
            if num_tokens <= tiered.num_tokens:
                return 0
            return sum(len(growth.step.new_positions) for growth in tiered.grow(num_tokens))
        if hit := self.hits.get(request_id):
            needed = self._get_num_evictable_blocks(hit.pages)
            tiered = TieredRequest(self._planner(request_id), hit.blocks(), 0)
            needed += len(hit.tail.pages) if hit.tail else 0
            return needed + sum(len(one.step.new_positions) for one in tiered.grow(num_tokens))
        if kwargs.get("apply_admission_cap") and request_id in self.ratios:
            # The whole prompt has to fit, but at most this much of it at once.
            settings, ratio = self.kv_cache_spec.compression, self.ratios[request_id]
            pages = pages_needed(self.geometry, ratio, settings.recent, num_tokens, settings.ladder)
            num_tokens = min(num_tokens, max(self.native_limit, pages * self.block_size))
        return super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, *args, **kwargs
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        tiered = self.tiered.get(request_id)
        if tiered is None:
            blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            self._clean(blocks)
            return blocks
        if not self.append_token(request_id, num_tokens):
            growths = tiered.grow(num_tokens)
            self._steps[request_id] = [self._grow(request_id, tiered, one) for one in growths]
        return []

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args, **kwargs
    ) -> None:
        hit = self.hits.pop(request_id, None)
        if hit is None:
            super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
            return
        self.block_pool.touch(hit.pages)
        blocks = hit.blocks()
        if hit.tail:
            copies = self.block_pool.get_new_blocks(len(hit.tail.pages))
            self._dirty_pages.update(page.block_id for page in copies)
            blocks[-1].pages = dict(zip(sorted(hit.tail.pages), copies, strict=True))
            for source, copy in zip(hit.tail.page_list, copies, strict=True):
                self._copies.append((source.block_id, copy.block_id))
            self._released.extend(hit.tail.page_list)
        droppable = hit.droppable if hit.tail else None
        tiered = TieredRequest(self._planner(request_id), blocks, hit.num_tokens, droppable)
        self._hold(request_id, tiered)
        self._adopted[request_id] = tuple(block.table() for block in blocks)
        self.num_cached_block[request_id] = 0

    def _hold(self, request_id: str, tiered: TieredRequest) -> None:
        """Make a request tiered."""
        self.tiered[request_id] = tiered
        self.req_to_blocks[request_id] = [p for block in tiered.blocks for p in block.page_list]
        for block in tiered.blocks:
            block.users += 1
            if block.users == 1:
                self.totals.count(self.geometry, block)

    def _grow(self, request_id: str, tiered: TieredRequest, growth: Growth) -> DecodeStep:
        """Allocate the pages of a change of the last block, and change its sizes."""
        step = growth.step
        new = self.block_pool.get_new_blocks(len(step.new_positions))
        self._dirty_pages.update(page.block_id for page in new)
        held = self.req_to_blocks[request_id]
        held.extend(new)
        if growth.begins:
            tiered.begin_block(growth.before)
        else:
            self.totals.count(self.geometry, tiered.tail, -1)
        tail = tiered.tail
        tail.users = 1
        tail.pages.update(zip(step.new_positions, new, strict=True))
        tiered.resize(step.after)
        if step.demoted_records:
            tiered.mark_demotion()
        if step.freed_positions:
            freed = [tail.pages.pop(position) for position in step.freed_positions]
            ids = {page.block_id for page in freed}
            held[:] = [page for page in held if page.block_id not in ids]
            self._released.extend(freed)
        self.totals.count(self.geometry, tail)
        self.num_demoted += step.demoted_records
        if step.after.num_tokens == tiered.planner.block_tokens:
            self._unsealed.setdefault(request_id, growth.index)
        page_ids = tuple(page.block_id for page in new)
        return DecodeStep(growth.before, step, page_ids, tail.low_format, growth.begins)

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        if request.request_id not in self.tiered:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if tiered := self.tiered.pop(request_id, None):
            for block in (*tiered.blocks[:-1], tiered.tail):
                block.users -= 1
                if not block.users:
                    self.totals.count(self.geometry, block, -1)
        self._steps.pop(request_id, None)
        self._unsealed.pop(request_id, None)
        self._adopted.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def _clean(self, blocks: list[KVCacheBlock]) -> None:
        """Have the last of the new pages zeroed if it held tiers before.

        vLLM's kernel multiplies the unwritten slots of a page by 0: bytes of a tier may read as
        NaN there. This step's tokens fill all new pages but the last.
        """
        stale = self._dirty_pages.intersection(block.block_id for block in blocks)
        self._dirty_pages -= stale
        if blocks and blocks[-1].block_id in stale:
            self._to_zero.append(blocks[-1].block_id)

    # What our scheduler calls.

    def wrap_other_manager(self, manager: SingleTypeKVCacheManager) -> None:
        """Follow what the manager of another cache group, say of sliding windows, does.

        Some of the pages that it allocates held tiers. And of a prompt's pages it leaves those in
        the prefix cache that the same prompt will need; if it is compressed, it begins at its
        window.
        """
        allocate, cache = manager.allocate_new_blocks, manager.cache_blocks
        window = self.kv_cache_spec.compression.window

        @wraps(allocate)
        def allocate_new_blocks(*args, **kwargs) -> list[KVCacheBlock]:
            blocks = allocate(*args, **kwargs)
            self._clean(blocks)
            return blocks

        @wraps(cache)
        def cache_blocks(request: Request, *args, replay_boundaries, **kwargs) -> None:
            boundary = max(0, request.num_prompt_tokens - window)
            cache(request, *args, replay_boundaries=(*replay_boundaries, boundary), **kwargs)

        manager.allocate_new_blocks = allocate_new_blocks
        manager.cache_blocks = cache_blocks

    def append_token(self, request_id: str, num_tokens: int) -> bool:
        """Fast path: append one token, the ``num_tokens``-th, to a tail's last high record.

        Nothing else changes, and the plan omits it.

        Returns:
            Whether the request is compressed and the record has a free slot.
        """
        tiered = self.tiered.get(request_id)
        if tiered is None or not tiered.free_slots or num_tokens != tiered.num_tokens + 1:
            return False
        tiered.free_slots -= 1
        tiered.num_tokens = num_tokens
        self.totals.high_tokens += 1
        return True

    def drain_pages_to_zero(self) -> tuple[int, ...]:
        """Drain the pages that have to be zeroed before this step's tokens are written."""
        pages, self._to_zero = tuple(self._to_zero), []
        return pages

    def drain_steps(self) -> dict[str, list[DecodeStep]]:
        """Drain the steps since the last call that are more than :meth:`append_token`."""
        steps, self._steps = self._steps, {}
        return steps

    def drain_adopted(
        self,
    ) -> tuple[dict[str, tuple[BlockTable, ...]], tuple[tuple[int, int], ...]]:
        """Drain the requests that begin with blocks of the prefix cache, and pages to copy."""
        adopted, self._adopted = self._adopted, {}
        copies, self._copies = tuple(self._copies), []
        return adopted, copies

    def _planner(self, request_id: str) -> BlockPlanner:
        settings = self.kv_cache_spec.compression
        return planner(self.geometry, self.ratios[request_id], settings.recent, settings.ladder)

    def find(self, request: Request) -> Hit:
        """The blocks of the prefix cache that a waiting request can begin with."""
        return self.cache.find(request, self._planner(request.request_id))

    def seal(self, requests: dict[str, Request]) -> None:
        """Put full blocks into the prefix cache, as far as the hashes of their tokens are known."""
        if not self.enable_caching:
            self._unsealed.clear()
        for request_id, index in list(self._unsealed.items()):
            tiered = self.tiered[request_id]
            full = tiered.num_tokens // tiered.planner.block_tokens
            while index < full and self._seal(requests[request_id], index):
                index += 1
            if index < full:
                self._unsealed[request_id] = index
            else:
                del self._unsealed[request_id]

    def _seal(self, request: Request, index: int) -> bool:
        block = self.tiered[request.request_id].blocks[index]
        return block.tag is not None or self.cache.add_block(request, index, block)

    def keep(self, request: Request, num_tokens: int) -> None:
        """Keep the blocks of a request that ends findable. Call it before they are freed.

        Args:
            num_tokens: tokens whose steps were scheduled.
        """
        request_id = request.request_id
        tiered = self.tiered.get(request_id)
        if tiered is None or not self.enable_caching or request_id in self._steps:
            return
        num_tokens = min(num_tokens, request.num_tokens)
        block_tokens = tiered.planner.block_tokens
        for index in range(num_tokens // block_tokens):
            self._seal(request, index)
        if tiered.tail.tag is None and tiered.tail.sizes.num_tokens < block_tokens:
            self.cache.keep_tail(request, tiered, num_tokens)

    def compress(self, request: Request, num_tokens: int) -> CompressStep | None:
        """Move a native request into blocks. Sealed blocks of the prefix cache are shared.

        The request's native pages stay allocated until :meth:`release_pages`: other requests of
        the same step must not write to them before the workers have read them.

        Returns:
            The step; None if it saves no page, or no pages are available.
        """
        request_id = request.request_id
        planner = self._planner(request_id)
        all_sizes = planner.compress(num_tokens)
        if all_sizes is None:
            return None
        blocks = [Block(s, planner.form(i).low_format) for i, s in enumerate(all_sizes)]
        shared = {}
        if self.enable_caching:
            for index in range(num_tokens // planner.block_tokens):
                if found := self.cache.find_block(request, index, planner):
                    shared[index] = blocks[index] = found
        self.block_pool.touch([page for block in shared.values() for page in block.page_list])
        native = self.req_to_blocks[request_id]
        positions = [
            () if i in shared else planner.positions(i, sizes) for i, sizes in enumerate(all_sizes)
        ]
        targets = self._allocate_targets(native, [len(one) for one in positions])
        if targets is None:
            for block in shared.values():
                self.block_pool.free_blocks(block.page_list)
            return None
        for index, block in enumerate(blocks):
            if index not in shared:
                block.pages = dict(zip(positions[index], targets[index], strict=True))
        kept = {page.block_id for pages in targets for page in pages}
        self._dirty_pages |= kept
        in_place = any(page.block_id in kept for page in native)
        tables = tuple(block.table() for block in blocks)
        native_ids = tuple(page.block_id for page in native)
        step = CompressStep(native_ids, tables, frozenset(shared), in_place)
        self._released.extend(page for page in reversed(native) if page.block_id not in kept)
        reused = len(shared) * planner.block_tokens
        self._hold(request_id, TieredRequest(planner, blocks, reused))
        if num_tokens >= planner.block_tokens:
            self._unsealed[request_id] = 0
        self.num_compressed += 1
        self.num_compressed_in_place += in_place
        return step

    def _allocate_targets(
        self, native: list[KVCacheBlock], counts: list[int]
    ) -> list[list[KVCacheBlock]] | None:
        """Pages to compress into: free ones, or the request's own where too few are free.

        A block is written when all blocks before it are. So its own pages come from those whose
        tokens are in this block or in earlier ones.

        Args:
            counts: pages of each block.
        """
        num_free = self.block_pool.get_num_free_blocks()
        if sum(counts) <= num_free:
            pages = iter(self.block_pool.get_new_blocks(sum(counts)))
            return [[next(pages) for _ in range(count)] for count in counts]
        # A page that the workers write must have no other reader: neither a request that shares it
        # (ref_cnt) nor, later, one that finds it in the prefix cache (evict_blocks).
        per_block = block_tokens(self.block_size) // self.block_size
        own: list[list[KVCacheBlock]] = []
        available: list[KVCacheBlock] = []
        for i, count in enumerate(counts):
            part = native[per_block * i : per_block * (i + 1)]
            available += [b for b in part if b.ref_cnt == 1 and not b.is_null]
            own.append([available.pop() for _ in range(min(count, len(available)))])
        missing = [count - len(pages) for count, pages in zip(counts, own, strict=True)]
        if sum(missing) > num_free:
            return None
        self.block_pool.evict_blocks({block.block_id for pages in own for block in pages})
        return [
            pages + self.block_pool.get_new_blocks(count)
            for pages, count in zip(own, missing, strict=True)
        ]

    def release_pages(self) -> None:
        """Return the pages that this step's compressions and demotions no longer need."""
        self.block_pool.free_blocks(self._released)
        self._released = []
