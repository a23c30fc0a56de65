"""The blocks of one compressed request, as the scheduler counts them."""

from dataclasses import dataclass, field, replace

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from mikv_vllm.engine.step_plan import BlockTable
from mikv_vllm.tiers.blocks import EMPTY, BlockForm, BlockPlanner, TailStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import TierSizes


@dataclass(eq=False)
class Block:
    """A tiered block: its sizes, and the pages of its stream.

    A sealed block can belong to several requests and never changes. A tail belongs to one.
    """

    start: int
    """Position of its first token in the request."""
    capacity: int
    """Tokens with which it is sealed."""
    sizes: TierSizes
    low_format: LowFormat
    pages: list[KVCacheBlock] = field(default_factory=list)
    users: int = 0
    """Requests that hold it."""
    tag: bytes | None = None
    """Hash of all its pages while the prefix cache holds it. Unique: no two blocks share a tag."""

    @property
    def is_full(self) -> bool:
        """Whether it has all its tokens."""
        return self.sizes.num_tokens == self.capacity

    @property
    def is_cached(self) -> bool:
        """Whether no page was taken since the block was put into the prefix cache."""
        return self.tag is not None and all(page.block_hash == self.tag for page in self.pages)

    def table(self) -> BlockTable:
        """The block as workers read it."""
        ids = tuple(page.block_id for page in self.pages)
        return BlockTable(ids, self.sizes, self.low_format)


