"""Checks for unsupported flags, models and devices, before an engine starts."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

NATIVE_CACHE_DTYPES = ("auto", "bfloat16", "float16")

UNSUPPORTED = {
    **dict.fromkeys(
        ("kv_transfer_config", "kv_offloading_size"), "KV connectors move native pages only"
    ),
    **dict.fromkeys(("enable_dbo", "ubatch_size"), "the batch of a step cannot be split"),
    "kv_sharing_fast_prefill": "it skips queries that score the prompt",
    "diffusion_config": "diffusion models rewrite cached tokens",
}
"""Unsupported engine arguments, and the reason."""
DRAFT_METHODS = ("ngram", "suffix", "draft_model", "eagle", "eagle3", "mtp")
"""Methods of speculative decoding: those without draft layers, and those whose draft layers first
compute the tokens of each step, as the model's own layers do."""
PARTIAL_ATTENTION = ("sliding_attention", "chunked_attention", "linear_attention")
"""Layer types of transformers that do not attend to the whole context."""


class Refusal(ValueError):
    """A flag, model, device or address that cannot be served; the message is one sentence."""


def _unsupported(subject: str, why: str, remedy: str = "leave it out") -> Refusal:
    return Refusal(f"{subject} is not supported by MiKV ({why}); {remedy}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_flags(engine_args: Mapping[str, Any]) -> None:
    """Refuse engine arguments that MiKV does not support or that it sets.

    Args:
        engine_args: vLLM's engine arguments as the user set them, by field name. A missing
            argument has its default value.

    Raises:
        Refusal: an argument is not supported; the message names the flag.
    """
    for name, why in UNSUPPORTED.items():
        if engine_args.get(name):
            raise _unsupported(_flag(name), why)
    dtype = engine_args.get("kv_cache_dtype") or "auto"
    if dtype not in NATIVE_CACHE_DTYPES:
        raise _unsupported(
            f"--kv-cache-dtype {dtype}",
            "the native tier is 16-bit",
            "use auto, and --kv-compression-ratio for a smaller cache",
        )
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := engine_args.get(name) or 1) != 1:
            raise _unsupported(f"{_flag(name)} {size}", "context parallelism", "use 1")
    if engine_args.get("runner") == "pooling":
        raise _unsupported("--runner pooling", "pooling models do not decode")
    if (convert := engine_args.get("convert") or "auto") not in ("auto", "none"):
        raise _unsupported(f"--convert {convert}", "pooling models do not decode")
    _check_wiring(engine_args)


def _check_wiring(engine_args: Mapping[str, Any]) -> None:
    """Refuse flags for arguments that MiKV sets."""
    attention_config = engine_args.get("attention_config")
    if isinstance(attention_config, Mapping):
        attention_backend = attention_config.get("backend")
    else:
        attention_backend = getattr(attention_config, "backend", None)
    given = {
        "--scheduler-cls": engine_args.get("scheduler_cls"),
        "--worker-cls": engine_args.get("worker_cls"),
        "--attention-backend": engine_args.get("attention_backend") or attention_backend,
    }
    for flag, value in given.items():
        if value not in (None, "auto"):
            shown = getattr(value, "__name__", None) or getattr(value, "name", value)
            raise Refusal(f"{flag} {shown} is not allowed, because MiKV sets it; leave it out.")


def check_frontend(args: Mapping[str, Any]) -> None:
    """Refuse frontends of ``vllm serve`` that bypass MiKV's request handling.

    Raises:
        Refusal: the message names the flag or the environment variable.
    """
    if args.get("grpc"):
        raise _unsupported("--grpc", "requests come over HTTP")
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0").lower() not in ("", "0", "false"):
        raise Refusal(
            "VLLM_USE_RUST_FRONTEND is set, but MiKV needs vLLM's Python frontend; unset it."
        )


def check(vllm_config: "VllmConfig") -> None:
    """Refuse unsupported models and settings, once the model's config is known.

    Raises:
        Refusal: the message names the model or the flag.
    """
    if vllm_config.device_config.device_type == "cuda":
        _check_gpu()
    if why := _why_not(vllm_config):
        model = f"--model {vllm_config.model_config.model}"
        raise _unsupported(model, why, "serve it with `vllm serve`")
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager and _windowed(
        vllm_config.model_config
    ):
        raise _unsupported(
            "--disable-hybrid-kv-cache-manager",
            "the sliding-window layers of this model would share pages with compressed layers",
        )
    _check_speculation(vllm_config)
    if vllm_config.kv_transfer_config is not None:
        raise _unsupported("--kv-transfer-config", "KV connectors move native pages only")
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype not in NATIVE_CACHE_DTYPES:
        raise _unsupported(
            f"--kv-cache-dtype {cache_dtype}", "the native tier is 16-bit", "use bfloat16"
        )
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if dtype not in NATIVE_CACHE_DTYPES:
        raise _unsupported(
            f"--dtype {dtype}", "the native tier is 16-bit", "use bfloat16 or float16"
        )


