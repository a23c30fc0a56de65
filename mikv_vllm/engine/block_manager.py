"""The block manager that gives a request's pages two precision tiers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.request import Request

from mikv_vllm.engine.step_plan import CompressStep, DecodeStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS
from mikv_vllm.tiers.plan import AppendStep, TierPlanner, TierSizes, pages_needed

if TYPE_CHECKING:
    from mikv_vllm.engine.spec import TieredAttentionSpec


class TieredRequest:
    """The tiers of one compressed request; its pages are in ``req_to_blocks``."""

    def __init__(self, planner: TierPlanner, sizes: TierSizes) -> None:
        self.planner = planner
        self._next: AppendStep | None = None
        self.sizes = sizes

    @property
    def sizes(self) -> TierSizes:
        """Sizes, this step's tokens included."""
        known = self._sizes
        high_tokens = self.num_tokens - known.low_tokens
        return TierSizes(known.pages, high_tokens, known.low_records, known.low_end_bytes)

    @sizes.setter
    def sizes(self, sizes: TierSizes) -> None:
        self._sizes = sizes
        self.num_tokens = sizes.num_tokens
        self.room = -sizes.high_tokens % HIGH_RECORD_TOKENS
        """Free places in the last high group."""

    def grow(self, num_tokens: int) -> AppendStep:
        """How the tiers come to hold ``num_tokens`` tokens: one more, or a prompt's next chunk."""
        step = self._next
        if step is None or step.after.num_tokens != num_tokens:
            count, planner = num_tokens - self.num_tokens, self.planner
            step = planner.append(self.sizes) if count == 1 else planner.extend(self.sizes, count)
            self._next = step  # vLLM asks for the pages first, and takes them later
        return step


