"""The scheduler: vLLM's own, plus one plan a step."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from mikv_vllm.config import (
    ADDITIONAL_CONFIG_KEY,
    RATIO_FIELD,
    REPORT_FIELD,
    CompressionConfig,
    RatioError,
    parse_ratio,
)
from mikv_vllm.engine.block_manager import TieredBlockManager
from mikv_vllm.engine.step_plan import (
    CompressStep,
    DecodeStep,
    ExtendStep,
    ScoreStep,
    StepPlan,
    TieredSchedulerOutput,
    TierStats,
)
from mikv_vllm.engine.tiered_request import TierTotals
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS
from mikv_vllm.tiers.plan import largest_ratio

logger = init_logger(__name__)


class TieredScheduler(Scheduler):
    """Schedules as vLLM does, then plans which requests to score, compress and demote.

    Compression is planned in the step that computes a prompt's last token, or, for a request that
    was too short then, in the decode step in which it first saves a page.

    With async scheduling an instance is a :class:`TieredAsyncScheduler`, as in vLLM.
    """

    def __new__(cls, vllm_config: VllmConfig, *args, **kwargs) -> "TieredScheduler":
        """Choose as vLLM does between its own two where no class is given."""
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(TieredAsyncScheduler if is_async else cls)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = CompressionConfig.from_additional_config(self.vllm_config.additional_config)
        assert config is not None, (
            f"TieredScheduler needs additional_config[{ADDITIONAL_CONFIG_KEY!r}]"
        )
        self.compression = config
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.tiers = self._only_tiered(managers)
        for manager in managers:
            if manager is not self.tiers:
                self.tiers.wrap_other_manager(manager)
        spec = self.tiers.kv_cache_spec
        self.largest_ratio = largest_ratio(
            self.tiers.geometry.head_dim, config.high_bits, config.ladder
        )
        self._heads = spec.num_layers * spec.num_kv_heads
        self._heads *= self.parallel_config.tensor_parallel_size
        share = int(config.native_share * (self.kv_cache_config.num_blocks - 1))
        least = config.min_tokens + config.window
        self.tiers.native_limit = max(share, -(-least // self.block_size)) * self.block_size
        if len(managers) == 1:
            self._allocate_slots = self.kv_cache_manager.allocate_slots
            self.kv_cache_manager.allocate_slots = self._take_slots
        self._scoring: set[str] = set()
        self._with_stop_strings: set[str] = set()
        self._stats: TierStats | None = None
        """Of this step, until a request leaves."""

    def _only_tiered(self, managers: Sequence[SingleTypeKVCacheManager]) -> TieredBlockManager:
        """The manager of the one cache group that has tiers.

        Raises:
            ValueError: there is none, or several, or its pages are not as the kernels need them.
        """
        tiered = [m for m in managers if isinstance(m, TieredBlockManager)]
        if not tiered:
            why = "it has no 16-bit full-attention layer of a head size that MiKV supports"
        elif len(tiered) > 1:
            why = f"vLLM puts its full-attention layers into {len(tiered)} cache groups"
        elif (
            tiered[0].block_size != self.cache_config.block_size
            or tiered[0].kv_cache_spec.page_size_padded is not None
        ):
            why = "its other layers have larger pages than its full-attention layers"
        else:
            return tiered[0]
        raise ValueError(
            f"--model {self.vllm_config.model_config.model} is not supported by MiKV ({why}); "
            "serve it with `vllm serve`."
        )

    # Requests come and go.

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        ratio = self._requested_ratio(request)
        if ratio > 1.0:
            self.tiers.ratios[request.request_id] = ratio
        if request.sampling_params and request.sampling_params.stop:
            self._with_stop_strings.add(request.request_id)

    def _requested_ratio(self, request: Request) -> float:
        # A resumable request gets new prompt tokens later; they need native pages.
        if request.sampling_params is None or request.resumable:
            return 1.0
        value = (request.sampling_params.extra_args or {}).get(RATIO_FIELD)
        if value is None:
            return self.compression.ratio
        try:
            return parse_ratio(value, self.largest_ratio)
        except RatioError as error:
            # The front ends answer this with an error; here it would stop the engine.
            logger.warning("request %s stays uncompressed: %s", request.request_id, error)
            return 1.0

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        report, self._stats = self._report(request), None
        self.tiers.keep(request, request.num_computed_tokens)
        _, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        self.tiers.ratios.pop(request.request_id, None)
        self.tiers.hits.pop(request.request_id, None)
        self._scoring.discard(request.request_id)
        self._with_stop_strings.discard(request.request_id)
        return {REPORT_FIELD: report}, ec_transfer_params

    def _preempt_request(self, request: Request, *args, **kwargs) -> None:
        self._scoring.discard(request.request_id)
        self.tiers.keep(request, request.num_computed_tokens)
        super()._preempt_request(request, *args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        if self._with_stop_strings:
            for outputs in by_client.values():
                for output in outputs.outputs:
                    # The front end finds a stop string: any of these outputs may be the last.
                    if output.request_id in self._with_stop_strings:
                        request = self.requests[output.request_id]
                        output.kv_transfer_params = {REPORT_FIELD: self._report(request)}
        return by_client

    def _report(self, request: Request) -> dict[str, Any]:
        """What a finished request took, true to the page."""
        geometry = self.tiers.geometry
        tiered = self.tiers.tiered.get(request.request_id)
        totals = TierTotals()
        for block in (*tiered.blocks[:-1], tiered.tail) if tiered else ():
            totals.count(geometry, block)
        tokens = tiered.num_tokens if tiered else request.num_computed_tokens
        uncompressed = tokens * geometry.token_bytes * self._heads
        stored = totals.pages * geometry.page_bytes * self._heads if tiered else uncompressed
        return {
            "requested_ratio": self.tiers.ratios.get(request.request_id, 1.0),
            "achieved_ratio": round(uncompressed / stored, 4) if stored else 1.0,
            "kv_tokens": tokens,
            "high_tokens": totals.high_tokens,
            "low_tokens": LOW_RECORD_TOKENS * totals.low_records,
            "kv_bytes": stored,
            "uncompressed_kv_bytes": uncompressed,
            "reused_tokens": tiered.reused_tokens if tiered else 0,
            "low_format": tiered.blocks[0].low_format.name if tiered else None,
        }

    # A prompt's last queries have to be computed in one step: they score it.

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        self.tiers.hits.pop(request.request_id, None)
        native = self._native_hit(request)
        manager = self.kv_cache_manager
        if (
            request.request_id not in self.tiers.ratios
            or self.compression.importance != "window"
            or len(manager.coordinator.single_type_managers) > 1
            or not manager.prefix_cache_lookup_enabled(request)
        ):
            return native
        hit = self.tiers.find(request)
        if hit.num_tokens <= native[1]:
            return native
        self.tiers.hits[request.request_id] = hit
        return manager.create_kv_cache_blocks((hit.pages,)), hit.num_tokens, 0, False

    def _native_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """vLLM's hit, without the tokens whose queries score the prompt."""
        hit = super()._get_local_prefix_cache_hit(request)
        _, num_tokens, boundary, diverged = hit
        if request.request_id not in self.tiers.ratios:
            return hit
        limit = 0
        if self.compression.importance == "window":
            limit = max(0, request.num_tokens - self.compression.window)
            limit -= limit % self.block_size
        if num_tokens <= limit:
            return hit
        # Looked up anew, not cut: a sliding window needs the pages before the new end.
        manager = self.kv_cache_manager
        found, num_tokens, _ = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, limit
        )
        return manager.create_kv_cache_blocks(found), num_tokens, boundary, diverged

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens <= 1 or request.request_id not in self.tiers.ratios:
            return num_new_tokens
        limit = self.tiers.native_limit
        is_tiered = request.request_id in self.tiers.tiered or request.request_id in self.tiers.hits
        if not is_tiered and request.num_tokens > limit:
            most = max(limit - num_computed_tokens, self.compression.window)
            num_new_tokens = min(num_new_tokens, most)
        if self.compression.importance == "window":
            left = request.num_tokens - num_computed_tokens
            before_window = left - self.compression.window
            if 0 < before_window < num_new_tokens < left:
                return before_window
        return num_new_tokens

    # One step.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        output = super().schedule(throttle_prefills)
        values = {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}
        return TieredSchedulerOutput(**values, plan=self._plan(output.num_scheduled_tokens))

    def _take_slots(self, request: Request, num_new_tokens: int, *args, **kwargs):
        """``KVCacheManager.allocate_slots``, short for what a compressed request mostly does."""
        num_tokens = request.num_computed_tokens + num_new_tokens
        if num_new_tokens == 1 and self.tiers.append_token(request.request_id, num_tokens):
            return self.kv_cache_manager.empty_kv_cache_blocks
        return self._allocate_slots(request, num_new_tokens, *args, **kwargs)

    def _plan(self, num_scheduled_tokens: dict[str, int]) -> StepPlan:
        decode: dict[str, DecodeStep] = {}
        extend: dict[str, ExtendStep] = {}
        for request_id, steps in self.tiers.drain_steps().items():
            num_new = num_scheduled_tokens[request_id]
            if num_new == 1:
                (decode[request_id],) = steps
            else:
                first = self.requests[request_id].num_computed_tokens - num_new
                extend[request_id] = ExtendStep(first, tuple(steps), self._queries(num_new))
        score: dict[str, ScoreStep] = {}
        compress: dict[str, CompressStep] = {}
        for request_id in [r for r in self.tiers.ratios if r not in self.tiers.tiered]:
            num_new = num_scheduled_tokens.get(request_id, 0)
            if not num_new:
                continue
            request = self.requests[request_id]
            if scoring := self._score(request, num_new):
                score[request_id] = scoring
            num_tokens = request.num_computed_tokens
            if self._awaits_more_prompt(request) or num_tokens < self._least_tokens:
                continue
            if done := self.tiers.compress(request, num_tokens):
                compress[request_id] = done
                self._scoring.discard(request_id)
        self.tiers.seal(self.requests)
        self.tiers.release_pages()
        adopt, copy = self.tiers.drain_adopted()
        zero = self.tiers.drain_pages_to_zero()
        self._stats = self._tier_stats()
        return StepPlan(score, compress, decode, extend, adopt, copy, zero, self._stats)

    @property
    def _least_tokens(self) -> int:
        return self.compression.min_tokens

    def _awaits_more_prompt(self, request: Request) -> bool:
        """Whether more of the prompt comes before it is compressed."""
        limit = self.tiers.native_limit
        # The window at a prompt's end is not cut: it has to fit behind what is native then.
        has_room = request.num_computed_tokens < limit - self.compression.window
        return request.is_prefill_chunk and (request.num_tokens <= limit or has_room)

    def _queries(self, num_new: int) -> int:
        """How many of a step's queries score."""
        if self.compression.importance == "h2o":
            return num_new
        return min(self.compression.window, num_new)

    def _score(self, request: Request, num_new: int) -> ScoreStep | None:
        """How this step adds to the request's scores, if it does."""
        num_tokens, window = request.num_computed_tokens, self.compression.window
        if self.compression.importance == "h2o":
            reset = num_tokens == num_new
        else:
            if self._awaits_more_prompt(request) or num_tokens < self._least_tokens - window:
                return None
            reset = num_new > 1 or request.request_id not in self._scoring
        self._scoring.add(request.request_id)
        capacity = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
        return ScoreStep(self._queries(num_new), num_tokens, max(capacity, num_tokens), reset)

    # What it holds.

    def _tier_stats(self) -> TierStats:
        pool, geometry, held = self.tiers.block_pool, self.tiers.geometry, self.tiers.totals
        total, free = pool.num_gpu_blocks - 1, pool.get_num_free_blocks()
        computed = sum(r.num_computed_tokens for r in self.running)
        num_tiered = len(self.tiers.tiered)
        high, low = held.high_tokens, LOW_RECORD_TOKENS * held.low_records
        high_bytes = (
            held.blocks * geometry.header_bytes + held.high_records * geometry.high.num_bytes
        )
        unused = held.pages * geometry.page_bytes - high_bytes - held.low_bytes
        return TierStats(
            pages={
                "total": total,
                "free": free,
                "native": total - free - held.pages,
                "tiered": held.pages,
            },
            tokens={"native": max(0, computed - high - low), "high": high, "low": low},
            bytes={
                "high": high_bytes * self._heads,
                "low": held.low_bytes * self._heads,
                "unused": unused * self._heads,
            },
            operations={
                "compress": self.tiers.num_compressed,
                "compress_in_place": self.tiers.num_compressed_in_place,
                "demote": self.tiers.num_demoted,
            },
            requests={"native": len(self.running) - num_tiered, "tiered": num_tiered},
        )

    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            # The one field of vLLM's statistics that takes any dictionary; it is free, since
            # KV connectors are refused.
            tier_stats = self._stats or self._tier_stats()
            stats.kv_connector_stats = {ADDITIONAL_CONFIG_KEY: vars(tier_stats)}
        return stats


class TieredAsyncScheduler(TieredScheduler, AsyncScheduler):
    """:class:`TieredScheduler` that schedules a step before the one before it has ended."""
