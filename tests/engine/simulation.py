"""The real scheduler and block manager against a shadow of the workers' memory.

No model runs: the shadow stores, for every slot of every native page, which prefix of tokens its
number would belong to, and for every tiered page, whose it is. Reads check what they find, so a
page that was given away, shared or overwritten too early shows at once.
"""

import json
from collections import Counter, deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from mikv_vllm.config import RATIO_FIELD, CompressionConfig
from mikv_vllm.engine.scheduler import TieredScheduler
from mikv_vllm.engine.spec import TieredAttentionSpec
from mikv_vllm.engine.step_plan import TieredSchedulerOutput
from mikv_vllm.engine.tiered_request import TierTotals
from mikv_vllm.engine.worker_context import WorkerContext
from mikv_vllm.tiers.blocks import block_tokens
from mikv_vllm.tiers.formats import LowFormat

HEAD_DIM = 64
MAX_MODEL_LEN = 8192


def write_model_config(folder: Path) -> None:
    """A Llama without weights: schedulers read its configuration only."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "vocab_size": 1000,
        "max_position_embeddings": MAX_MODEL_LEN,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def engine_config(
    folder: Path,
    settings: CompressionConfig,
    block_size: int = 16,
    max_num_seqs: int = 6,
    batched_tokens: int = 192,
    **engine_args,
):
    """A ``VllmConfig`` for schedulers."""
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        max_model_len=MAX_MODEL_LEN,
        block_size=block_size,
        enable_prefix_caching=True,
        kv_cache_memory_bytes=1 << 20,
        additional_config=settings.to_additional_config(),
        **engine_args,
    ).create_engine_config()


def make_scheduler(
    vllm_config, settings: CompressionConfig, num_pages: int, async_scheduling: bool = False
) -> TieredScheduler:
    """A scheduler over a pool of ``num_pages`` pages, the null page not counted."""
    vllm_config.scheduler_config.async_scheduling = async_scheduling
    init_none_hash(sha256)
    block_size = vllm_config.cache_config.block_size
    spec = TieredAttentionSpec(
        block_size=block_size,
        num_kv_heads=1,
        head_size=HEAD_DIM,
        dtype=torch.bfloat16,
        compression=settings,
    )
    vllm_config.cache_config.num_gpu_blocks = num_pages + 1
    return TieredScheduler(
        vllm_config=vllm_config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_pages + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer.0", "layer.1"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(vllm_config),
        block_size=block_size,
        log_stats=True,
    )


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
    num_pages: int
    """Length of the stream."""


class Simulation:
    """Runs requests through a scheduler, with ``depth`` steps in flight at most.

    Args:
        drafts: drafts of a request in a step; some of them are wrong.
    """

    def __init__(self, scheduler: TieredScheduler, depth: int = 1, drafts: int = 0) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.drafts = scheduler.num_spec_tokens = drafts
        scheduler.store.cache.least_computed = 2 if drafts else 1
        self.accepted = self.rejected = 0
        """Drafts of compressed requests."""
        self.pool = scheduler.kv_cache_manager.block_pool
        self.context = WorkerContext()
        self.memory: dict[int, object] = {}
        self.native_tables: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.in_flight: deque = deque()
        self.reports: dict[str, dict] = {}
        self.prefix_hits = 0
        """Tokens that vLLM counts as found in the prefix cache."""
        self.most_running = 0
        self._fingerprints: dict[str, list[int]] = {}
        self._salts: dict[str, int] = {}
        self.preemptions = 0
        self.block_size = scheduler.block_size
        self.block_tokens = block_tokens(self.block_size)
        self.recent = scheduler.compression.recent
        self._hasher = get_request_block_hasher(self.block_size, sha256)

    def add(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        ratio: float,
        cache_salt: str | None = None,
        adapter: int | None = None,
    ) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={RATIO_FIELD: ratio}
        )
        request = Request(
            request_id,
            prompt,
            params,
            None,
            cache_salt=cache_salt,
            lora_request=LoRARequest(f"adapter {adapter}", adapter, "/") if adapter else None,
            block_hasher=self._hasher,
        )
        self._salts[request_id] = hash((cache_salt, adapter))
        self.tokens[request_id] = list(prompt)
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        """Schedule and execute one step; process the oldest step's output once enough are out."""
        output = self.scheduler.schedule()
        self.most_running = max(self.most_running, len(self.scheduler.running))
        self.preemptions += len(output.preempted_req_ids)
        self.check_pages()
        self.check_kept_blocks()
        self.in_flight.append((output, self._execute(output)))
        if len(self.in_flight) >= self.depth or not output.total_num_scheduled_tokens:
            self._process()

    def _process(self) -> None:
        output, result = self.in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            if outputs.scheduler_stats:
                self.prefix_hits += outputs.scheduler_stats.prefix_cache_stats.hits
            for one in outputs.outputs:
                if one.kv_transfer_params:
                    self.reports[one.request_id] = one.kv_transfer_params["kv_compression"]
        if self.drafts:
            running = [request.request_id for request in self.scheduler.running]
            drafts = [self._draft(request_id) for request_id in running]
            self.scheduler.update_draft_token_ids(DraftTokenIds(running, drafts))

    def _draft(self, request_id: str) -> list[int]:
        """What follows the tokens of a request, with mistakes."""
        first = len(self.tokens[request_id])
        positions = range(first, first + self.drafts)
        return [sampled_at(p) + (p % 11 in (4, 5)) for p in positions]

    def run(self, most_steps: int = 5000) -> None:
        """Step until nothing is left."""
        for _ in range(most_steps):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            if not self.scheduler.has_requests():
                self._process()
                continue
            self.step()
        raise AssertionError(f"still busy after {most_steps} steps")

    # What the workers would do.

    def _execute(self, output: TieredSchedulerOutput) -> ModelRunnerOutput:
        for request_id, verified in output.plan.verified.items():
            self._verify(request_id, verified)
        self._copy_pages(output.plan)
        self.context.begin_step(output)
        for new in output.scheduled_new_reqs:
            self.native_tables[new.req_id] = list(new.block_ids[0])
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        for request_id, blocks, count in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            computed[request_id] = count
            if request_id in cached.resumed_req_ids:
                self.native_tables[request_id] = list(blocks[0])
            elif blocks is not None:
                self.native_tables[request_id].extend(blocks[0])
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
            self.memory[page] = {}
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
        sources = {target: source for source, target in plan.copy}
        for blocks in plan.adopt.values():
            targets = [page for page in blocks[-1].pages if page in sources]
            contents = [self.memory[sources[page]] for page in targets]
            if contents:
                assert all(one is contents[0] for one in contents), "different blocks are mixed"
                assert isinstance(contents[0], Content), "a page that is no tail was copied"
                self.memory |= dict.fromkeys(targets, replace(contents[0]))
        for target in sources:
            # The first chunk of the request may have freed it again.
            assert self.pool.blocks[target].ref_cnt <= 1, "a page that others hold was written"

    def _content(self, block, new_pages=()) -> "Content":
        """The one content of a block's pages, but for those that are new in this step."""
        pages = [page for page in block.pages if page and page not in new_pages]
        contents = {id(self.memory[page]): self.memory[page] for page in pages}
        assert len(contents) == 1, "pages of different blocks are mixed"
        (content,) = contents.values()
        assert isinstance(content, Content), "a tiered page was overwritten"
        assert (content.low_format, content.num_pages) == (block.low_format, block.sizes.pages)
        return content

    def _reuse(self, request_id: str, start: int, block) -> "Content":
        """The content of a block that a request did not write, and that is as rich as its own."""
        planner = self.scheduler.store.planner(request_id)
        own = planner.tail(start, block.sizes.num_tokens)
        bits = planner.form(start).low_format.token_bits
        assert block.low_format.token_bits >= bits, "a poorer block was found"
        assert block.sizes.pages >= own.pages, "a poorer block was found"
        return self._content(block)

    def _adopt(self, request_id: str, blocks) -> None:
        first = 0
        for block in blocks:
            content, count = self._reuse(request_id, first, block), block.sizes.num_tokens
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
            recent = min(self.recent, block.sizes.high_tokens)
            high = recent if block.sizes.low_records else count
            high = high if block is step.blocks[-1] else 0
            content = Content(tokens, high, block.low_format, block.sizes.pages)
            for page in filter(None, block.pages):
                assert page not in native or page in free_native, "tokens to come were overwritten"
                self._check_private(page, request_id, sharers[page])
                self.memory[page] = content

    def _grow(self, request_id: str, first: int, count: int, changes, is_decode: bool) -> None:
        blocks = self.context.tiers.blocks(request_id)
        if not changes:
            self._append(blocks[-1], request_id, first, count)
            return
        tables = [list(block.pages) for block in blocks]
        if is_decode and changes[0].begins:
            tables.pop()  # of the new block
        new_pages = {page for change in changes for page in change.new_pages}
        contents = [
            self._content(block, new_pages) for block, _ in zip(blocks, tables, strict=False)
        ]
        for change in changes:
            joining = change.append.new_tokens
            if change.begins:
                tiered = self.scheduler.store.requests[request_id]
                assert first in {block.start for block in tiered.blocks}, "a tail was left"
                tables.append([0] * change.before.pages)
                contents.append(Content((), 0, change.low_format, change.before.pages))
            content, table = contents[-1], tables[-1]
            assert len(content.tokens) == change.before.num_tokens
            for position, page in zip(change.append.new_positions, change.new_pages, strict=True):
                self._check_private(page, request_id)
                assert table[position] in {0, page}, "a page was replaced"
                table[position] = page
                self.memory[page] = content
            self._append_tokens(content, request_id, first, joining, change.append, is_decode)
            first += joining

    def _append(self, block, request_id: str, first: int, count: int) -> None:
        for page in filter(None, block.pages):
            self._check_private(page, request_id)
        self._append_tokens(self._content(block), request_id, first, count, None, True)

    def _append_tokens(
        self, content, request_id: str, first: int, count: int, step, is_decode: bool
    ) -> None:
        tokens = tuple(self._prefixes(request_id, first + count)[first : first + count])
        content.tokens += tokens
        assert len(content.tokens) <= self.block_tokens, "a sealed block was written"
        if step and step.demoted_records:
            # A decode step demotes before the new token and its drafts join.
            recent = self.recent + count if is_decode else self.recent
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
            slots = self.memory.get(page)
            if not isinstance(slots, dict):
                assert page in own or page not in self._tiered_pages(), "a tiered page was written"
                end = (position // self.block_size + 1) * self.block_size
                assert slots is None or end <= start + count, "a tier's bytes stay in a native page"
                slots = self.memory[page] = {}
            slots[slot] = prefixes[position]

    def _tiered_pages(self) -> set[int]:
        held = self.scheduler.manager.req_to_blocks
        return {page.block_id for r in self.scheduler.store.requests for page in held[r]}

    def _read_native(self, request_id: str, count: int) -> None:
        prefixes = self._prefixes(request_id, count)
        for position in range(count):
            page, slot = self._slot(request_id, position)
            slots = self.memory[page]
            assert isinstance(slots, dict), "a native page was overwritten by a tier"
            assert slots[slot] == prefixes[position], "a native page was overwritten"

    def _slot(self, request_id: str, position: int) -> tuple[int, int]:
        index, slot = divmod(position, self.block_size)
        return self.native_tables[request_id][index], slot

    def _prefixes(self, request_id: str, count: int) -> list[int]:
        """A fingerprint of the first ``i + 1`` tokens for each ``i`` below ``count``."""
        prefixes = self._fingerprints.setdefault(request_id, [])
        for token in self.tokens[request_id][len(prefixes) : count]:
            prefixes.append(hash((prefixes[-1] if prefixes else self._salts[request_id], token)))
        return prefixes

    # What must hold after every step.

    def check_pages(self) -> None:
        """No page in two places, none leaked, blocks as large as their requests."""
        tiers, store = self.scheduler.manager, self.scheduler.store
        holders = Counter(
            block.block_id for blocks in tiers.req_to_blocks.values() for block in blocks
        )
        for page, count in holders.items():
            assert self.pool.blocks[page].ref_cnt == count, f"page {page}: {count} holders"
        total = self.pool.num_gpu_blocks - 1
        assert len(holders) + self.pool.get_num_free_blocks() == total, "a page was leaked"
        blocks = {}
        for request_id, tiered in store.requests.items():
            own = tiered.all_blocks()
            blocks |= {id(block): block for block in own}
            pages = [page.block_id for block in own for page in block.pages.values()]
            held = [page.block_id for page in tiers.req_to_blocks[request_id]]
            assert sorted(pages) == sorted(held)
            request = self.scheduler.requests[request_id]
            assert tiered.num_tokens == request.num_computed_tokens
            for index, block in enumerate(own[:-1]):
                assert block.is_full, f"block {index} is not full"
            for page in own[-1].pages.values():
                if own[-1].tag is None:
                    assert holders[page.block_id] == 1, "a tail is shared"
        totals = TierTotals()
        for block in blocks.values():
            totals.count(store.geometry, block)
        assert totals == store.totals

    def check_kept_blocks(self) -> None:
        """The blocks that nobody holds and that the prefix cache finds are counted."""
        cache = self.scheduler.store.cache
        findable = [block for blocks in cache._blocks.values() for block in blocks]
        findable += [tail.block for tails in cache._tails.values() for tail in tails]
        kept = [block for block in findable if block.is_cached and not block.users]
        assert cache.num_kept == len(kept), "kept blocks are miscounted"
