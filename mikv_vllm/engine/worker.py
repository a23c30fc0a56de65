"""Workers that hand the plan to the attention backend."""

from dataclasses import asdict
from typing import Any

import numpy as np
from vllm.distributed import get_pp_group
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.step_plan import StepPlan, TieredSchedulerOutput, TierStats
from mikv_vllm.engine.worker_context import context


class TieredCPUWorker(CPUWorker):
    """vLLM's CPU worker with the two-tier attention backend."""

    def init_device(self) -> None:
        context.compression = CompressionConfig.from_additional_config(
            self.vllm_config.additional_config
        )
        # On CPU vLLM always takes CPU_ATTN, but honours an override of it.
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            "mikv_vllm.engine.cpu_backend.TieredCPUAttentionBackend",
        )
        super().init_device()
        context.request_ids = lambda: self.model_runner.input_batch.req_ids

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        self._make_intermediate_tensors()
        # vLLM keeps one page for itself.
        context.plan = StepPlan(stats=TierStats.idle(kv_cache_config.num_blocks - 1))

    def _make_intermediate_tensors(self) -> None:
        """Make the buffer in which a later pipeline stage receives its input.

        vLLM makes it in a dummy run, which it leaves out on CPU where nothing is compiled and the
        cache has a given size: then the stage's first step would end the engine.
        """
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    def execute_model(self, scheduler_output: TieredSchedulerOutput) -> Any:
        """Run one step under its plan."""
        context.begin_step(scheduler_output)
        if pages := list(context.plan.zero):
            for cache in self.model_runner.kv_caches:
                cache[pages] = 0
        result = super().execute_model(scheduler_output)
        context.end_step()
        return result

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample; a row whose prompt is not through yet draws without its generator.

        vLLM discards what such a row draws and winds its generator back, which a CPU generator
        cannot do: a seeded request with a chunked prompt would end the engine.
        """
        runner, held = self.model_runner, {}
        batch = runner.input_batch
        for row in np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist():
            if generator := batch.generators.pop(row, None):
                held[row] = generator
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(held)

    def mikv_stats(self) -> dict[str, Any]:
        """The scheduler's figures as of the last step, for ``collective_rpc``."""
        return asdict(context.plan.stats)
