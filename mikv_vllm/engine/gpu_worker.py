"""The GPU worker."""

from collections.abc import Iterable
from typing import Any, ClassVar

from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import KVCacheSpec

from mikv_vllm.engine.gpu_impl import TieredGPUImpl
from mikv_vllm.engine.spec import TieredAttentionSpec
from mikv_vllm.engine.tiered_worker import TieredWorker
from mikv_vllm.engine.vllm_hooks import leave_full_graphs, leave_full_graphs_v2
from mikv_vllm.engine.worker_context import context

logger = init_logger(__name__)

COPIES = 3
"""Memory outside of the pool, in multiples of one layer of the longest uncompressed request: one
for the workspace, the others for scratch (``tests/kernels/test_triton_scratch.py``)."""


def bytes_beside_pool(specs: Iterable[KVCacheSpec], max_tokens: int) -> int:
    """Return the maximum device memory of the tier operations outside of the cache, in bytes.

    Args:
        specs: specs of all layers.
        max_tokens: maximum number of tokens of a request.
    """
    tiered = [spec for spec in specs if isinstance(spec, TieredAttentionSpec)]
    pages = (-(-max_tokens // spec.block_size) * spec.page_size_bytes for spec in tiered)
    return COPIES * max(pages, default=0)


class TieredGPUWorker(TieredWorker):
    """vLLM's GPU worker with the two-tier attention backends."""

    backends: ClassVar = {
        "FLASH_ATTN": "gpu_backend.TieredFlashAttentionBackend",
        # vLLM's first choice on some GPUs. There is no tiered backend for it.
        "FLASHINFER": "gpu_backend.TieredFlashAttentionBackend",
        "TRITON_ATTN": "gpu_backend.TieredTritonAttentionBackend",
    }

    def determine_available_memory(self) -> int:
        """Return vLLM's result without the memory that the tiers need outside of the pool.

        A size that the user set is not changed.
        """
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        beside = bytes_beside_pool(
            self.get_kv_cache_spec().values(), self.model_config.max_model_len
        )
        logger.info(
            "MiKV: %.2f GiB are reserved for compression and for long prompts.", beside / 2**30
        )
        return available - beside

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()

        def is_native() -> bool:
            return context.is_native

        if self.use_v2_model_runner:
            leave_full_graphs_v2(self.model_runner.cudagraph_manager, is_native)
        else:
            leave_full_graphs(self.model_runner.cudagraph_dispatcher, is_native)
        if self.vllm_config.kernel_config.enable_jit_warmup:
            self._warm_up()
        return result

    def _warm_up(self) -> None:
        """Compile the tier kernels for each shape of layer."""
        logger.info(
            "MiKV: compiling the tier kernels (later starts read them from Triton's cache)."
        )
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        tiered = [layer for layer in layers if isinstance(layer.impl, TieredGPUImpl)]
        for layer in {layer.impl.shape: layer for layer in tiered}.values():
            layer.impl.warm_up(layer.kv_cache)
