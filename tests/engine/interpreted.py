"""A real engine on CPU tensors that interprets the Triton kernels, vLLM's and ours.

    python -m tests.engine.interpreted FOLDER cpu|triton 1|2 BATCH OUT.json

Serves the model in FOLDER with the CPU backend or the GPU backend, and vLLM's V1 or V2 model
runner. Writes its predictions for one of the batches below.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

SETTINGS = {"min_tokens": 64, "window": 16, "recent": 8}
BLOCK_SIZE = 32
PAGE_BYTES = BLOCK_SIZE * 64 * 2 * 2 * 2
"""Of the model in ``test_gpu_backend``: 64 channels, keys and values, 2 bytes, 2 layers."""


@dataclass(frozen=True)
class Batch:
    """Requests that run together, and the size of the block pool."""

    requests: tuple[tuple[float, int], ...]
    """Ratio and prompt length of each request."""
    new_tokens: int
    pages: int
    native_share: float = 1.0


BATCHES = {
    "in place": Batch(((1.0, 40), (4.0, 180), (3.0, 140)), 8, pages=9),
    "long": Batch(((1.0, 40), (4.0, 200)), 4, pages=9, native_share=0.5),
    "blocks": Batch(((4.0, 1015), (2.0, 1300)), 20, pages=160),
    "many": Batch(((1.0, 90), (4.0, 500), (2.0, 430), (5.0, 350)), 60, pages=128),
}
"""The first batch compresses in place, because too few pages are free. The second one compresses
during prefill. Requests of the third one have two blocks, or begin the second one."""


def prepare(backend: str, runner: str, interpret: bool = True) -> None:
    """Make vLLM use Triton without a GPU. Must be called before vLLM is imported."""
    os.environ |= {
        "TRITON_INTERPRET": str(int(interpret)),
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(runner == "2")),
    }
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(
        driver=SimpleNamespace(is_active=lambda: True),
        compiler=SimpleNamespace(supports_target=lambda target: False),
    )
    import torch

    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # used by vLLM's cache write
    from mikv_vllm.engine.cpu_worker import TieredCPUWorker

    if backend == "triton":
        path = "gpu_backend.TieredTritonAttentionBackend"
        TieredCPUWorker.backends = {"CPU_ATTN": path}


def warm_up(worker) -> None:
    """Run the warm-up of the GPU worker, with one low format."""
    from mikv_vllm.engine.gpu_worker import TieredGPUWorker
    from mikv_vllm.engine.worker_context import context

    context.compression = context.compression.model_copy(update={"low_formats": ("K6433V3",)})
    TieredGPUWorker._warm_up(worker)


def start_engine(folder: str, batch: Batch, **settings):
    """Start an engine in this process, with the pool of the batch and additional settings."""
    from vllm import LLM

    from mikv_vllm.config import CompressionConfig

    from .generated import VOCABULARY

    config = CompressionConfig(**SETTINGS, native_share=batch.native_share, **settings)
    return LLM(
        model=folder,
        dtype="float16",  # the interpreter computes wrong products of bf16 matrices
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=(batch.pages + 1) * PAGE_BYTES,
        block_size=BLOCK_SIZE,
        max_model_len=256 if batch.pages < 32 else 1344,
        max_num_batched_tokens=256,
        max_logprobs=VOCABULARY,
        enable_prefix_caching=False,
        scheduler_cls="mikv_vllm.engine.scheduler.TieredScheduler",
        worker_cls="mikv_vllm.engine.cpu_worker.TieredCPUWorker",
        additional_config=config.to_additional_config(),
    )


def generate(engine, batch: Batch) -> list:
    """Return the outputs of the requests, with the log-probabilities of all tokens."""
    from vllm import SamplingParams

    from mikv_vllm.evaluation.quality import generate_together

    from .conftest import ratio
    from .generated import VOCABULARY, random_tokens

    params = [
        SamplingParams(
            max_tokens=batch.new_tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            logprobs=VOCABULARY,
            extra_args=ratio(one),
        )
        for one, _ in batch.requests
    ]
    prompts = [
        {"prompt_token_ids": random_tokens(length, seed=length)} for _, length in batch.requests
    ]
    return generate_together(engine, prompts, params)


def predict(folder: str, backend: str, batch: Batch) -> dict:
    """Return the operation counts, and report, tokens and log-probabilities of each request.

    Log-probabilities are ``[tokens][512]``.
    """
    from .generated import VOCABULARY

    engine = start_engine(folder, batch)
    found = []
    for output in generate(engine, batch):
        one = output.outputs[0]
        found.append(
            {
                "report": output.kv_transfer_params["kv_compression"],
                "tokens": list(one.token_ids),
                "log_probs": [
                    [step[token].logprob for token in range(VOCABULARY)] for step in one.logprobs
                ],
            }
        )
    if backend == "triton":
        engine.collective_rpc(warm_up)
    operations = engine.collective_rpc("mikv_stats")[0]["operations"]
    return {"operations": operations, "requests": found}


if __name__ == "__main__":
    folder, backend, runner, batch, out = sys.argv[1:]
    prepare(backend, runner)
    Path(out).write_text(json.dumps(predict(folder, backend, BATCHES[batch])))
