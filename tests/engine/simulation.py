"""The real scheduler and block manager, with a shadow of the workers instead of a model."""

import json
from collections import Counter, deque
from pathlib import Path

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from mikv_vllm.config import RATIO_FIELD, CompressionConfig
from mikv_vllm.engine.scheduler import TieredScheduler
from mikv_vllm.engine.spec import TieredAttentionSpec
from mikv_vllm.engine.tiered_request import TierTotals

from .shadow_workers import ShadowWorkers, sampled_at

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
        self.pool = scheduler.kv_cache_manager.block_pool
        self.workers = ShadowWorkers(scheduler)
        self.tokens = self.workers.tokens
        self.in_flight: deque = deque()
        self.reports: dict[str, dict] = {}
        self.prefix_hits = 0
        """Tokens that vLLM counts as found in the prefix cache."""
        self.most_running = 0
        self.preemptions = 0
        self._hasher = get_request_block_hasher(scheduler.block_size, sha256)

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
        self.workers.add(request_id, prompt, hash((cache_salt, adapter)))
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
        self.in_flight.append((output, self.workers.execute(output)))
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
            pages = [page.block_id for block in own for page in block.pages]
            held = [page.block_id for page in tiers.req_to_blocks[request_id]]
            assert sorted(pages) == sorted(held)
            request = self.scheduler.requests[request_id]
            assert tiered.num_tokens == request.num_computed_tokens
            for index, block in enumerate(own[:-1]):
                assert block.is_full, f"block {index} is not full"
            for page in own[-1].pages:
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
