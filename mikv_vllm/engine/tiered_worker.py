"""Base class of the workers: passes the plan to the attention backend."""

from dataclasses import asdict
from typing import Any, ClassVar

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_worker import Worker

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.step_plan import StepPlan, TieredSchedulerOutput, TierStats
from mikv_vllm.engine.vllm_hooks import observe_batches
from mikv_vllm.engine.worker_context import context


class TieredWorker(Worker):
    """Base class of the workers, for both model runners of vLLM."""

    backends: ClassVar[dict[str, str]]
    """Attention backends of this package, by the name of vLLM's backend that each one replaces."""
    _has_draft_layers: bool
    """Whether layers with caches propose the drafts."""

    def init_device(self) -> None:
        context.compression = CompressionConfig.from_additional_config(
            self.vllm_config.additional_config
        )
        for name, path in self.backends.items():
            register_backend(AttentionBackendEnum[name], f"mikv_vllm.engine.{path}")
        super().init_device()
        speculative = self.vllm_config.speculative_config
        self._has_draft_layers = speculative is not None and speculative.uses_draft_kv_cache()
        self._follow_batches()

    def _follow_batches(self) -> None:
        """Make the request id of each row of a batch available to the metadata builders."""
        runner = self.model_runner
        if not self.use_v2_model_runner:
            context.request_ids = lambda: runner.input_batch.req_ids
            return

        def observe(input_batch: Any) -> None:
            context.request_ids = lambda: input_batch.req_ids

        observe_batches(runner, observe)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        # vLLM reserves one page.
        context.plan = StepPlan(stats=TierStats.idle(kv_cache_config.num_blocks - 1))

    def execute_model(self, scheduler_output: TieredSchedulerOutput) -> Any:
        """Run one step under its plan.

        With draft layers the step ends when they have run, in :meth:`sample_tokens`.
        """
        context.begin_step(scheduler_output)
        plan = scheduler_output.plan
        if plan.copy or plan.zero:
            sources, targets = [s for s, _ in plan.copy], [t for _, t in plan.copy]
            for cache in self.model_runner.kv_caches:
                cache[targets] = cache[sources]
                cache[list(plan.zero)] = 0
        result = super().execute_model(scheduler_output)
        if not self._has_draft_layers or result is not None:
            context.end_step()
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, and let draft layers propose tokens."""
        result = super().sample_tokens(grammar_output)
        if self._has_draft_layers:
            context.end_step()
        return result

    def mikv_stats(self) -> dict[str, Any]:
        """Return the scheduler's statistics of the last step, for ``collective_rpc``."""
        return asdict(context.plan.stats)
