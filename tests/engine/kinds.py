"""The kinds of model in ``docs/models.md``: a small one of each with random weights.

:func:`measure` runs in a process of its own, for vLLM leaves traces in one that held an engine.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mikv_vllm.config import REPORT_FIELD, CompressionConfig

from .generated import SHAPE, random_tokens, save_model

RATIO = 4.0
NEW_TOKENS = 40
REQUESTS = ((1.0, 500), (2.0, 900), (RATIO, 700), (RATIO, 1400))
"""Ratio and prompt length of each request of the mixed batch."""
WINDOWS = (900, 600)
"""Prompt lengths of the windows that measure the divergence."""

SMALL = {"initializer_range": 0.05}
"""Rounding differs between two kernels that are equally right; larger weights would amplify it."""
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 128}


@dataclass(frozen=True)
class Served:
    """How to make and start a model of one kind."""

    save: Callable[[Path], Path]
    engine: dict[str, Any] = field(default_factory=dict)
    """Further engine arguments."""
    without: dict[str, Any] | None = None
    """Arguments of our kernels as a model without this feature has them."""
    extra: Callable[[Path, int, dict], dict] = lambda folder, index, prompt: {"prompts": prompt}
    """What the engine is given for a request of a batch: vLLM's name of each argument."""
    extra_matters: bool = False
    """Whether two requests with the same prompt, one after the other, differ by it."""


def model(architecture: str, **shape: Any) -> Callable[[Path], Path]:
    return partial(save_model, architecture=architecture, **SMALL | shape)


def gpt_oss(folder: Path) -> Path:
    """With sinks that take a good part of the attention; transformers makes them about zero."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    save_model(folder, "GptOss", **SMALL | WINDOW | experts)
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name in weights:
        if name.endswith("sinks"):
            weights[name] = torch.full_like(weights[name], 7.0)
    save_file(weights, path, {"format": "pt"})
    return folder


IMAGE = SHAPE["vocab_size"] - 1
"""Token of an image, the last of those that are no words."""
WORDS = 448


def idefics3(folder: Path) -> Path:
    """With a tokenizer of made-up words and an image processor for pictures of 112 by 112."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        Idefics3ImageProcessorPil,
    )

    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"intermediate_size": 128, "image_size": 56, "patch_size": 14}
    config = transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**SHAPE | SMALL),
        vision_config=vision,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    network = transformers.Idefics3ForConditionalGeneration(config)
    network.to(torch.bfloat16).save_pretrained(folder)
    special = ["<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    special += [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    names = [f"w{i}" for i in range(IMAGE - len(special))] + special + ["<image>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 112}, max_image_size={"longest_edge": 56}
        ),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="w0",
            eos_token="w2",
            pad_token="w0",
            additional_special_tokens=[*special, "<image>"],
        ),
        image_seq_len=4,
    ).save_pretrained(folder)
    return folder


