"""The blocks of all compressed requests: who holds which pages, and what changes in a step."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.block_cache import BlockCache, Hit
from mikv_vllm.engine.dirty_pages import DirtyPages
from mikv_vllm.engine.eviction import SpentPages
from mikv_vllm.engine.step_changes import StepChanges
from mikv_vllm.engine.step_plan import OPERATIONS, BlockTable, CompressStep, DecodeStep
from mikv_vllm.engine.tiered_request import Block, Growth, TieredRequest, TierTotals
from mikv_vllm.tiers.blocks import (
    MOST_SAVED_PAGES,
    BlockForm,
    BlockPlanner,
    block_tokens,
    pages_needed,
    planner,
)
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, TierGeometry

BRANCH_PAGES = 4 + MOST_SAVED_PAGES
"""Most pages that a request takes in addition if it seals a short block, which is as rich as a
tail."""


class TierStore:
    """Allocates, shares and releases the pages of blocks in vLLM's pool.

    Calls come in pairs: :meth:`admit` and :meth:`forget`, :meth:`adopt` or :meth:`compress` and
    :meth:`release`. Changes of a step are collected in :attr:`changes`, for the plan.
    """

    def __init__(
        self,
        pool: BlockPool,
        geometry: TierGeometry,
        settings: CompressionConfig,
        enable_caching: bool,
    ) -> None:
        self.pool = pool
        self.geometry = geometry
        self.settings = settings
        self.enable_caching = enable_caching
        self.block_tokens = block_tokens(geometry.block_size)
        self.ratios: dict[str, float] = {}
        """Requested ratio of each request that may be compressed."""
        self._longest: dict[str, int] = {}
        """Most tokens of each of them."""
        self.branches: dict[str, int] = {}
        """Requests with a branch ahead: tokens after which they seal a block, even a short one."""
        self.requests: dict[str, TieredRequest] = {}
        """Compressed requests."""
        self.totals = TierTotals()
        """Of the blocks that requests hold; a shared block counts once."""
        self.operations = dict.fromkeys(OPERATIONS, 0)
        """Counts since the start."""
        self.reused_tokens = {"adopt": 0, "compress": 0}
        """Tokens in blocks that requests took from the prefix cache, since the start."""
        self.cache = BlockCache(pool, geometry.block_size)
        self.dirty = DirtyPages(self._evict)
        self.spent = SpentPages(pool)
        self._unsealed: dict[str, int] = {}
        """Requests with full blocks that are not in the prefix cache: index of the first."""
        self.changes = StepChanges(pool)

    def _evict(self, pages: Iterable[int]) -> None:
        self.operations["evict"] += self.cache.evict(pages)

    def admit(self, request_id: str, ratio: float, longest: int) -> None:
        """Allow a request to be compressed.

        Args:
            longest: most tokens that it will have.
        """
        self.ratios[request_id] = ratio
        self._longest[request_id] = longest

    def forget(self, request_id: str) -> None:
        """Undo :meth:`admit`."""
        assert request_id not in self.requests, "its blocks have to be released first"
        for by_request in (self.ratios, self._longest, self.branches):
            by_request.pop(request_id, None)

    def planner(self, request_id: str) -> BlockPlanner:
        """Sizes of the blocks of a request."""
        settings = self.settings
        return planner(self.geometry, self.ratios[request_id], settings.recent, settings.ladder)

    def pages_needed(self, request_id: str, num_tokens: int) -> int:
        """Pages that a request takes until it holds ``num_tokens`` tokens, once compressed."""
        settings, ratio = self.settings, self.ratios[request_id]
        return pages_needed(self.geometry, ratio, settings.recent, num_tokens, settings.ladder)

    def next_pages(self) -> int:
        """Pages that the compressed requests take soon: the next one of each that still grows."""
        longest = self._longest
        return sum(tiered.takes_page(longest[r]) for r, tiered in self.requests.items())

    # Tokens join the tail.

    def append_token(self, request_id: str, num_tokens: int) -> bool:
        """Fast path: append one token, the ``num_tokens``-th, to the high tier of a tail.

        Nothing else changes, and the plan omits it.

        Returns:
            Whether the request is compressed, and the tiers do not meet.
        """
        tiered = self.requests.get(request_id)
        if tiered is None or not tiered.free_slots or num_tokens != tiered.num_tokens + 1:
            return False
        tiered.free_slots -= 1
        tiered.num_tokens = num_tokens
        self.totals.high_tokens += 1
        # Low tokens are a multiple of a high record's, so they do not shift where records begin.
        if (num_tokens - tiered.blocks[-1].start) % HIGH_RECORD_TOKENS == 1:
            self.totals.high_records += 1
        return True

    def grow(self, request_id: str, num_tokens: int) -> None:
        """Let a compressed request take tokens until it has ``num_tokens``."""
        tiered = self.requests[request_id]
        growths = tiered.grow(num_tokens)
        self.changes.steps[request_id] = [
            self._grow(request_id, tiered, growth) for growth in growths
        ]

    def _grow(self, request_id: str, tiered: TieredRequest, growth: Growth) -> DecodeStep:
        step = growth.step
        new = self._allocate(len(step.new_positions))
        self.dirty.add(new)
        if growth.begins:
            tiered.begin_block(growth.before)
            tiered.tail.users = 1
        else:
            self.totals.count(self.geometry, tiered.tail, -1)
        tail = tiered.tail
        low_format = tail.low_format
        tail.pages = step.insert(tail.pages, new)
        if step.is_split:
            self.changes.copy(tail.pages[step.new_positions[0] - 1], new[-1])
        tiered.resize(step.after)
        demoted, sealed = step.demoted_records, None
        if growth.sealed:
            demoted = growth.sealed.sizes.low_records - growth.before.low_records
            sealed = self._rewrite(tiered, growth.sealed)
        if demoted:
            tiered.mark_demotion()
            self.operations["demote"] += max(0, demoted)
        self.totals.count(self.geometry, tail)
        if tail.is_full:
            self._unsealed.setdefault(request_id, len(tiered.blocks) - 1)
        page_ids = tuple(page.block_id for page in new)
        return DecodeStep(growth.before, step, page_ids, low_format, growth.begins, sealed)

    def _rewrite(self, tiered: TieredRequest, form: BlockForm) -> BlockTable:
        """Give the tail the form of a sealed block, and release the pages that it leaves."""
        tail, count = tiered.tail, form.sizes.pages
        self.changes.release(tail.pages[count:])
        del tail.pages[count:]
        tail.low_format = form.low_format
        tiered.resize(form.sizes)
        return tail.table()

    def remove_tokens(self, request_id: str, count: int) -> None:
        """Remove the newest ``count`` tokens of a tail, which are high. It keeps its pages."""
        tiered = self.requests[request_id]
        tail = tiered.tail
        self.totals.count(self.geometry, tail, -1)
        tiered.resize(replace(tail.sizes, high_tokens=tail.sizes.high_tokens - count))
        self.totals.count(self.geometry, tail)

    # Requests become tiered, and end.

    def find(self, request: Request) -> Hit:
        """The blocks of the prefix cache that a waiting request can begin with.

        Also sets its branch, if behind them it differs from an earlier request.
        """
        request_id = request.request_id
        planner = self.planner(request_id)
        hit = self.cache.find(request, planner)
        self.branches.pop(request_id, None)
        # Richer and short blocks take more pages than its own. The request still has to fit.
        most = self.pages_needed(request_id, request.num_prompt_tokens + request.max_tokens)
        own = sum(block.sizes.pages for block in planner.blocks(hit.num_tokens))
        most += max(0, len(hit.pages) - own)
        total = self.pool.num_gpu_blocks - 1
        if most > total:
            return Hit([], None, 0, 0)
        if most + BRANCH_PAGES <= total:
            branch = self.cache.find_branch(request, hit, self.settings.window)
            if branch:
                self.branches[request_id] = branch
        return hit

    def pages_to_adopt(self, request_id: str, hit: Hit, num_tokens: int) -> int:
        """Free pages that :meth:`adopt` and :meth:`grow` need until there are ``num_tokens``."""
        branch = self.branches.get(request_id, 0)
        tiered = TieredRequest(self.planner(request_id), hit.blocks(), hit.num_tokens, branch)
        pages = sum(page.ref_cnt == 0 for page in hit.pages)
        return pages + len(hit.tail.pages if hit.tail else ()) + tiered.pages_to_grow(num_tokens)

    def adopt(self, request_id: str, hit: Hit) -> None:
        """Let a request begin with blocks of the prefix cache. A tail is copied."""
        self.pool.touch(hit.pages)
        blocks = hit.blocks()
        if hit.tail:
            copies = self._allocate(len(hit.tail.pages))
            self.dirty.add(copies)
            blocks[-1].pages = copies
            sources = hit.tail.pages
            for source, copy in zip(sources, copies, strict=True):
                self.changes.copy(source, copy)
            self.changes.release(sources)
            self.spent.add(sources)
            self.operations["copy"] += 1
        droppable = hit.droppable if hit.tail else None
        branch = self.branches.get(request_id, 0)
        planner = self.planner(request_id)
        tiered = TieredRequest(planner, blocks, hit.num_tokens, branch, droppable)
        self._hold(request_id, tiered, "adopt")
        self.changes.adopted[request_id] = tuple(block.table() for block in blocks)

    def compress(
        self, request: Request, num_tokens: int, native: list[KVCacheBlock]
    ) -> CompressStep | None:
        """Move a native request into blocks. Blocks that the prefix cache has are shared.

        The native pages stay allocated until the plan is made: other requests of the same
        step must not write to them before the workers have read them.

        Returns:
            The step; None if it saves no page, or no pages are available.
        """
        plan = self.planner(request.request_id)
        blocks: list[Block] = []
        counts: list[int] = []  # of pages to allocate
        shared, start = set(), 0
        while start < num_tokens:
            found = None
            if self.enable_caching:
                found = self.cache.find_block(request, start, num_tokens, plan)
            if found:
                shared.add(len(blocks))
                blocks.append(found)
                counts.append(0)
            else:
                form = plan.block(start, min(self.block_tokens, num_tokens - start))
                blocks.append(Block(start, self.block_tokens, form.sizes, form.low_format))
                counts.append(form.sizes.pages)
            start += blocks[-1].sizes.num_tokens
        reused = [blocks[index] for index in shared]
        shared_pages = [page for block in reused for page in block.pages]
        if len(shared_pages) + sum(counts) >= plan.native_pages(num_tokens):
            return None
        self.pool.touch(shared_pages)
        targets = self._allocate_targets(native, blocks, counts)
        if targets is None:
            self.pool.free_blocks(shared_pages)
            return None
        for block, pages in zip(blocks, targets, strict=True):
            block.pages += pages
        written = [page for pages in targets for page in pages]
        self.dirty.add(written)
        ids = {page.block_id for page in written}
        in_place = any(page.block_id in ids for page in native)
        left = [page for page in reversed(native) if page.block_id not in ids]
        self.changes.release(left)
        self.spent.add(left)
        branch = self.branches.get(request.request_id, 0)
        num_reused = sum(block.capacity for block in reused)
        tiered = TieredRequest(plan, blocks, num_reused, branch)
        self._hold(request.request_id, tiered, "compress")
        if self.enable_caching:
            # At once: a request that is compressed in the same step may have the same blocks.
            self._unsealed[request.request_id] = 0
            self._seal_full(request)
        self.operations["compress"] += 1
        self.operations["compress_in_place"] += in_place
        native_ids = tuple(page.block_id for page in native)
        tables = tuple(block.table() for block in blocks)
        return CompressStep(native_ids, tables, frozenset(shared), in_place)

    def _allocate_targets(
        self, native: list[KVCacheBlock], blocks: list[Block], counts: list[int]
    ) -> list[list[KVCacheBlock]] | None:
        """Pages to compress into: free ones, or the request's own where too few are free.

        Own pages come before those of kept blocks, whose tokens would be lost.

        Blocks are written one after the other. A block can overwrite native pages of its own tokens
        and of earlier ones, but not those of later blocks.

        Args:
            counts: pages of each block.
        """
        num_free = self.pool.get_num_free_blocks()
        if sum(counts) <= num_free - self.cache.num_kept_pages:
            pages = iter(self._allocate(sum(counts)))
            return [[next(pages) for _ in range(count)] for count in counts]
        # A page that the workers write must have no other reader: neither a request that shares it
        # (ref_cnt) nor, later, one that finds it in the prefix cache (evict_blocks).
        own: list[list[KVCacheBlock]] = []
        available: list[KVCacheBlock] = []
        size = self.geometry.block_size
        for block, count in zip(blocks, counts, strict=True):
            end = block.start + block.sizes.num_tokens
            part = native[block.start // size : -(-end // size)]
            available += [page for page in part if page.ref_cnt == 1 and not page.is_null]
            own.append([available.pop() for _ in range(min(count, len(available)))])
        missing = [count - len(pages) for count, pages in zip(counts, own, strict=True)]
        if sum(missing) > num_free:
            return None
        self.pool.evict_blocks({page.block_id for pages in own for page in pages})
        return [pages + self._allocate(count) for pages, count in zip(own, missing, strict=True)]

    def _allocate(self, count: int) -> list[KVCacheBlock]:
        self.spent.evict_first(count)
        pages = self.pool.get_new_blocks(count)
        self.changes.begin_pages(pages)
        return pages

    def _hold(self, request_id: str, tiered: TieredRequest, operation: str) -> None:
        self.requests[request_id] = tiered
        self.operations["reuse"] += tiered.reused_tokens > 0
        self.reused_tokens[operation] += tiered.reused_tokens
        for block in tiered.blocks:
            block.users += 1
            if block.users == 1:
                self.totals.count(self.geometry, block)
                if block.tag:
                    self.cache.hold(block)

    def release(self, request_id: str) -> None:
        """Forget the blocks of a request. The caller returns their pages to the pool."""
        tiered = self.requests.pop(request_id, None)
        for block in tiered.all_blocks() if tiered else ():
            block.users -= 1
            if not block.users:
                self.totals.count(self.geometry, block, -1)
                self.cache.keep(block)
        self._unsealed.pop(request_id, None)
        self.changes.forget(request_id)

    # The prefix cache.

    def seal(self, requests: Mapping[str, Request]) -> None:
        """Put full blocks into the prefix cache, as far as the hashes of their tokens are known.

        Call it when the requests of a step are final.
        """
        if not self.enable_caching:
            self._unsealed.clear()
        for request_id in list(self._unsealed):
            self._seal_full(requests[request_id])

    def _seal_full(self, request: Request) -> None:
        """Put the full blocks of a request into the prefix cache."""
        request_id = request.request_id
        first = self._unsealed.pop(request_id)
        for index, block in enumerate(self.requests[request_id].all_blocks()):
            if index >= first and block.is_full and not self._seal(request, block):
                self._unsealed.setdefault(request_id, index)

    def _seal(self, request: Request, block: Block) -> bool:
        return block.tag is not None or self.cache.add_block(request, block)

    def keep(self, request: Request) -> None:
        """Keep the blocks of a request that ends findable. Call it before :meth:`release`."""
        request_id = request.request_id
        tiered = self.requests.get(request_id)
        # With a planned change, the step of the request may have been withdrawn.
        if tiered is None or not self.enable_caching or request_id in self.changes.steps:
            return
        num_tokens = min(request.num_computed_tokens, request.num_tokens)
        for block in tiered.all_blocks():
            if block.is_full and block.start + block.capacity <= num_tokens:
                self._seal(request, block)
        if not tiered.tail.is_full:
            self.cache.keep_tail(request, tiered, num_tokens)

    def remember(self, request: Request) -> None:
        """Remember the tokens of a request that ends, to find the branches of later ones."""
        if self.enable_caching and request.request_id in self.ratios:
            self.cache.remember(request)
