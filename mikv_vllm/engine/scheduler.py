"""The scheduler: vLLM's own, plus one plan a step."""

from dataclasses import fields, replace
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from mikv_vllm.config import ADDITIONAL_CONFIG_KEY, REPORT_FIELD, CompressionConfig
from mikv_vllm.engine.block_manager import tiered_manager
from mikv_vllm.engine.reports import request_report
from mikv_vllm.engine.requested_ratio import requested_ratio
from mikv_vllm.engine.statistics import tier_stats
from mikv_vllm.engine.step_plan import TieredSchedulerOutput, TierStats
from mikv_vllm.engine.step_planner import StepPlanner
from mikv_vllm.engine.vllm_hooks import append_tokens_first, follow_other_group
from mikv_vllm.tiers.plan import largest_ratio


class TieredScheduler(Scheduler):
    """Schedules as vLLM does, then plans what the step does with the tiers.

    With async scheduling an instance is a :class:`TieredAsyncScheduler`, as in vLLM.
    """

    def __new__(cls, vllm_config: VllmConfig, *args, **kwargs) -> "TieredScheduler":
        """Choose as vLLM does between its own two schedulers if no class is given."""
        is_async = vllm_config.scheduler_config.async_scheduling
        return super().__new__(TieredAsyncScheduler if is_async else cls)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = CompressionConfig.from_additional_config(self.vllm_config.additional_config)
        assert config is not None, f"additional_config lacks {ADDITIONAL_CONFIG_KEY!r}"
        self.compression = config
        managers = self.kv_cache_manager.coordinator.single_type_managers
        try:
            self.manager = tiered_manager(managers, self.cache_config.block_size)
        except ValueError as why:
            raise ValueError(
                f"--model {self.vllm_config.model_config.model} is not supported by MiKV ({why}); "
                "serve it with `vllm serve`."
            ) from None
        self.store = self.manager.store
        for manager in managers:
            if manager is not self.manager:
                follow_other_group(manager, self.store.dirty, config.window)
        if len(managers) == 1:
            append_tokens_first(self.kv_cache_manager, self.store)
        self.store.cache.least_computed = 2 if self.num_spec_tokens else 1
        spec, ranks = self.manager.kv_cache_spec, self.parallel_config.tensor_parallel_size
        self._heads = spec.num_layers * spec.num_kv_heads * ranks
        self._has_one_group = len(managers) == 1
        self.largest_ratio = largest_ratio(spec.head_size, config.high_bits, config.ladder)
        self.planner = StepPlanner(self.manager, self.max_model_len)
        self._with_stop_strings: set[str] = set()
        self._stats: TierStats | None = None  # of this step, until a request ends

    # Request life cycle.

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        ratio = requested_ratio(request, self.compression.ratio, self.largest_ratio)
        if ratio > 1.0:
            longest = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            self.store.admit(request.request_id, ratio, longest)
        if request.sampling_params and request.sampling_params.stop:
            self._with_stop_strings.add(request.request_id)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        request_id = request.request_id
        self.planner.drafts.verify(request)
        report, self._stats = self._report(request), None
        self.store.keep(request)
        self.store.remember(request)
        _, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        self.store.forget(request_id)
        self.planner.forget(request_id)
        self.manager.hits.pop(request_id, None)
        self._with_stop_strings.discard(request_id)
        return {REPORT_FIELD: report}, ec_transfer_params

    def _preempt_request(self, request: Request, *args, **kwargs) -> None:
        self.planner.forget(request.request_id)
        self.store.keep(request)
        super()._preempt_request(request, *args, **kwargs)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        by_client = super().update_from_output(scheduler_output, model_runner_output)
        for request_id in scheduler_output.scheduled_spec_decode_tokens:
            if request := self.requests.get(request_id):
                self.planner.drafts.verify(request)
        if self._with_stop_strings:
            for outputs in by_client.values():
                for output in outputs.outputs:
                    # The front end finds a stop string: any of these outputs may be the last.
                    if output.request_id in self._with_stop_strings:
                        request = self.requests[output.request_id]
                        output.kv_transfer_params = {REPORT_FIELD: self._report(request)}
        return by_client

    def _report(self, request: Request) -> dict[str, Any]:
        return request_report(request, self.store, self._heads)

    # The prefix cache.

    def _get_local_prefix_cache_hit(
        self, request: Request, *most_tokens: int | None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        native = super()._get_local_prefix_cache_hit(request, *most_tokens)
        manager, request_id = self.kv_cache_manager, request.request_id
        self.manager.hits.pop(request_id, None)
        if request_id not in self.store.ratios:
            return native
        _, num_tokens, boundary, diverged = native
        window, limit, hit = self.compression.window, 0, None
        if self.compression.importance == "window":
            end = request.num_tokens
            can_hit = self._has_one_group and manager.prefix_cache_lookup_enabled(request)
            if can_hit and not any(most_tokens):  # vLLM 0.33 limits hits for other outputs
                hit = self.store.find(request)
                end = self.store.branches.get(request_id, end)
            # The last queries of a prompt are computed in one step, because they score it.
            limit = max(0, end - window)
            limit -= limit % self.block_size
        if num_tokens > limit:
            # A new lookup, because a sliding window needs the pages before the new end.
            coordinator = manager.coordinator
            found, num_tokens, _ = coordinator.find_longest_cache_hit(request.block_hashes, limit)
            native = manager.create_kv_cache_blocks(found), num_tokens, boundary, diverged
        if hit is None or hit.num_tokens < max(1, num_tokens):
            return native
        if hit.num_tokens == num_tokens and any(page.ref_cnt for page in native[0].blocks[0]):
            return native  # other requests hold these pages: they take no memory
        self.manager.hits[request_id] = hit
        return manager.create_kv_cache_blocks((hit.pages,)), hit.num_tokens, 0, False

    def reset_prefix_cache(self, *args, **kwargs) -> bool:
        is_reset = super().reset_prefix_cache(*args, **kwargs)
        if is_reset:
            self.store.cache.clear()
        return is_reset

    # One step.

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        if num_new_tokens == 1:
            return 1  # most decode steps: nothing to cut
        return self.planner.cut_chunk(request, num_computed_tokens, num_new_tokens)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.planner.drafts.allow(self.running)
        output = super().schedule(throttle_prefills)
        drafts = output.scheduled_spec_decode_tokens
        plan = self.planner.plan(self.requests, output.num_scheduled_tokens, drafts)
        self._stats = tier_stats(self.store, self.running, self._heads)
        values = {f.name: getattr(output, f.name) for f in fields(SchedulerOutput)}
        return TieredSchedulerOutput(**values, plan=replace(plan, stats=self._stats))

    def make_stats(self, *args, **kwargs) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            # The one field of vLLM's statistics that takes any dictionary; it is free, since
            # KV connectors are refused.
            tiers = self._stats or tier_stats(self.store, self.running, self._heads)
            stats.kv_connector_stats = {ADDITIONAL_CONFIG_KEY: vars(tiers)}
        return stats


class TieredAsyncScheduler(TieredScheduler, AsyncScheduler):
    """:class:`TieredScheduler` that schedules a step before the one before it has ended."""
