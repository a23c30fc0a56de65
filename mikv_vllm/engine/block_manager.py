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

from mikv_vllm.engine.step_plan import CompressStep, DecodeStep
from mikv_vllm.engine.tiered_request import Growth, TieredRequest, TierTotals
from mikv_vllm.tiers.blocks import block_tokens, pages_needed, planner

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
            self.totals.add(tiered.totals(), -1)
            self._steps[request_id] = [self._grow(request_id, tiered, one) for one in growths]
            self.totals.add(tiered.totals())
        return []

    def _grow(self, request_id: str, tiered: TieredRequest, growth: Growth) -> DecodeStep:
        """Allocate the pages of a change of the last block, and change its sizes."""
        step = growth.step
        blocks = self.block_pool.get_new_blocks(len(step.new_positions))
        self._dirty_pages.update(block.block_id for block in blocks)
        held = self.req_to_blocks[request_id]
        held.extend(blocks)
        new_pages = dict(zip(step.new_positions, blocks, strict=True))
        if growth.begins:
            tiered.add_block(growth.before, new_pages)
        else:
            tiered.pages[growth.index].update(new_pages)
        tiered.resize(step.after)
        if step.freed_positions:
            freed = [tiered.pages[growth.index].pop(at) for at in step.freed_positions]
            ids = {block.block_id for block in freed}
            held[:] = [block for block in held if block.block_id not in ids]
            self._released.extend(freed)
        self.num_demoted += step.demoted_records
        page_ids = tuple(block.block_id for block in blocks)
        low_format = tiered.low_format(growth.index)
        return DecodeStep(growth.before, step, page_ids, low_format, growth.begins)

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        if request.request_id not in self.tiered:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if tiered := self.tiered.pop(request_id, None):
            self.totals.add(tiered.totals(), -1)
        self._steps.pop(request_id, None)
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

    def compress(self, request_id: str, num_tokens: int) -> CompressStep | None:
        """Move a native request into blocks.

        The request's native pages stay allocated until :meth:`release_pages`: other requests of
        the same step must not write to them before the workers have read them.

        Returns:
            The step; None if it saves no page, or no pages are available.
        """
        settings, ratio = self.kv_cache_spec.compression, self.ratios[request_id]
        tiered = TieredRequest(planner(self.geometry, ratio, settings.recent, settings.ladder))
        blocks = tiered.planner.compress(num_tokens)
        if blocks is None:
            return None
        native = self.req_to_blocks[request_id]
        positions = [tiered.planner.positions(i, sizes) for i, sizes in enumerate(blocks)]
        targets = self._allocate_targets(native, [len(one) for one in positions])
        if targets is None:
            return None
        for sizes, at, pages in zip(blocks, positions, targets, strict=True):
            tiered.add_block(sizes, dict(zip(at, pages, strict=True)))
        tables = tuple(tiered.table(i, sizes) for i, sizes in enumerate(blocks))
        kept = {block.block_id for pages in targets for block in pages}
        self._dirty_pages |= kept
        in_place = any(block.block_id in kept for block in native)
        step = CompressStep(tuple(block.block_id for block in native), tables, in_place)
        self._released.extend(b for b in reversed(native) if b.block_id not in kept)
        self.req_to_blocks[request_id] = [block for pages in targets for block in pages]
        self.tiered[request_id] = tiered
        self.totals.add(tiered.totals())
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
