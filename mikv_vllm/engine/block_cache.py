"""The prefix cache of tiered blocks.

Sealed blocks and tails stay here when their requests end. Their pages have a hash, so vLLM's pool
keeps them as long as native pages of the prefix cache: a page without users is free, leaves in LRU
order, and loses its hash when it is allocated or when the prefix cache is reset. A block is found
while all its pages have its hash. vLLM's own map does not contain these hashes: native requests do
not find these pages, and KV events do not mention them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count, islice, takewhile

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from mikv_vllm.engine.tiered_request import Block, TieredRequest
from mikv_vllm.tiers.blocks import BlockForm, BlockPlanner, block_tokens

MOST_TAILS = 8
"""Tails that are kept for the same beginning."""
LEAST_BRANCH_TOKENS = 128
"""Tokens of the shortest block that is sealed at a branch."""
REMEMBERED_PAGES = 8
"""Native pages of tokens that are remembered for each page of the pool, to find branches."""


@dataclass(frozen=True)
class KeptTail:
    """The tail of a request that ended, and the tokens in it."""

    block: Block
    form: BlockForm
    """The one that it has when it is full."""
    tokens: tuple[int, ...]
    hashes: tuple[BlockHash, ...]
    """vLLM's hashes of the whole hash blocks in it."""
    droppable: int
    """Newest tokens that can be removed by count."""


@dataclass(frozen=True)
class Hit:
    """Blocks that a request can begin with."""

    sealed: list[Block]
    tail: Block | None
    """To copy. Its sizes are those after the tokens that differ are removed."""
    droppable: int
    """Newest tokens of the tail that can be removed by count."""
    num_tokens: int

    def blocks(self) -> list[Block]:
        """The blocks of a request that begins with them; its tail has no pages yet."""
        if self.tail is None:
            return list(self.sealed)
        return [*self.sealed, replace(self.tail, pages=[], users=0, tag=None)]

    @property
    def pages(self) -> list[KVCacheBlock]:
        """Pages of all blocks."""
        blocks = [*self.sealed, self.tail] if self.tail else self.sealed
        return [page for block in blocks for page in block.pages]


