"""The prefix cache of tiered blocks.

Sealed blocks and tails stay here when their requests end. Their pages have a hash, so vLLM's pool
keeps them as long as native pages of the prefix cache: a page without users is free, leaves in LRU
order, and loses its hash when it is allocated or when the prefix cache is reset. A block is found
while all its pages have its hash. vLLM's own map does not contain these hashes: native requests do
not find these pages, and KV events do not mention them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from mikv_vllm.engine.tiered_request import Block, TieredRequest
from mikv_vllm.tiers.blocks import BlockForm, BlockPlanner

MOST_TAILS = 8
"""Tails that are kept for the same beginning."""


@dataclass(frozen=True)
class KeptTail:
    """The tail of a request that ended, and the tokens in it."""

    block: Block
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
        return [*self.sealed, Block(self.tail.sizes, self.tail.low_format)]

    @property
    def pages(self) -> list[KVCacheBlock]:
        """Pages of all blocks."""
        blocks = [*self.sealed, self.tail] if self.tail else self.sealed
        return [page for block in blocks for page in block.page_list]


class BlockCache:
    """Finds sealed blocks by vLLM's hash of the tokens up to their end, and by their form."""

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._blocks: dict[tuple[BlockHash, BlockForm], Block] = {}
        self._forms: dict[BlockForm, None] = {}
        self._tails: dict[BlockHash, list[KeptTail]] = {}
        self._kept: dict[int, Block] = {}
        self._serial = count()
        self.num_kept = 0
        """Blocks that can be found and that no request holds."""

    def _hash(self, request: Request, num_tokens: int) -> BlockHash | None:
        """vLLM's hash of the first ``num_tokens`` tokens; None if it is not known yet."""
        index = num_tokens // self._pool.hash_block_size - 1
        return request.block_hashes[index] if index < len(request.block_hashes) else None

    def find(self, request: Request, planner: BlockPlanner) -> Hit:
        """The blocks that hold the longest beginning of a request, all tokens but one at most.

        Blocks of ``planner`` or richer ones.
        """
        sealed: list[Block] = []
        most = request.num_tokens - 1
        while (len(sealed) + 1) * self._block_tokens <= most:
            block = self.find_block(request, len(sealed), planner)
            if block is None:
                break
            sealed.append(block)
        first_token = len(sealed) * self._block_tokens
        tail, droppable = self._find_tail(request, len(sealed), planner)
        num_tokens = first_token + (tail.sizes.num_tokens if tail else 0)
        return Hit(sealed, tail, droppable, num_tokens)

    def find_block(self, request: Request, index: int, planner: BlockPlanner) -> Block | None:
        """The sealed block at ``index`` of a request, of its form or a richer one."""
        key = self._hash(request, (index + 1) * self._block_tokens)
        if key is None:
            return None
        own = planner.form(index)
        for form in (own, *self._richer(own)):
            block = self._blocks.get((key, form))
            if block is None:
                continue
            if block.is_cached:
                return block
            del self._blocks[key, form]
        return None

    def _richer(self, own: BlockForm) -> Iterator[BlockForm]:
        for form in self._forms:
            if (
                form != own
                and form.sizes.pages >= own.sizes.pages
                and form.low_format.token_bits >= own.low_format.token_bits
                and form.sizes.high_tokens >= own.sizes.high_tokens
            ):
                yield form

    def _find_tail(
        self, request: Request, index: int, planner: BlockPlanner
    ) -> tuple[Block | None, int]:
        """A kept tail that continues a request's sealed blocks, cut to the tokens in common.

        Returns:
            The tail, and how many more of its newest tokens can be removed.
        """
        key = self._tail_key(request, index)
        first_token = index * self._block_tokens
        form = planner.form(index)
        best: tuple[int, KeptTail] | None = None
        kept = [tail for tail in self._tails.get(key, ()) if tail.block.is_cached] if key else []
        for tail in kept:
            block = tail.block
            if (block.low_format, block.sizes.pages) != (form.low_format, form.sizes.pages):
                continue
            common = self._common_tokens(request, first_token, tail)
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
        pages = {i: tail.block.pages[i] for i in planner.positions(index, sizes)}
        return replace(tail.block, sizes=sizes, pages=pages), tail.droppable - dropped

    def _common_tokens(self, request: Request, first_token: int, tail: KeptTail) -> int:
        """Tokens of ``tail`` with which a request continues at ``first_token``."""
        most = min(len(tail.tokens), request.num_tokens - 1 - first_token)
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

    def _tail_key(self, request: Request, index: int) -> BlockHash | None:
        """The hash of the tokens before a tail; of the first hash block if there are none.

        Either one includes the cache salt and the adapter.
        """
        return self._hash(request, index * self._block_tokens or self._pool.hash_block_size)

    def add_block(self, request: Request, index: int, block: Block) -> bool:
        """Add a sealed block if there is no equal one; False if its tokens have no hash yet."""
        key = self._hash(request, (index + 1) * self._block_tokens)
        if key is None:
            return False
        form = BlockForm(block.low_format, block.sizes)
        known = self._blocks.get((key, form))
        if known and known.is_cached:
            return True
        self._tag(block)
        self._forms[form] = None
        self._blocks[key, form] = block
        if len(self._blocks) > 2 * self._pool.num_gpu_blocks:
            self._blocks = {k: b for k, b in self._blocks.items() if b.is_cached}
        return True

    def keep_tail(self, request: Request, tiered: TieredRequest, num_tokens: int) -> None:
        """Keep the tail of a request that ends.

        Args:
            num_tokens: tokens of the request that are known and computed; later ones are dropped.
        """
        key, tail = self._tail_key(request, tiered.index), tiered.tail
        dropped = tiered.num_tokens - num_tokens
        droppable = tiered.droppable - dropped
        if key is None or droppable < 0 or tiered.first_token >= num_tokens:
            return
        sizes = replace(tail.sizes, high_tokens=tail.sizes.high_tokens - dropped)
        block = Block(sizes, tail.low_format, dict(tail.pages))
        self._tag(block)
        size = self._pool.hash_block_size
        hashes = request.block_hashes[tiered.first_token // size : num_tokens // size]
        tokens = tuple(request.all_token_ids[tiered.first_token : num_tokens])
        self.keep(block)
        kept = [one for one in self._tails.pop(key, ()) if one.block.is_cached]
        kept.append(KeptTail(block, tokens, tuple(hashes), droppable))
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

    def keep(self, block: Block) -> None:
        """Count a block that its last request releases, if it can be found."""
        if block.is_cached:
            self.num_kept += 1
            self._kept |= {page.block_id: block for page in block.pages.values()}

    def hold(self, block: Block) -> None:
        """Stop counting a block: a request holds it, or it cannot be found any more."""
        pages = [page.block_id for page in block.pages.values()]
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
        self.num_kept = 0

    def _tag(self, block: Block) -> None:
        block.tag = b"tiered block " + next(self._serial).to_bytes(8, "big")
        for page in block.pages.values():
            page.set_block_hash(block.tag)
