"""Workers that hand the plan to the attention backend."""

from dataclasses import asdict
from functools import wraps
from typing import Any, ClassVar

import numpy as np
from vllm.config import CUDAGraphMode
from vllm.distributed import get_pp_group
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.step_plan import StepPlan, TieredSchedulerOutput, TierStats
from mikv_vllm.engine.worker_context import context


class TieredWorker(Worker):
    """What our workers add to vLLM's, with either of its model runners."""

    backends: ClassVar[dict[str, str]]
    """Attention backends of ours by the name of vLLM's backend that each takes the place of."""

    def init_device(self) -> None:
        context.compression = CompressionConfig.from_additional_config(
            self.vllm_config.additional_config
        )
        for name, path in self.backends.items():
            register_backend(AttentionBackendEnum[name], f"mikv_vllm.engine.{path}")
        super().init_device()
        self._follow_batches()

    def _follow_batches(self) -> None:
        """Let the metadata builders know which request each row of a batch is."""
        runner = self.model_runner
        if not self.use_v2_model_runner:
            context.request_ids = lambda: runner.input_batch.req_ids
            return
        prepare_attn = runner.prepare_attn

        @wraps(prepare_attn)
        def prepare(input_batch: Any) -> Any:
            context.request_ids = lambda: input_batch.req_ids
            return prepare_attn(input_batch)

        runner.prepare_attn = prepare

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        # vLLM keeps one page for itself.
        context.plan = StepPlan(stats=TierStats.idle(kv_cache_config.num_blocks - 1))

    def execute_model(self, scheduler_output: TieredSchedulerOutput) -> Any:
        """Run one step under its plan."""
        context.begin_step(scheduler_output)
        if pages := list(scheduler_output.plan.zero):
            for cache in self.model_runner.kv_caches:
                cache[pages] = 0
        result = super().execute_model(scheduler_output)
        context.end_step()
        return result

    def mikv_stats(self) -> dict[str, Any]:
        """The scheduler's figures as of the last step, for ``collective_rpc``."""
        return asdict(context.plan.stats)


class TieredGPUWorker(TieredWorker):
    """vLLM's GPU worker with the two-tier attention backends."""

    backends: ClassVar = {
        "FLASH_ATTN": "gpu_backend.TieredFlashAttentionBackend",
        # vLLM's first choice on some GPUs; it has no tiered form.
        "FLASHINFER": "gpu_backend.TieredFlashAttentionBackend",
        "TRITON_ATTN": "gpu_backend.TieredTritonAttentionBackend",
    }

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        if self.use_v2_model_runner:
            self._leave_full_graphs_v2(self.model_runner.cudagraph_manager)
        else:
            self._leave_full_graphs(self.model_runner.cudagraph_dispatcher)
        return result

    @staticmethod
    def _leave_full_graphs(dispatcher: Any) -> None:
        """Run steps that touch a tier piecewise: attention outside of the CUDA graphs."""
        dispatch = dispatcher.dispatch

        @wraps(dispatch)
        def dispatch_step(*args: Any, **kwargs: Any) -> Any:
            if not context.is_native:
                invalid = kwargs.get("invalid_modes") or frozenset()
                kwargs["invalid_modes"] = invalid | {CUDAGraphMode.FULL}
            return dispatch(*args, **kwargs)

        dispatcher.dispatch = dispatch_step

    @staticmethod
    def _leave_full_graphs_v2(manager: Any) -> None:
        """The same for the V2 model runner, whose full graphs are those of uniform batches."""
        if manager is None:
            return
        dispatch = manager.dispatch

        @wraps(dispatch)
        def dispatch_step(
            num_reqs: int, num_tokens: int, uniform_token_count: int | None, **kwargs: Any
        ) -> Any:
            if not context.is_native:
                uniform_token_count = kwargs["max_query_len"] = None
            return dispatch(num_reqs, num_tokens, uniform_token_count, **kwargs)

        manager.dispatch = dispatch_step


class TieredCPUWorker(TieredWorker, CPUWorker):
    """vLLM's CPU worker with the two-tier attention backend."""

    # On CPU vLLM always takes CPU_ATTN, but honours an override of it.
    backends: ClassVar = {"CPU_ATTN": "cpu_backend.TieredCPUAttentionBackend"}

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if not self.use_v2_model_runner:
            self._make_intermediate_tensors()

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

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample; a row whose prompt is not through yet draws without its generator.

        vLLM discards what such a row draws and winds its generator back, which a CPU generator
        cannot do: a seeded request with a chunked prompt would end the engine. The V2 model runner
        has no generators.
        """
        if self.use_v2_model_runner:
            return super().sample_tokens(grammar_output)
        runner, held = self.model_runner, {}
        batch = runner.input_batch
        for row in np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist():
            if generator := batch.generators.pop(row, None):
                held[row] = generator
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(held)
