"""Requests that the page pool cannot hold at their ratio, refused before they are queued."""

from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError

from mikv_vllm.config import RATIO_FIELD, CompressionConfig
from mikv_vllm.tiers.blocks import most_tokens
from mikv_vllm.tiers.formats import TierGeometry

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.input_processor import InputProcessor


def check_capacity(
    processor: "InputProcessor", vllm_config: "VllmConfig", config: CompressionConfig
) -> None:
    """Make vLLM's input processor refuse prompts that do not fit, and end the others in time.

    vLLM itself makes sure that a request of the model's whole length fits; here it need only do
    so at the server's default ratio, and a request may ask for a smaller one.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    geometry = TierGeometry(model.get_head_size(), cache.block_size, config.high_bits)
    engines = vllm_config.parallel_config.data_parallel_size
    process_inputs, process_inputs_async = processor.process_inputs, processor.process_inputs_async

    def check(request: "EngineCoreRequest") -> "EngineCoreRequest":
        params = request.sampling_params
        if params is None or not cache.num_gpu_blocks:
            return request
        ratio = (params.extra_args or {}).get(RATIO_FIELD)
        if request.resumable:
            ratio = 1.0  # it stays native: more of its prompt comes later
        ratio = config.ratio if ratio is None else float(ratio)
        # vLLM keeps one page of each engine for itself.
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
        return request

    def process_and_check(*args: Any, **kwargs: Any) -> "EngineCoreRequest":
        return check(process_inputs(*args, **kwargs))

    async def process_and_check_async(*args: Any, **kwargs: Any) -> "EngineCoreRequest":
        return check(await process_inputs_async(*args, **kwargs))

    processor.process_inputs = process_and_check
    processor.process_inputs_async = process_and_check_async