@dataclass
class TierTotals:
    """What all compressed requests hold together; pages are in the pool, the rest in each head."""

    pages: int = 0
    high_tokens: int = 0
    high_records: int = 0
    low_records: int = 0
    low_bytes: int = 0

    def count(self, tiered: TieredRequest, sign: int) -> None:
        """Add a request, or with ``sign`` -1 take it away."""
        sizes = tiered.sizes
        self.pages += sign * sizes.pages
        self.high_tokens += sign * sizes.high_tokens
        self.high_records += sign * -(-sizes.high_tokens // HIGH_RECORD_TOKENS)
        self.low_records += sign * sizes.low_records
        self.low_bytes += sign * sizes.low_records * tiered.planner.low_record_bytes


class TieredBlockManager(FullAttentionManager):
    """A ``FullAttentionManager`` whose requests are native or tiered.

    A native request is vLLM's own in every respect. For a tiered request the number of pages
    follows from :class:`TierPlanner`; vLLM is given no new pages for it, since the workers take
    them from the plan, and its pages never enter the prefix cache.
    """

    kv_cache_spec: "TieredAttentionSpec"

    def __init__(self, kv_cache_spec: "TieredAttentionSpec", **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.ratios: dict[str, float] = {}
        """Requested ratio of each request that may be compressed; our scheduler's."""
        self.native_limit = 0
        """Tokens of a prompt beyond which it is compressed while it is computed."""
        self.tiered: dict[str, TieredRequest] = {}
        self.totals = TierTotals()
        self.num_compressed = 0
        self.num_compressed_in_place = 0
        self.num_demoted = 0
        self._steps: dict[str, DecodeStep] = {}
        self._released: list[KVCacheBlock] = []
        self._dirty_pages: set[int] = set()
        self._to_zero: list[int] = []

    @cached_property
    def geometry(self):
        """Sizes of the tiers (:class:`~mikv_vllm.tiers.formats.TierGeometry`)."""
        return self.kv_cache_spec.geometry

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
            return tiered.grow(num_tokens).new_pages
        if kwargs.get("apply_admission_cap") and request_id in self.ratios:
            # All of a prompt has to fit; but never more of it than this at once.
            settings = self.kv_cache_spec.compression
            pages = pages_needed(
                self.geometry,
                self.ratios[request_id],
                settings.recent,
                num_tokens,
                settings.ladder,
            )
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
        if self.append_token(request_id, num_tokens):
            return []
        before = tiered.sizes
        append = tiered.grow(num_tokens)
        blocks = self.block_pool.get_new_blocks(append.new_pages)
        self._dirty_pages.update(block.block_id for block in blocks)
        self.req_to_blocks[request_id].extend(blocks)
        self.totals.count(tiered, -1)
        tiered.sizes = append.after
        self.totals.count(tiered, 1)
        self.num_demoted += append.demoted_records
        self._steps[request_id] = DecodeStep(
            before,
            append,
            tuple(block.block_id for block in blocks),
            tiered.planner.low_format,
        )
        return []

    def cache_blocks(self, request: Request, *args, **kwargs) -> None:
        if request.request_id not in self.tiered:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        if tiered := self.tiered.pop(request_id, None):
            self.totals.count(tiered, -1)
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

        Some of the pages that it takes held tiers. And of a prompt's pages it leaves those in the
        prefix cache that the same prompt will need; if it is compressed, it begins at its window.
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
        """Let a compressed request's last high group take in one token, its ``num_tokens``-th.

        Nothing else changes then, and the plan does not mention it.

        Returns:
            Whether the request is compressed and its group has room for the token.
        """
        tiered = self.tiered.get(request_id)
        if tiered is None or not tiered.room or num_tokens != tiered.num_tokens + 1:
            return False
        tiered.room -= 1
        tiered.num_tokens = num_tokens
        self.totals.high_tokens += 1
        return True

    def drain_pages_to_zero(self) -> tuple[int, ...]:
        """Drain the pages that have to be zeroed before this step's tokens are written."""
        pages, self._to_zero = tuple(self._to_zero), []
        return pages

    def drain_steps(self) -> dict[str, DecodeStep]:
        """Drain the steps since the last call that are more than :meth:`append_token`."""
        steps, self._steps = self._steps, {}
        return steps

    def compress(self, request_id: str, num_tokens: int, most_tokens: int) -> CompressStep | None:
        """Move a native request into tiers; None if that saves no page or no page is to be had.

        Args:
            num_tokens: that it holds.
            most_tokens: of its whole prompt.

        The request's native pages stay allocated until :meth:`release_native_pages`: other
        requests of the same step must not write to them before the workers have read them.
        """
        settings, ratio = self.kv_cache_spec.compression, self.ratios[request_id]
        planner = TierPlanner.choose(
            self.geometry, ratio, settings.recent, most_tokens, settings.ladder
        )
        sizes = planner.compress(num_tokens)
        if sizes is None:
            return None
        native = self.req_to_blocks[request_id]
        targets = self._take_targets(native, sizes.pages)
        if targets is None:
            return None
        kept = {block.block_id for block in targets}
        self._dirty_pages |= kept
        in_place = any(block.block_id in kept for block in native)
        step = CompressStep(
            tuple(block.block_id for block in native),
            tuple(block.block_id for block in targets),
            sizes,
            planner.low_format,
            in_place,
        )
        self._released.extend(b for b in reversed(native) if b.block_id not in kept)
        self.req_to_blocks[request_id] = targets
        self.tiered[request_id] = tiered = TieredRequest(planner, sizes)
        self.totals.count(tiered, 1)
        self.num_compressed += 1
        self.num_compressed_in_place += in_place
        return step

    def _take_targets(
        self, native: list[KVCacheBlock], num_pages: int
    ) -> list[KVCacheBlock] | None:
        """Pages to compress into: free ones, or the request's own where too few are free."""
        num_free = self.block_pool.get_num_free_blocks()
        if num_pages <= num_free:
            return self.block_pool.get_new_blocks(num_pages)
        # Nobody else may read a page that we write to: neither a request that shares it
        # (ref_cnt) nor, later, one that finds it in the prefix cache (evict).
        own = [b for b in reversed(native) if b.ref_cnt == 1 and not b.is_null][:num_pages]
        if len(own) + num_free < num_pages:
            return None
        self.block_pool.evict_blocks({block.block_id for block in own})
        return own + self.block_pool.get_new_blocks(num_pages - len(own))

    def release_native_pages(self) -> None:
        """Return the native pages of this step's compressed requests to the pool."""
        self.block_pool.free_blocks(self._released)
        self._released = []
