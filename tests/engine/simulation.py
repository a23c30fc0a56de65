"""The real scheduler and block manager against a shadow of the workers' memory.

No model runs: the shadow stores, for every slot of every native page, which prefix of tokens its
number would belong to, and for every tiered page, whose it is. Reads check what they find, so a
page that was given away, shared or overwritten too early shows at once.
"""

import json
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from mikv_vllm.config import RATIO_FIELD, CompressionConfig
from mikv_vllm.engine.scheduler import TieredScheduler
from mikv_vllm.engine.spec import TieredAttentionSpec
from mikv_vllm.engine.step_plan import TieredSchedulerOutput
from mikv_vllm.engine.tiered_request import TierTotals
from mikv_vllm.engine.worker_context import WorkerContext
from mikv_vllm.kernels.batch import HIGH, LOW, PAGES
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS

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
    block_size: int = 32,
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


class Simulation:
    """Runs requests through a scheduler, with ``depth`` steps in flight at most."""

    def __init__(self, scheduler: TieredScheduler, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.depth = depth
        self.pool = scheduler.kv_cache_manager.block_pool
        self.context = WorkerContext()
        self.memory: dict[int, object] = {}
        self.native_tables: dict[str, list[int]] = {}
        self.tokens: dict[str, list[int]] = {}
        self.in_flight: deque = deque()
        self.reports: dict[str, dict] = {}
        self.most_running = 0
        self._fingerprints: dict[str, list[int]] = {}
        self.preemptions = 0
        self.block_size = scheduler.block_size
        self._hasher = get_request_block_hasher(self.block_size, sha256)

    def add(self, request_id: str, prompt: list[int], max_tokens: int, ratio: float) -> None:
        params = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={RATIO_FIELD: ratio}
        )
        request = Request(request_id, prompt, params, None, block_hasher=self._hasher)
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
        self.in_flight.append((output, self._execute(output)))
        if len(self.in_flight) >= self.depth or not output.total_num_scheduled_tokens:
            self._process()

    def _process(self) -> None:
        output, result = self.in_flight.popleft()
        for outputs in self.scheduler.update_from_output(output, result).values():
            for one in outputs.outputs:
                if one.kv_transfer_params:
                    self.reports[one.request_id] = one.kv_transfer_params["kv_compression"]

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
        in_this_step = {page for step in plan.compress.values() for page in step.tiered_pages}
        for page in plan.zero:
            assert page not in self._tiered_pages() - in_this_step, "a tiered page was zeroed"
            self.memory[page] = {}
        tiers = self.context.tiers
        native = [r for r in scheduled if r not in tiers]
        for request_id in native:
            self._write_native(request_id, computed[request_id], scheduled[request_id])
        for request_id in native:
            self._read_native(request_id, computed[request_id] + scheduled[request_id])
        for request_id in native:
            if step := plan.compress.get(request_id):
                self._read_native(request_id, step.sizes.num_tokens)
                for page in step.tiered_pages:
                    self._check_private(page)
                    self.memory[page] = request_id
        for request_id, step in plan.extend.items():
            assert step.append.after.num_tokens == computed[request_id] + scheduled[request_id]
        for request_id, step in (plan.decode | plan.extend).items():
            assert step.before.num_tokens == computed[request_id]
            for page in step.new_pages:
                self._check_private(page)
                self.memory[page] = request_id
        tiered = [r for r in scheduled if r in tiers]
        rows, tables = tiers.rows(tiers.slots(tiered), np.zeros(len(tiered)))
        for request_id, row, table in zip(tiered, rows, tables, strict=True):
            num_tokens = row[HIGH] + LOW_RECORD_TOKENS * row[LOW]
            assert num_tokens == computed[request_id], "the worker's sizes are not the request's"
            assert scheduled[request_id] == 1 or request_id in plan.extend
            assert tiers.table(request_id).tolist() == table[: row[PAGES]].tolist()
            for page in tiers.table(request_id):
                assert self.memory[page] == request_id, "a tiered page was overwritten"
        self.context.end_step()
        sampled = []
        for request_id, count in scheduled.items():
            tokens = self.tokens[request_id]
            done = computed[request_id] + count >= len(tokens)
            sampled.append([len(tokens) % 997] if done else [])
            tokens.extend(sampled[-1])
        return ModelRunnerOutput(
            req_ids=list(scheduled),
            req_id_to_index={r: i for i, r in enumerate(scheduled)},
            sampled_token_ids=sampled,
        )

    def _check_private(self, page: int) -> None:
        block = self.pool.blocks[page]
        assert page != 0, "the null page is nobody's"
        assert block.ref_cnt == 1, "a page that others hold was written"
        assert block.block_hash is None, "a page in the prefix cache was written"

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
            prefixes.append(hash((prefixes[-1] if prefixes else 0, token)))
        return prefixes

    # What must hold after every step.

    def check_pages(self) -> None:
        """No page in two places, none leaked, tiers as large as the request."""
        held, store = self.scheduler.manager.req_to_blocks, self.scheduler.store
        holders = Counter(page.block_id for pages in held.values() for page in pages)
        for page, count in holders.items():
            assert self.pool.blocks[page].ref_cnt == count, f"page {page}: {count} holders"
        total = self.pool.num_gpu_blocks - 1
        assert len(holders) + self.pool.get_num_free_blocks() == total, "a page was leaked"
        for request_id, tiered in store.requests.items():
            pages = held[request_id]
            assert len(pages) == tiered.sizes.pages
            assert all(holders[page.block_id] == 1 for page in pages), "a tiered page is shared"
            request = self.scheduler.requests[request_id]
            assert tiered.sizes.num_tokens == request.num_computed_tokens
        totals = TierTotals()
        for tiered in store.requests.values():
            totals.count(tiered)
        assert totals == store.totals