@dataclass
class TierTotals:
    """What blocks hold together. Pages are those of the pool; the rest is per layer and head."""

    blocks: int = 0
    sealed: int = 0
    """Of these, blocks that have all their tokens."""
    pages: int = 0
    high_tokens: int = 0
    high_records: int = 0
    low_records: int = 0
    low_bytes: int = 0

    def count(self, geometry: TierGeometry, block: Block, sign: int = 1) -> None:
        """Add a block, or with ``sign`` -1 subtract it."""
        sizes = block.sizes
        self.blocks += sign
        self.sealed += sign * block.is_full
        self.pages += sign * len(block.pages)
        self.high_tokens += sign * sizes.high_tokens
        self.high_records += sign * -(-sizes.high_tokens // HIGH_RECORD_TOKENS)
        self.low_records += sign * sizes.low_records
        self.low_bytes += sign * sizes.low_records * geometry.low(block.low_format).num_bytes


@dataclass(frozen=True)
class Growth:
    """How the last block of a request changes."""

    before: TierSizes
    """In the stream as long as it is afterwards."""
    step: TailStep
    begins: bool
    """Whether it is a new block."""
    sealed: BlockForm | None = None
    """What it is written anew as in this step, if that fills it."""


class TieredRequest:
    """The blocks of one compressed request: sealed blocks, then the tail.

    A full tail is a sealed block; the next token begins a new tail.
    """

    def __init__(
        self,
        planner: BlockPlanner,
        blocks: list[Block],
        reused: int,
        branch: int = 0,
        droppable: int | None = None,
    ) -> None:
        """Create a request.

        Args:
            blocks: at least one; all but the last one are full.
            reused: tokens in blocks that the request did not write.
            branch: number of tokens at which a block is sealed even if it is short; 0 for none.
            droppable: see :attr:`droppable`; None if only the recent tokens are known to be high.
        """
        self.planner = planner
        self.blocks = blocks
        self.reused_tokens = reused
        # A branch that the request could not be compressed at is behind it.
        known = blocks[-1].start + blocks[-1].sizes.num_tokens
        self.branch = branch if branch >= known else 0
        self.drafts = 0
        """Drafts that may join in the next step."""
        self._next: tuple[int, list[Growth]] | None = None
        self._last_pages: tuple[int, int] | None = None
        """Start of the last block, and its pages when the request ends."""
        if not blocks[-1].is_full:
            blocks[-1].capacity = self._capacity(blocks[-1].start)
        self.resize(blocks[-1].sizes)
        self.mark_demotion()
        if droppable is not None:
            self._demoted_at += planner.recent - droppable

    def _capacity(self, start: int) -> int:
        """Tokens of a block that begins at ``start``."""
        whole = self.planner.block_tokens
        return min(whole, self.branch - start) if self.branch > start else whole

    @property
    def tail(self) -> Block:
        """The last block, with this step's tokens."""
        tail = self.blocks[-1]
        high_tokens = self.num_tokens - tail.start - tail.sizes.low_tokens
        if tail.sizes.high_tokens != high_tokens:
            tail.sizes = replace(tail.sizes, high_tokens=high_tokens)
        return tail

    def begin_block(self, sizes: TierSizes) -> None:
        """Begin a new tail."""
        assert self.tail.is_full, "the tail is not full"
        start = self.num_tokens
        low_format = self.planner.tail_form(start).low_format
        self.blocks.append(Block(start, self._capacity(start), sizes, low_format))
        self.resize(sizes)
        self.mark_demotion()

    def resize(self, sizes: TierSizes) -> None:
        """Give the last block these sizes."""
        tail = self.blocks[-1]
        tail.sizes = sizes
        self._next, self.drafts = None, 0
        self.num_tokens = tail.start + sizes.num_tokens
        # The last token of a block comes with the last demotions: it needs a plan.
        slots = self.planner.free_slots(tail.start, sizes)
        self.free_slots = max(0, min(slots, tail.capacity - 1 - sizes.num_tokens))
        """Tokens that can join the high tier, and nothing else changes."""

    def mark_demotion(self) -> None:
        """Remember that only the recent tokens are known to be high now."""
        self._demoted_at = self.num_tokens

    @property
    def droppable(self) -> int:
        """Newest tokens that are known to be the last high tokens of the tail."""
        sizes = self.tail.sizes
        if not sizes.low_records:
            return sizes.num_tokens
        recent = min(self.planner.recent, sizes.high_tokens)
        return min(sizes.high_tokens, recent + self.num_tokens - self._demoted_at)

    def all_blocks(self) -> list[Block]:
        """All blocks, the tail with this step's tokens."""
        return [*self.blocks[:-1], self.tail]

    def takes_page(self, longest: int) -> bool:
        """Whether the request takes another page until it has ``longest`` tokens."""
        tail, whole = self.blocks[-1], self.planner.block_tokens
        if longest > tail.start + whole:
            return True
        if self._last_pages is None or self._last_pages[0] != tail.start:
            last = self.planner.tail(tail.start, min(longest - tail.start, whole - 1)).pages
            self._last_pages = tail.start, last
        return self._last_pages[1] > len(tail.pages)

    def pages_to_grow(self, num_tokens: int) -> int:
        """Pages that :meth:`grow` allocates until there are ``num_tokens`` tokens."""
        if num_tokens <= self.num_tokens + self.free_slots:
            return 0
        return sum(len(growth.step.new_positions) for growth in self.grow(num_tokens))

    def grow(self, num_tokens: int) -> list[Growth]:
        """How the request takes tokens until it has ``num_tokens``: changes of its last blocks.

        Does not change the request.
        """
        if self._next is None or self._next[0] != num_tokens:
            self._next = num_tokens, self._grow(num_tokens)  # vLLM asks twice
        return self._next[1]

    def allow_drafts(self, most: int) -> int:
        """Let up to ``most`` drafts join in the next step, and return how many."""
        self.drafts = self._grow_drafts(most).step.new_tokens - 1
        return self.drafts

    def _grow_drafts(self, most: int) -> Growth:
        """How the tail takes one token and up to ``most`` drafts."""
        planner, tail = self.planner, self.tail
        start, capacity, sizes = tail.start, tail.capacity, tail.sizes
        if tail.is_full:
            start += capacity
            capacity, sizes = self._capacity(start), EMPTY
        step = planner.append_drafts(start, sizes, capacity, most)
        return Growth(planner.lengthen(sizes, step.after.pages), step, tail.is_full)

    def _grow(self, num_tokens: int) -> list[Growth]:
        growths, tail = [], self.tail
        start, capacity, sizes = tail.start, tail.capacity, tail.sizes
        count = num_tokens - self.num_tokens
        if 1 < count <= 1 + self.drafts:
            return [self._grow_drafts(count - 1)]
        while count:
            begins = sizes.num_tokens == capacity
            if begins:
                start += capacity
                capacity, sizes = self._capacity(start), EMPTY
            joining = min(count, capacity - sizes.num_tokens)
            growth = self._grow_block(start, sizes, joining, num_tokens == self.num_tokens + 1)
            growths.append(replace(growth, begins=begins))
            sizes, count = growth.step.after, count - joining
        return growths

    def _grow_block(self, start: int, sizes: TierSizes, joining: int, is_decode: bool) -> Growth:
        """How ``joining`` tokens change a block of these sizes.

        A decode step attends over the full tail, and seals it then. The tokens of a prompt chunk
        join the sealed block at once.
        """
        planner = self.planner
        is_whole = sizes.num_tokens + joining == planner.block_tokens
        sealed = planner.sealed_form(start) if is_whole else None
        if sealed and not is_decode:
            return Growth(sizes, planner.seal(start, sizes, joining), False, sealed)
        step = planner.extend(start, sizes, joining)
        return Growth(planner.lengthen(sizes, step.after.pages), step, False, sealed)