class BlockCache:
    """Finds sealed blocks by vLLM's hash of the tokens up to their end."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._blocks: dict[BlockHash, list[Block]] = {}
        self._tails: dict[BlockHash, list[KeptTail]] = {}
        self._kept: dict[int, Block] = {}
        self._next_hashes: dict[BlockHash, BlockHash | None] = {}
        self._serial = count()
        self.least_computed = 1
        """Newest tokens of a request that are not searched for, because a step computes them.

        With speculative decoding at least 2: vLLM fills the first step of a request with
        placeholders of drafts if it computes one token only.
        """
        self.num_kept = 0
        """Blocks that can be found and that no request holds."""

    def _hash(self, request: Request, num_tokens: int) -> BlockHash | None:
        """vLLM's hash of the first ``num_tokens`` tokens; None if it is not known yet."""
        index = num_tokens // self._pool.hash_block_size - 1
        return request.block_hashes[index] if index < len(request.block_hashes) else None

    def find(self, request: Request, planner: BlockPlanner) -> Hit:
        """The blocks that hold the longest beginning of a request.

        At least :attr:`least_computed` tokens are not found.

        Blocks of ``planner`` or richer ones.
        """
        sealed: list[Block] = []
        start, most = 0, request.num_tokens - self.least_computed
        while block := self.find_block(request, start, most, planner):
            sealed.append(block)
            start += block.capacity
        tail, droppable = self._find_tail(request, start, planner)
        num_tokens = start + (tail.sizes.num_tokens if tail else 0)
        return Hit(sealed, tail, droppable, num_tokens)

    def find_block(
        self, request: Request, start: int, most: int, planner: BlockPlanner
    ) -> Block | None:
        """The longest sealed block that begins at ``start`` and ends before ``most`` tokens.

        One that is as rich as the request's own block would be, or richer.
        """
        whole = start + planner.block_tokens
        longest = min(whole, most - most % self._block_size)
        for end in range(longest, start, -self._block_size):
            key = self._hash(request, end)
            for block in self._blocks.get(key, ()) if key else ():
                if block.start == start and block.is_cached and is_richer(block, planner):
                    return block
        return None

    def _find_tail(
        self, request: Request, start: int, planner: BlockPlanner
    ) -> tuple[Block | None, int]:
        """A kept tail that continues a request's sealed blocks, cut to the tokens in common.

        Returns:
            The tail, and how many more of its newest tokens can be removed.
        """
        key, form = self._tail_key(request, start), planner.tail_form(start)
        best: tuple[int, KeptTail] | None = None
        kept = [tail for tail in self._tails.get(key, ()) if tail.block.is_cached] if key else []
        for tail in kept:
            if tail.form != form:
                continue
            common = self._common_tokens(request, start, tail)
            if len(tail.tokens) - common > tail.droppable or not common:
                continue
            if best is None or common > best[0]:
                best = common, tail
        if best is None:
            return None, 0
        common, tail = best
        sizes = tail.block.sizes
        dropped = len(tail.tokens) - common
        sizes = replace(sizes, high_tokens=sizes.high_tokens - dropped)
        return replace(tail.block, sizes=sizes), tail.droppable - dropped

    def find_branch(self, request: Request, hit: Hit, window: int) -> int:
        """Tokens after which a request differs from earlier ones, where a block should be sealed.

        Args:
            hit: what the request found.
            window: last tokens of the request that have to be computed at once.

        Returns:
            A multiple of the tokens of a native page; 0 if such a block would save little.
        """
        step, hashes = self._pool.hash_block_size, request.block_hashes
        first = sum(block.capacity for block in hit.sealed)
        index = first // step
        while index < len(hashes) and hashes[index] in self._next_hashes:
            index += 1
        if not index or index * step < hit.num_tokens + LEAST_BRANCH_TOKENS:
            return 0
        if index < len(hashes) and self._next_hashes[hashes[index - 1]] is None:
            return 0  # The earlier request ended here: this one continues it.
        branch = min(index * step, request.num_tokens - window)
        branch -= branch % self._block_size
        is_short = (branch - first) % block_tokens(self._block_size) < LEAST_BRANCH_TOKENS
        return 0 if is_short or branch < hit.num_tokens + LEAST_BRANCH_TOKENS else branch

    def remember(self, request: Request) -> None:
        """Remember the tokens of a request that ends, to find branches of later ones."""
        hashes = request.block_hashes
        for key, following in zip(hashes, [*hashes[1:], None], strict=False):
            known = self._next_hashes.pop(key, None)
            self._next_hashes[key] = following or known
        most = REMEMBERED_PAGES * self._pool.num_gpu_blocks
        for key in [*islice(self._next_hashes, max(0, len(self._next_hashes) - most))]:
            del self._next_hashes[key]

    def _common_tokens(self, request: Request, first_token: int, tail: KeptTail) -> int:
        """Tokens of ``tail`` with which a request continues at ``first_token``."""
        most = min(len(tail.tokens), request.num_tokens - self.least_computed - first_token)
        tokens = request.all_token_ids[first_token : first_token + most]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, tail.tokens, strict=False))
        common = sum(1 for _ in same)
        if request.mm_features:
            # Placeholder tokens of different images are equal, their hashes are not.
            size = self._pool.hash_block_size
            first = first_token // size
            hashes = zip(request.block_hashes[first:], tail.hashes, strict=False)
            common = min(common, size * sum(1 for _ in takewhile(lambda p: p[0] == p[1], hashes)))
        return common

    def _tail_key(self, request: Request, start: int) -> BlockHash | None:
        """The hash of the tokens before a tail; of the first hash block if there are none.

        Either one includes the cache salt and the adapter.
        """
        return self._hash(request, start or self._pool.hash_block_size)

    def add_block(self, request: Request, block: Block) -> bool:
        """Add a sealed block if there is no equal one; False if its tokens have no hash yet."""
        key = self._hash(request, block.start + block.capacity)
        if key is None:
            return False
        known = [one for one in self._blocks.pop(key, ()) if one.is_cached]
        if not any(is_alike(one, block) for one in known):
            self._tag(block)
            known.append(block)
        self._blocks[key] = known
        if len(self._blocks) > 2 * self._pool.num_gpu_blocks:
            cached = {k: [b for b in blocks if b.is_cached] for k, blocks in self._blocks.items()}
            self._blocks = {k: blocks for k, blocks in cached.items() if blocks}
        return True

    def keep_tail(self, request: Request, tiered: TieredRequest, num_tokens: int) -> None:
        """Keep the tail of a request that ends.

        Args:
            num_tokens: tokens of the request that are known and computed; later ones are dropped.
        """
        tail = tiered.tail
        key, start = self._tail_key(request, tail.start), tail.start
        dropped = tiered.num_tokens - num_tokens
        droppable = tiered.droppable - dropped
        if key is None or droppable < 0 or start >= num_tokens:
            return
        sizes = replace(tail.sizes, high_tokens=tail.sizes.high_tokens - dropped)
        block = replace(tail, sizes=sizes, pages=list(tail.pages), users=0)
        self._tag(block)
        size = self._pool.hash_block_size
        hashes = request.block_hashes[start // size : num_tokens // size]
        tokens = tuple(request.all_token_ids[start:num_tokens])
        self.keep(block)
        kept = [one for one in self._tails.pop(key, ()) if one.block.is_cached]
        form = tiered.planner.tail_form(start)
        kept.append(KeptTail(block, form, tokens, tuple(hashes), droppable))
        for one in kept[:-MOST_TAILS]:
            self.hold(one.block)
        self._tails[key] = kept[-MOST_TAILS:]
        if len(self._tails) > self._pool.num_gpu_blocks:
            self._tails = {
                k: tails
                for k, tails in self._tails.items()
                if any(one.block.is_cached for one in tails)
            }

    # Blocks that no request holds.

    @property
    def num_kept_pages(self) -> int:
        """Pages of kept blocks."""
        return len(self._kept)

    def keep(self, block: Block) -> None:
        """Count a block that its last request releases, if it can be found."""
        if block.is_cached:
            self.num_kept += 1
            self._kept |= {page.block_id: block for page in block.pages}

    def hold(self, block: Block) -> None:
        """Stop counting a block: a request holds it, or it cannot be found any more."""
        pages = [page.block_id for page in block.pages]
        if self._kept.get(pages[0]) is block:
            self.num_kept -= 1
            for page in pages:
                del self._kept[page]

    def evict(self, pages: Iterable[int]) -> int:
        """Stop counting the blocks whose pages are allocated again; return how many there were."""
        before = self.num_kept
        for page in pages:
            if block := self._kept.get(page):
                self.hold(block)
        return before - self.num_kept

    def clear(self) -> None:
        """Forget all blocks. No page has a hash any more."""
        self._blocks.clear()
        self._tails.clear()
        self._kept.clear()
        self._next_hashes.clear()
        self.num_kept = 0

    def _tag(self, block: Block) -> None:
        block.tag = b"tiered block " + next(self._serial).to_bytes(8, "big")
        for page in block.pages:
            page.set_block_hash(block.tag)


def is_richer(block: Block, planner: BlockPlanner) -> bool:
    """Whether a block is as rich as a request's own one of the same tokens would be, or richer."""
    own = planner.block(block.start, block.capacity)
    return (
        block.low_format.token_bits >= own.low_format.token_bits
        and block.sizes.high_tokens >= own.sizes.high_tokens
    )


def is_alike(one: Block, other: Block) -> bool:
    """Whether two blocks of the same tokens have the same form."""
    return (one.start, one.sizes, one.low_format) == (other.start, other.sizes, other.low_format)
