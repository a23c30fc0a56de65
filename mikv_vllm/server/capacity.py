"""Refuses requests that the page pool cannot hold at their ratio, before they are queued."""

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError

from mikv_vllm.config import RATIO_FIELD, CompressionConfig
from mikv_vllm.server.vllm_hooks import check_inputs
from mikv_vllm.tiers.blocks import most_tokens
from mikv_vllm.tiers.formats import TierGeometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor


def check_capacity(
    processor: "InputProcessor", vllm_config: "VllmConfig", config: CompressionConfig
) -> None:
    """Make an input processor refuse prompts that do not fit, and limit the tokens of the others.

    At start-up vLLM checks that a request of ``max_model_len`` tokens fits. With MiKV that holds at
    the server's default ratio only, and a request may choose a smaller ratio.

    Args:
        processor: changed in place. It then raises ``VLLMValidationError`` for a prompt that does
            not fit, and lowers ``max_tokens`` to what fits after the prompt.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    geometry = TierGeometry(model.get_head_size(), cache.block_size, config.high_bits)
    engines = vllm_config.parallel_config.data_parallel_size

    def check(request: "EngineCoreRequest") -> None:
        params = request.sampling_params
        if params is None or not cache.num_gpu_blocks:
            return
        ratio = (params.extra_args or {}).get(RATIO_FIELD)
        if request.resumable:
            ratio = 1.0  # it stays native, because more prompt tokens arrive later
        ratio = config.ratio if ratio is None else float(ratio)
        # vLLM reserves one page of each engine.
        pages = cache.num_gpu_blocks // engines - 1
        fits = most_tokens(geometry, ratio, config.recent, pages, config.ladder)
        prompt = len(request.prompt_token_ids or ())
        if prompt >= fits:
            raise VLLMValidationError(
                f"The prompt has {prompt} tokens, but at {RATIO_FIELD} {ratio:g} the KV cache "
                f"holds {fits}; ask for a higher ratio or send a shorter prompt.",
                parameter=RATIO_FIELD,
            )
        if params.max_tokens is not None:
            params.max_tokens = min(params.max_tokens, fits - prompt)

    check_inputs(processor, check)
