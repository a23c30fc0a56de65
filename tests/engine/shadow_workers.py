"""A shadow of the workers' memory, which executes plans without a model.

It stores, for every slot of every native page, which prefix of tokens its number would belong to,
and for every tiered page, which block it is in. Reads check what they find, so a page that was
given away, shared or overwritten too early shows at once.
"""

from collections import Counter
from dataclasses import dataclass, replace

from vllm.v1.outputs import ModelRunnerOutput

from mikv_vllm.engine.scheduler import TieredScheduler
from mikv_vllm.engine.step_plan import TieredSchedulerOutput
from mikv_vllm.engine.worker_context import WorkerContext
from mikv_vllm.tiers.blocks import block_tokens
from mikv_vllm.tiers.formats import LowFormat


def sampled_at(position: int) -> int:
    """The token that every request samples at this position."""
    return position % 997


@dataclass
class Content:
    """What the pages of one block hold."""

    tokens: tuple[int, ...]
    """Fingerprints of the tokens and of all before them."""
    surely_high: int
    """Newest tokens that are certainly the last ones of the high tier."""
    low_format: LowFormat


class ShadowWorkers:
    """What the workers would do in each step.

    Args:
        scheduler: of the plans.
    """

    def __init__(self, scheduler: TieredScheduler) -> None:
        self.scheduler = scheduler
        self.pool = scheduler.kv_cache_manager.block_pool
        self.context = WorkerContext()
        self.accepted = self.rejected = 0
        """Drafts of compressed requests."""
        self.tokens: dict[str, list[int]] = {}
        """Known tokens of each request."""
        self.block_size = scheduler.block_size
        self._block_tokens = block_tokens(self.block_size)
        self._recent = scheduler.compression.recent
        self._memory: dict[int, object] = {}
        self._native_tables: dict[str, list[int]] = {}
        self._fingerprints: dict[str, list[int]] = {}
        self._salts: dict[str, int] = {}
        self._copied_from: dict[int, int] = {}
        """Source of each page that the step copies."""

    def add(self, request_id: str, prompt: list[int], salt: int) -> None:
        """Remember the tokens of a request, whose fingerprints begin with ``salt``."""
        self.tokens[request_id] = list(prompt)
        self._salts[request_id] = salt

    def execute(self, output: TieredSchedulerOutput) -> ModelRunnerOutput:
        """Execute a step; every request whose tokens are all computed samples a token."""
        for request_id, verified in output.plan.verified.items():
            self._verify(request_id, verified)
        self._copy_pages(output.plan)
        self.context.begin_step(output)
        for new in output.scheduled_new_reqs:
            self._native_tables[new.req_id] = list(new.block_ids[0])
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for request_id, blocks, count in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = count
            if request_id in cached.resumed_req_ids:
                self._native_tables[request_id] = list(blocks[0])
            elif blocks is not None:
                self._native_tables[request_id].extend(blocks[0])
        plan, scheduled = output.plan, output.num_scheduled_tokens
        in_this_step = {
            page
            for step in plan.compress.values()
            for i, block in enumerate(step.blocks)
            for page in block.pages
            if i not in step.shared
        }
        for page in plan.zero:
            assert page not in self._tiered_pages() - in_this_step, "a tiered page was zeroed"
            self._memory[page] = {}
        tiers = self.context.tiers
        drafts, known = output.scheduled_spec_decode_tokens, {}
        for request_id in scheduled:
            known[request_id] = len(self.tokens[request_id])
            self.tokens[request_id] += drafts.get(request_id, ())
        for request_id, blocks in plan.adopt.items():
            assert sum(block.sizes.num_tokens for block in blocks) == computed[request_id]
            self._adopt(request_id, blocks)
        native = [r for r in scheduled if r not in tiers]
        for request_id in native:
            self._write_native(request_id, computed[request_id], scheduled[request_id])
        for request_id in native:
            self._read_native(request_id, computed[request_id] + scheduled[request_id])
        # Later requests may share the blocks that earlier ones write in this step.
        sharers = Counter(
            page
            for step in plan.compress.values()
            for index in step.shared
            for page in step.blocks[index].pages
        )
        for request_id, step in plan.compress.items():
            self._compress(request_id, step, sharers)
        for request_id in scheduled:
            if request_id in tiers:
                step = plan.extend.get(request_id)
                if step:
                    assert step.num_tokens == scheduled[request_id]
                    assert step.first_token == computed[request_id]
                else:
                    assert scheduled[request_id] == 1 + len(drafts.get(request_id, ()))
                changes = step.changes if step else ()
                if request_id in plan.decode:
                    changes = (plan.decode[request_id],)
                new = computed[request_id], scheduled[request_id]
                self._grow(request_id, *new, changes, is_decode=step is None)
        self.context.end_step()
        for request_id in scheduled:
            if request_id in tiers:
                self._read_blocks(request_id, computed[request_id] + scheduled[request_id])
        sampled = []
        for request_id, count in scheduled.items():
            tokens, first = self.tokens[request_id], known[request_id]
            sampled.append([])
            if computed[request_id] + count < first:
                continue
            drafted = tokens[first:]
            for i in range(len(drafted) + 1):
                sampled[-1].append(sampled_at(first + i))
                if drafted[i : i + 1] != sampled[-1][-1:]:
                    break
            tokens[first:] = sampled[-1]
            if drafted:
                del self._prefixes(request_id, 0)[first + len(sampled[-1]) - 1 :]
        return ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={r: i for i, r in enumerate(scheduled)},
            sampled_token_ids=sampled,
        )

    def _verify(self, request_id: str, verified) -> None:
        """The rejected drafts of the step before leave the tail."""
        self.accepted += verified.accepted
        self.rejected += verified.rejected
        content = self._content(self.context.tiers.blocks(request_id)[-1])
        if verified.rejected:
            assert verified.rejected <= content.surely_high, "a draft was demoted"
            content.tokens = content.tokens[: -verified.rejected]
            content.surely_high -= verified.rejected

    def _copy_pages(self, plan) -> None:
        sources = self._copied_from = {target: source for source, target in plan.copy}
        assert len(sources) == len(plan.copy), "two pages are copied to one"
        # Workers read all sources before they write.
        assert not sources.keys() & set(sources.values()), "a copy of this step is copied"
        for blocks in plan.adopt.values():
            targets = [page for page in blocks[-1].pages if page in sources]
            contents = [self._memory[sources[page]] for page in targets]
            if contents:
                assert all(one is contents[0] for one in contents), "different blocks are mixed"
                assert isinstance(contents[0], Content), "a page that is no tail was copied"
                self._memory |= dict.fromkeys(targets, replace(contents[0]))
        for target in sources:
            # The first chunk of the request may have freed it again.
            assert self.pool.blocks[target].ref_cnt <= 1, "a page that others hold was written"

    def _content(self, block, new_pages=()) -> Content:
        """The one content of a block's pages, but for those that are new in this step."""
        pages = [page for page in block.pages if page not in new_pages]
        contents = {id(self._memory[page]): self._memory[page] for page in pages}
        assert len(contents) == 1, "pages of different blocks are mixed"
        (content,) = contents.values()
        assert isinstance(content, Content), "a tiered page was overwritten"
        assert content.low_format == block.low_format
        return content

    def _reuse(self, request_id: str, start: int, block, is_tail: bool = False) -> Content:
        """The content of a block that a request did not write, and that is as rich as its own.

        A tail that grew token by token may have fewer high tokens than one that is written at once.
        """
        planner = self.scheduler.store.planner(request_id)
        own = planner.block(start, block.sizes.num_tokens)
        bits = own.low_format.token_bits
        assert block.low_format.token_bits >= bits, "a poorer block was found"
        high_tokens = own.sizes.high_tokens
        assert is_tail or block.sizes.high_tokens >= high_tokens, "a poorer block was found"
        return self._content(block)

    def _adopt(self, request_id: str, blocks) -> None:
        first = 0
        for block in blocks:
            content = self._reuse(request_id, first, block, is_tail=block is blocks[-1])
            count = block.sizes.num_tokens
            expected = tuple(self._prefixes(request_id, first + count)[first : first + count])
            if len(content.tokens) != count:
                dropped = len(content.tokens) - count
                assert block is blocks[-1], "tokens of a sealed block were dropped"
                assert 0 < dropped <= content.surely_high, "a token was dropped that may be low"
                content.tokens = content.tokens[:count]
                content.surely_high -= dropped
            assert content.tokens == expected, "a block with other tokens was found"
            first += count

    def _compress(self, request_id: str, step, sharers: Counter[int]) -> None:
        self._read_native(request_id, step.num_tokens)
        prefixes = self._prefixes(request_id, step.num_tokens)
        native = [*step.native_pages]
        first, free_native = 0, set()
        for index, block in enumerate(step.blocks):
            count = block.sizes.num_tokens
            tokens = tuple(prefixes[first : first + count])
            free_native |= {*native[first // self.block_size : (first + count) // self.block_size]}
            if block is step.blocks[-1]:
                free_native |= {*native[first // self.block_size :]}
            first += count
            if index in step.shared:
                content = self._reuse(request_id, first - count, block)
                assert content.tokens == tokens, "a shared block has other tokens"
                continue
            recent = min(self._recent, block.sizes.high_tokens)
            high = recent if block.sizes.low_records else count
            high = high if block is step.blocks[-1] else 0
            content = Content(tokens, high, block.low_format)
            for page in block.pages:
                assert page not in native or page in free_native, "tokens to come were overwritten"
                self._check_private(page, request_id, sharers[page])
                self._memory[page] = content

    def _grow(self, request_id: str, first: int, count: int, changes, is_decode: bool) -> None:
        blocks = self.context.tiers.blocks(request_id)
        if not changes:
            self._append(blocks[-1], request_id, first, count)
            return
        new_pages = {page for change in changes for page in change.new_pages}
        tables = [[page for page in block.pages if page not in new_pages] for block in blocks]
        if is_decode and changes[0].begins:
            tables.pop()  # of the new block
        contents = [
            self._content(block, new_pages) for block, _ in zip(blocks, tables, strict=False)
        ]
        for change in changes:
            joining = change.append.new_tokens
            if change.begins:
                tiered = self.scheduler.store.requests[request_id]
                assert first in {block.start for block in tiered.blocks}, "a tail was left"
                tables.append([])
                contents.append(Content((), 0, change.low_format))
            content = contents[-1]
            assert len(content.tokens) == change.before.num_tokens
            for page in change.new_pages:
                self._check_private(page, request_id)
                self._memory[page] = content
            if change.new_pages and not change.begins and (is_decode or not change.sealed):
                self._check_split(tables[-1], change)
            tables[-1] = change.append.insert(tables[-1], change.new_pages)
            self._append_tokens(content, request_id, first, joining, change.append, is_decode)
            first += joining
            if change.sealed:
                self._seal(content, tables[-1], change.sealed, request_id)
            else:
                assert len(tables[-1]) == change.append.after.pages
        if is_decode:
            assert tables[-1] == list(blocks[-1].pages), "the worker has other pages"

    def _seal(self, content: Content, table: list[int], block, request_id: str) -> None:
        """A full block is written anew, and leaves pages."""
        for page in block.pages:
            self._check_private(page, request_id)
        assert table[: len(block.pages)] == list(block.pages), "the header is in another page"
        assert len(block.pages) == block.sizes.pages
        for page in table[len(block.pages) :]:
            self._memory[page] = {}
        content.low_format, content.surely_high = block.low_format, 0

    def _check_split(self, table: list[int], change) -> None:
        """New pages come between the tiers; a page that has both was copied."""
        geometry, before = self.scheduler.store.geometry, change.before
        low_bytes = before.low_records * geometry.low(change.low_format).num_bytes
        low_begin = len(table) * geometry.page_bytes - low_bytes
        high_end = geometry.high_bytes(before.high_tokens)
        first = change.append.new_positions[0]
        end = first * geometry.page_bytes
        assert high_end <= end, "high tokens are behind a new page"
        source = self._copied_from.get(change.new_pages[-1])
        if low_bytes and low_begin < end:
            assert low_begin >= end - geometry.page_bytes, "low records are before a new page"
            page = table[first - 1]
            # The page can be a copy of this step itself.
            original = self._copied_from.get(page, page)
            assert source == original, "low records are in the wrong page"
        else:
            assert source is None, "a page was copied that has one tier"

    def _append(self, block, request_id: str, first: int, count: int) -> None:
        for page in block.pages:
            self._check_private(page, request_id)
        self._append_tokens(self._content(block), request_id, first, count, None, True)

    def _append_tokens(
        self, content, request_id: str, first: int, count: int, step, is_decode: bool
    ) -> None:
        tokens = tuple(self._prefixes(request_id, first + count)[first : first + count])
        content.tokens += tokens
        assert len(content.tokens) <= self._block_tokens, "a sealed block was written"
        if step and step.demoted_records:
            # A decode step demotes before the new token and its drafts join.
            recent = self._recent + count if is_decode else self._recent
            content.surely_high = min(step.after.high_tokens, recent)
        else:
            content.surely_high += count

    def _read_blocks(self, request_id: str, count: int) -> None:
        prefixes, first = self._prefixes(request_id, count), 0
        for block in self.context.tiers.blocks(request_id):
            content = self._content(block)
            size = len(content.tokens)
            assert size == block.sizes.num_tokens, "the worker's sizes are not the block's"
            assert content.tokens == tuple(prefixes[first : first + size]), "a block was replaced"
            first += size
        assert first == count

    def _check_private(self, page: int, request_id: str, sharers: int = 0) -> None:
        block = self.pool.blocks[page]
        assert page != 0, "the null page was written"
        assert block.ref_cnt == 1 + sharers, "a page that others hold was written"
        # A block is put into the prefix cache in the step that fills it.
        tiered = self.scheduler.store.requests[request_id]
        own = {one.tag for one in tiered.blocks}
        assert block.block_hash in {None, *own}, "a page in the prefix cache was written"

    def _write_native(self, request_id: str, start: int, count: int) -> None:
        prefixes = self._prefixes(request_id, start + count)
        # A request that is compressed in this step has given its native pages back already.
        own = {b.block_id for b in self.scheduler.manager.req_to_blocks.get(request_id, ())}
        for position in range(start, start + count):
            page, slot = self._slot(request_id, position)
            slots = self._memory.get(page)
            if not isinstance(slots, dict):
                assert page in own or page not in self._tiered_pages(), "a tiered page was written"
                end = (position // self.block_size + 1) * self.block_size
                assert slots is None or end <= start + count, "a tier's bytes stay in a native page"
                slots = self._memory[page] = {}
            slots[slot] = prefixes[position]

    def _tiered_pages(self) -> set[int]:
        held = self.scheduler.manager.req_to_blocks
        return {page.block_id for r in self.scheduler.store.requests for page in held[r]}

    def _read_native(self, request_id: str, count: int) -> None:
        prefixes = self._prefixes(request_id, count)
        for position in range(count):
            page, slot = self._slot(request_id, position)
            slots = self._memory[page]
            assert isinstance(slots, dict), "a native page was overwritten by a tier"
            assert slots[slot] == prefixes[position], "a native page was overwritten"

    def _slot(self, request_id: str, position: int) -> tuple[int, int]:
        index, slot = divmod(position, self.block_size)
        return self._native_tables[request_id][index], slot

    def _prefixes(self, request_id: str, count: int) -> list[int]:
        """A fingerprint of the first ``i + 1`` tokens for each ``i`` below ``count``."""
        prefixes = self._fingerprints.setdefault(request_id, [])
        for token in self.tokens[request_id][len(prefixes) : count]:
            prefixes.append(hash((prefixes[-1] if prefixes else self._salts[request_id], token)))
        return prefixes