def with_image(folder: Path, index: int, prompt: dict) -> dict:
    """An image before the text: one of two, in turns."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(index % 2).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    tokens = [IMAGE, *(token % WORDS for token in prompt["prompt_token_ids"])]
    data = {"image": Image.fromarray(pixels)}
    return {"prompts": {"prompt_token_ids": tokens, "multi_modal_data": data}}


def with_adapter(folder: Path, index: int, prompt: dict) -> dict:
    """Every other request has a LoRA adapter."""
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, str(folder / "adapter"))
    return {"prompts": prompt, "lora_request": adapter if index % 2 else None}


def llama_and_adapter(folder: Path) -> Path:
    """An adapter for the model's attention, in peft's format, beside it."""
    save_model(folder, "Llama", **SMALL)
    adapter = folder / "adapter"
    adapter.mkdir()
    outputs = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for layer in range(SHAPE["num_hidden_layers"]):
        for name, size in outputs.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in {"lora_A": (8, 256), "lora_B": (size, 8)}.items():
                weight = 0.05 * torch.randn(shape, generator=generator)
                weights[f"{prefix}.{part}.weight"] = weight
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": list(outputs)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder


MOE = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
SERVED = {
    "grouped-query attention": Served(model("Llama")),
    "multi-head attention": Served(model("Llama", num_key_value_heads=4, head_dim=80)),
    "multi-query attention": Served(
        model("Llama", num_attention_heads=2, num_key_value_heads=1, head_dim=128)
    ),
    "norms on queries and keys": Served(model("Qwen3")),
    "soft cap on attention": Served(
        model(
            "Gemma2",
            **TIED,
            head_dim=256,
            num_attention_heads=2,
            num_key_value_heads=1,
            query_pre_attn_scalar=64,
            attn_logit_softcapping=2.0,
            layer_types=4 * ["full_attention"],
        ),
        without={"softcap": 0.0},
    ),
    "attention sinks": Served(gpt_oss, without={"sinks": None}),
    "every second layer with a sliding window": Served(
        model("Gemma2", **TIED, **WINDOW, query_pre_attn_scalar=64)
    ),
    "five of six layers with a sliding window": Served(
        model(
            "Gemma3",
            config="Gemma3TextConfig",
            **TIED,
            **WINDOW,
            num_hidden_layers=6,
            query_pre_attn_scalar=64,
        )
    ),
    "no positions in the full-attention layers": Served(
        model("Cohere2", **WINDOW, logit_scale=1.0)
    ),
    "layers that attend within chunks": Served(
        model(
            "Llama4",
            config="Llama4TextConfig",
            attention_chunk_size=128,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=512,
        )
    ),
    "mixture of experts": Served(model("Mixtral", num_local_experts=4, **MOE)),
    "mixture of many small experts": Served(
        model("Qwen3Moe", num_experts=8, moe_intermediate_size=128, **MOE)
    ),
    "LoRA adapters": Served(
        llama_and_adapter,
        # With all slots in use vLLM's CPU kernels give requests without an adapter the last one.
        engine={"enable_lora": True, "max_loras": 2, "max_lora_rank": 8},
        extra=with_adapter,
        extra_matters=True,
    ),
    "images": Served(
        idefics3, engine={"skip_tokenizer_init": False}, extra=with_image, extra_matters=True
    ),
}

UNSERVABLE = {
    "a sliding window in every layer": model("Mistral", **WINDOW),
    "far more full-attention layers than others": model(
        "Cohere2", **WINDOW, layer_types=[*3 * ["full_attention"], "sliding_attention"]
    ),
}
"""Models that the server refuses, and the scheduler too where nobody asked the server."""


def prepare() -> None:
    """Set up this process for :func:`measure`, before it imports vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


