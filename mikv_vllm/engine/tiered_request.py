"""The blocks of one compressed request, as the scheduler counts them."""

from dataclasses import dataclass, replace

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from mikv_vllm.engine.step_plan import BlockTable
from mikv_vllm.tiers.blocks import BlockPlanner, TailStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LowFormat
from mikv_vllm.tiers.plan import TierSizes


@dataclass
class TierTotals:
    """What blocks hold together; pages are in the pool, the rest in each layer and head."""

    blocks: int = 0
    pages: int = 0
    high_tokens: int = 0
    high_records: int = 0
    low_records: int = 0
    low_bytes: int = 0

    def count(self, planner: BlockPlanner, index: int, sizes: TierSizes, sign: int = 1) -> None:
        """Add a block, or with ``sign`` -1 subtract it."""
        record = planner.geometry.low(planner.form(index).low_format).num_bytes
        self.blocks += sign
        self.pages += sign * planner.num_allocated(index, sizes)
        self.high_tokens += sign * sizes.high_tokens
        self.high_records += sign * -(-sizes.high_tokens // HIGH_RECORD_TOKENS)
        self.low_records += sign * sizes.low_records
        self.low_bytes += sign * sizes.low_records * record

    def add(self, other: "TierTotals", sign: int = 1) -> None:
        """Add other totals, or with ``sign`` -1 subtract them."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + sign * value)


@dataclass(frozen=True)
class Growth:
    """How the last block of a request changes."""

    index: int
    before: TierSizes
    step: TailStep
    begins: bool
    """Whether it is a new block."""


class TieredRequest:
    """Sizes and pages of the blocks of one compressed request: sealed blocks, then the tail.

    A tail with all tokens of a block is sealed; the next token begins a new one.
    """

    def __init__(self, planner: BlockPlanner) -> None:
        self.planner = planner
        self.pages: list[dict[int, KVCacheBlock]] = []
        """For each block, its pages by position in the stream."""
        self.sealed = TierTotals()
        """Of all blocks before the tail."""
        self.num_tokens = 0
        """Of all blocks, this step's tokens included."""
        self.free_slots = 0
        """Tokens that the last high record takes before the next plan."""
        self._next: tuple[int, list[Growth]] | None = None

    @property
    def index(self) -> int:
        """Of the tail."""
        return len(self.pages) - 1

    @property
    def tail(self) -> TierSizes:
        """Sizes of the tail, this step's tokens included."""
        in_tail = self.num_tokens - self.index * self.planner.block_tokens
        return replace(self._tail, high_tokens=in_tail - self._tail.low_tokens)

    def add_block(self, sizes: TierSizes, pages: dict[int, KVCacheBlock]) -> None:
        """Add a block with these pages; it becomes the tail."""
        if self.pages:
            self.sealed.count(self.planner, self.index, self.tail)
        self.pages.append(pages)
        self.num_tokens = self.index * self.planner.block_tokens
        self.resize(sizes)

    def resize(self, sizes: TierSizes) -> None:
        """Give the tail these sizes."""
        block_tokens = self.planner.block_tokens
        self._tail = sizes
        self.num_tokens = self.index * block_tokens + sizes.num_tokens
        # The last token of a block comes with the last demotions: it needs a plan.
        slots = -sizes.high_tokens % HIGH_RECORD_TOKENS
        self.free_slots = max(0, min(slots, block_tokens - 1 - sizes.num_tokens))

    def totals(self) -> TierTotals:
        """Totals of all blocks."""
        totals = replace(self.sealed)
        totals.count(self.planner, self.index, self.tail)
        return totals

    def grow(self, num_tokens: int) -> list[Growth]:
        """How the request takes tokens until it has ``num_tokens``: changes of its last blocks.

        Does not change the request.
        """
        if self._next is None or self._next[0] != num_tokens:
            self._next = num_tokens, self._grow(num_tokens)  # vLLM asks twice
        return self._next[1]

    def _grow(self, num_tokens: int) -> list[Growth]:
        planner, growths = self.planner, []
        index, sizes, count = self.index, self.tail, num_tokens - self.num_tokens
        while count:
            begins = sizes.num_tokens == planner.block_tokens
            if begins:
                index += 1
                sizes = planner.empty(index)
            joining = min(count, planner.block_tokens - sizes.num_tokens)
            step = planner.extend(index, sizes, joining)
            growths.append(Growth(index, sizes, step, begins))
            sizes, count = step.after, count - joining
        return growths

    def low_format(self, index: int) -> LowFormat:
        """Low format of a block."""
        return self.planner.form(index).low_format

    def table(self, index: int, sizes: TierSizes) -> BlockTable:
        """A block as workers read it."""
        pages = self.pages[index]
        ids = tuple(pages[i].block_id if i in pages else 0 for i in range(sizes.pages))
        return BlockTable(ids, sizes, self.low_format(index))
