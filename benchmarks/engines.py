"""The engines that a benchmark compares. All are alive at the same time and are run in turn."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vllm import LLM, SamplingParams

from mikv_vllm.config import RATIO_FIELD
from mikv_vllm.models import embedded_model

BLOCK_SIZE = 32
"""Tokens per page in all engines. This is MiKV's default on a CPU."""
NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
"""Speculative decoding that drafts what followed the last tokens earlier in the sequence."""
MAX_MODEL_LEN = 8192
"""Tokens of the longest request."""


@dataclass(frozen=True)
class Contender:
    """An engine and a ratio that are measured."""

    name: str
    engine: str
    """``stock``, ``stock fp8`` or ``mikv``; with `` drafts`` behind it, one that speculates."""
    ratio: float | None = None
    """Requested ratio; None for stock vLLM."""

    @property
    def extra_args(self) -> dict[str, float] | None:
        return None if self.ratio is None else {RATIO_FIELD: self.ratio}


STOCK = Contender("stock bf16", "stock")
STOCK_FP8 = Contender("stock fp8", "stock fp8")
RATIOS = tuple(Contender(f"ratio {r:g}", "mikv", r) for r in (1.0, 2.0, 3.0, 4.0, 5.0))


@contextmanager
def engines(names: set[str], pool_bytes: int, **settings) -> Iterator[dict[str, LLM]]:
    """Start engines, and stop them at the end of the ``with`` block.

    Args:
        names: as :attr:`Contender.engine`.
        pool_bytes: bytes of the pool of each engine.
        **settings: arguments of ``vllm.LLM`` for all engines.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from mikv_vllm import LLM as TieredLLM

    common = {
        "model": str(embedded_model()),
        "enforce_eager": True,
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory_bytes": pool_bytes,
        **settings,
    }
    started: dict[str, LLM] = {}
    try:
        for name in sorted(names):
            print(f"starting {name} …", flush=True)
            more = {"speculative_config": NGRAMS} if name.endswith(" drafts") else {}
            if name.startswith("mikv"):
                started[name] = TieredLLM(**common, **more)
            else:
                cache = "fp8" if name == "stock fp8" else "auto"
                started[name] = LLM(**common, **more, kv_cache_dtype=cache)
        yield started
    finally:
        for llm in started.values():
            llm.llm_engine.engine_core.shutdown()


_counter = iter(range(1 << 60))


def step_times(
    llm: LLM, prompts: list[list[int]], new_tokens: int, extra_args: dict | None
) -> tuple[float, list[float], list[dict | None]]:
    """Run requests that arrive together.

    Args:
        llm: the engine; no other request is in it.
        prompts: token ids.
        new_tokens: tokens to decode per request.
        extra_args: of ``SamplingParams``, with the ratio.

    Returns:
        Seconds until every request has its first token, seconds of each later step that includes
        all requests, and the reports of the requests (None in stock vLLM).
    """
    engine = llm.llm_engine
    params = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, ignore_eos=True, extra_args=extra_args
    )
    waiting = set()
    start = time.perf_counter()
    for prompt in prompts:
        request_id = f"bench-{next(_counter)}"
        waiting.add(request_id)
        engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
    running: dict[str, int] = {}
    first_tokens, times, reports = 0.0, [], []
    last = start
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            running[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                reports.append((output.kv_transfer_params or {}).get("kv_compression"))
        if first_tokens and len(outputs) == len(prompts):
            times.append(now - last)
        if not first_tokens and len(running) == len(prompts):
            first_tokens = now - start
        last = now
    return first_tokens, times, reports