@contextmanager
def engine(folder: Path, compression: CompressionConfig | None, **kwargs: Any) -> Iterator[Any]:
    """A real engine in this process; stock vLLM without ``compression``."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from .conftest import start, stop

    settings = {"kv_cache_memory_bytes": 48 << 20, "max_model_len": 2048}
    settings["skip_tokenizer_init"] = True
    try:
        llm = start(folder, compression, **settings | kwargs)
        yield llm
        stop(llm)
    finally:
        cleanup_dist_env_and_memory()
        AttentionBackendEnum.CPU_ATTN.clear_override()
        selector._cached_get_attn_backend.cache_clear()


def generate(llm: Any, requests: tuple, keep: bool = False, **sampling: Any) -> list:
    """Outputs of requests that run together: each a ratio and a prompt's length.

    Args:
        keep: what is in the prefix cache.
    """
    from vllm import SamplingParams

    from mikv_vllm.evaluation.quality import generate_together

    from .conftest import ratio

    if not keep:
        llm.reset_prefix_cache()
    params = [
        SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if one is None else ratio(one),
            **sampling,
        )
        for one, _ in requests
    ]
    prompts = [{"prompt_token_ids": random_tokens(n, seed=n)} for _, n in requests]
    return generate_together(llm, prompts, params)


def add_extras(llm: Any, served: Served, folder: Path) -> None:
    """Have the engine take prompts with what the kind adds to them."""
    enqueue = llm.enqueue

    def enqueue_with_extras(prompts: list, *args: Any, **kwargs: Any) -> list[str]:
        extras = [served.extra(folder, i, prompt) for i, prompt in enumerate(prompts)]
        given = {name: [extra[name] for extra in extras] for name in extras[0]}
        return enqueue(given.pop("prompts"), *args, **given, **kwargs)

    llm.enqueue = enqueue_with_extras


def answers(llm: Any, one: float | None) -> list:
    """Tokens and log-probabilities of native requests, two of each prompt."""
    requests = tuple((one, length) for length in (300, 300, 1100, 1100))
    outputs = [o.outputs[0] for o in generate(llm, requests, max_tokens=24, logprobs=5)]
    return [
        (list(o.token_ids), [{t: p.logprob for t, p in step.items()} for step in o.logprobs])
        for o in outputs
    ]


@contextmanager
def kernels_without(llm: Any, arguments: dict[str, Any]) -> Iterator[None]:
    """Our kernels ignore a feature of the model here."""
    from mikv_vllm.engine import cpu_backend

    def forget() -> None:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for layer in layers.values():
            vars(getattr(layer, "impl", layer)).pop("_layer_ops", None)

    ops = cpu_backend.LayerOps
    cpu_backend.LayerOps = lambda **given: ops(**given | arguments)
    forget()
    try:
        yield
    finally:
        cpu_backend.LayerOps = ops
        forget()


def measure(kind: str, folder: Path) -> dict[str, Any]:
    """What an engine does with a model of this kind."""
    from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
    from mikv_vllm.evaluation.quality import QualityRun
    from mikv_vllm.evaluation.windows import Window

    from .mutants import mutated

    served = SERVED[kind]
    served.save(folder)
    found: dict[str, Any] = {"kind": kind}
    with engine(folder, None, **served.engine) as stock:
        add_extras(stock, served, folder)
        found["stock"] = answers(stock, None)
    kwargs = served.engine | {"logits_processors": [ForcedDecoding]}
    with engine(folder, CompressionConfig(), **kwargs) as llm:
        add_extras(llm, served, folder)
        found["native"] = answers(llm, 1.0)
        outputs = generate(llm, REQUESTS, max_tokens=NEW_TOKENS)
        found["prompts"] = [len(output.prompt_token_ids) for output in outputs]
        found["reports"] = [output.kv_transfer_params[REPORT_FIELD] for output in outputs]
        again = generate(llm, REQUESTS, keep=True, max_tokens=1)
        found["cached"] = [output.num_cached_tokens for output in again]
        continuation = random_tokens(NEW_TOKENS, seed=1)
        windows = [Window(random_tokens(n, seed=n), continuation) for n in WINDOWS]
        llm.reset_prefix_cache()
        run = QualityRun(llm, windows)
        llm.reset_prefix_cache()
        found["divergence"] = run.measure(RATIO).divergence
        found["with_prefix"] = run.measure(RATIO).divergence
        with mutated(llm, "zeroed output"):
            found["broken"] = run.measure(RATIO).divergence
        if served.without is not None:
            with kernels_without(llm, served.without):
                found["without"] = run.measure(RATIO).divergence
        run.close()
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        pool = scheduler.store.pool
        found["held_pages"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        found["held_requests"] = len(scheduler.store.requests)
    return found


def refusal_at_start(kind: str, folder: Path) -> str:
    """What the scheduler says to a model that it has no tiers for."""
    UNSERVABLE[kind](folder)
    try:
        with engine(folder, CompressionConfig()):
            return ""
    except ValueError as error:
        return str(error)
