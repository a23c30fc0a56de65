"""The CPU worker."""

from typing import Any, ClassVar

import numpy as np
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_worker import CPUWorker

from mikv_vllm.engine.tiered_worker import TieredWorker


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
