"""A real engine on CPU tensors whose Triton kernels are interpreted: vLLM's and ours.

    python -m tests.engine.interpreted FOLDER cpu|triton 1|2 BATCH OUT.json

Serves the model in FOLDER with the CPU backend or the GPU one, and vLLM's V1 or V2 model runner,
and writes what it predicted for one of the batches below.
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
"""Of the model that ``test_gpu_backend`` makes: 64 channels, keys and values, 2 bytes, 2 layers."""


@dataclass(frozen=True)
class Batch:
    """Requests that run together, and the pool that they run in."""

    requests: tuple[tuple[float, int], ...]
    """Ratio and prompt length of each."""
    new_tokens: int
    pages: int
    native_share: float = 1.0


BATCHES = {
    "in place": Batch(((1.0, 40), (4.0, 180), (3.0, 140)), 8, pages=9),
    "long": Batch(((1.0, 40), (4.0, 200)), 4, pages=9, native_share=0.5),
    "many": Batch(((1.0, 90), (4.0, 500), (2.0, 430), (5.0, 350)), 60, pages=128),
}
"""The first compresses in place, for want of free pages; the second while it computes a prompt."""


def prepare(backend: str, runner: str, interpret: bool = True) -> None:
    """Make vLLM believe in Triton; before it is imported."""
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

    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # vLLM's cache write asks for it
    from mikv_vllm.engine.cpu_worker import TieredCPUWorker

    if backend == "triton":
        path = "gpu_backend.TieredTritonAttentionBackend"
        TieredCPUWorker.backends = {"CPU_ATTN": path}


def warm_up(worker) -> None:
    """What the GPU worker does at its start, here with one low format."""
    from mikv_vllm.engine.gpu_worker import TieredGPUWorker
    from mikv_vllm.engine.worker_context import context

    context.compression = context.compression.model_copy(update={"low_formats": ("K6433V3",)})
    TieredGPUWorker._warm_up(worker)


def start_engine(folder: str, batch: Batch, **settings):
    """An engine in this process, with a pool for the batch and settings beside the usual."""
    from vllm import LLM

    from mikv_vllm.config import CompressionConfig

    from .generated import VOCABULARY

    config = CompressionConfig(**SETTINGS, native_share=batch.native_share, **settings)
    return LLM(
        model=folder,
        dtype="float16",  # the interpreter multiplies bf16 matrices wrongly
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=(batch.pages + 1) * PAGE_BYTES,
        block_size=BLOCK_SIZE,
        max_model_len=256 if batch.pages < 32 else 1024,
        max_num_batched_tokens=256,
        max_logprobs=VOCABULARY,
        enable_prefix_caching=False,
        scheduler_cls="mikv_vllm.engine.scheduler.TieredScheduler",
        worker_cls="mikv_vllm.engine.cpu_worker.TieredCPUWorker",
        additional_config=config.to_additional_config(),
    )


def generate(engine, batch: Batch) -> list:
    """The outputs of a batch's requests, with the log-probabilities of all tokens."""
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
    """What was done; of each request its report, tokens and log-probabilities ``[tokens][512]``."""
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
