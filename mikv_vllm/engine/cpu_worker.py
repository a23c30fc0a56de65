"""The CPU worker."""

from typing import Any, ClassVar

import numpy as np
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from mikv_vllm.engine.tiered_worker import TieredWorker


class TieredCPUWorker(TieredWorker, CPUWorker):
    """vLLM's CPU worker with the two-tier attention backend."""

    # On CPU, vLLM always selects CPU_ATTN, which can be overridden.
    backends: ClassVar = {"CPU_ATTN": "cpu_backend.TieredCPUAttentionBackend"}

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        super().initialize_from_config(kv_cache_config)
        if not self.use_v2_model_runner:
            self._make_intermediate_tensors()

    def _make_intermediate_tensors(self) -> None:
        """Create the buffer in which a later pipeline stage receives its input.

        vLLM creates it in a dummy run. On CPU, it omits this run if nothing is compiled and the
        size of the cache is set. The first step of the stage would then fail.
        """
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens,
                dtype=runner.model_config.dtype,
                device=runner.device,
            )

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, without the generators of rows whose prompt is not complete.

        vLLM discards the samples of such rows and resets their generators, which CPU generators do
        not support: a seeded request with a chunked prompt would stop the engine. The V2 model
        runner has no generators.
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