def _check_speculation(vllm_config: "VllmConfig") -> None:
    """Refuse methods of speculative decoding that MiKV does not support."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return
    if vllm_config.device_config.device_type == "cuda":
        raise _unsupported("--speculative-config", "its GPU kernels verify no drafts yet")
    method = speculative.method
    if method not in DRAFT_METHODS:
        raise _unsupported(
            f"--speculative-config with the method {method}",
            "its draft layers have no compressed cache",
            f"use one of the methods {', '.join(DRAFT_METHODS)}",
        )
    if not speculative.uses_draft_kv_cache():
        return
    if speculative.disable_padded_drafter_batch or speculative.parallel_drafting:
        raise _unsupported(
            "--speculative-config with disable_padded_drafter_batch or parallel_drafting",
            "draft layers have to compute the tokens of each step",
        )
    drafts, model = speculative.draft_model_config, vllm_config.model_config
    parallel = vllm_config.parallel_config
    heads = [
        (config.get_num_kv_heads(parallel), config.get_head_size()) for config in (drafts, model)
    ]
    if heads[0] != heads[1]:
        (kv_heads, size), (wanted_heads, wanted_size) = heads
        raise _unsupported(
            f"--speculative-config with the model {drafts.model}",
            f"its layers share pages with the model's and have {kv_heads} KV heads of size {size}, "
            f"but the model has {wanted_heads} of size {wanted_size}",
            "use a draft model with the same KV heads, or n-grams",
        )


def _check_gpu() -> None:
    """Refuse a GPU that the Triton kernels do not support."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda() or not current_platform.has_device_capability(80):
        raise Refusal(
            "MiKV's GPU kernels need an NVIDIA GPU with compute capability 8.0 or higher; "
            f"this device is {current_platform.get_device_name()}."
        )


def _why_not(vllm_config: "VllmConfig") -> str | None:
    """Return why MiKV does not support this model; None if it does."""
    if vllm_config.device_config.device_type == "cuda":
        from mikv_vllm.kernels.triton import HEAD_DIMS
    else:
        from mikv_vllm.kernels.cpu import HEAD_DIMS

    model = vllm_config.model_config
    head_dim = model.get_head_size()
    reasons = (
        (model.is_encoder_decoder, "it is an encoder-decoder model"),
        (model.runner_type != "generate", f"it is a {model.runner_type} model"),
        (model.use_mla, "it uses multi-head latent attention, MLA"),
        (model.is_attention_free or model.is_hybrid, "it has state-space layers"),
        (model.uses_alibi, "it uses ALiBi, and tiers do not store positions"),
        (_shares_caches(model), "some of its layers share a KV cache"),
        (not _full_attention_groups(model), "no layer attends to the whole context"),
        (
            _full_attention_groups(model) > 1,
            "its full-attention layers do not fit into one of vLLM's cache groups",
        ),
        (
            head_dim not in HEAD_DIMS,
            f"its head size is {head_dim}; supported are {', '.join(map(str, HEAD_DIMS))}",
        ),
    )
    return next((why for applies, why in reasons if applies), None)


def _shares_caches(model: "ModelConfig") -> bool:
    """Whether some layers read the KV cache of another layer, as in Gemma 3n."""
    return bool(getattr(model.hf_text_config, "num_kv_shared_layers", 0))


def _layer_types(model: "ModelConfig") -> list[str]:
    """Return the type of each layer; empty if all have the same type."""
    return list(getattr(model.hf_text_config, "layer_types", None) or ())


def _windowed(model: "ModelConfig") -> bool:
    """Whether some layers attend to a part of the context only."""
    return any(layer_type in PARTIAL_ATTENTION for layer_type in _layer_types(model))


def _full_attention_groups(model: "ModelConfig") -> int:
    """Return the number of vLLM's cache groups for the layers that attend to the whole context.

    All groups have the same number of layers: that of the rarest layer type or, if the most common
    type has less than 1.5 times as many, that of the most common type. See vLLM's
    ``_get_kv_cache_groups_uniform_page_size``.
    """
    types = _layer_types(model)
    if not types:
        return int(model.get_sliding_window() is None)
    counts = Counter(name if name in PARTIAL_ATTENTION else "full" for name in types)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * fewest else fewest
    return -(-counts["full"] // size)
