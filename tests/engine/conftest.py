"""Engines, each started once."""

import gc
import time
from contextlib import contextmanager

import pytest

from mikv_vllm.config import RATIO_FIELD, CompressionConfig

BLOCK_SIZE = 32
ENGINE = {
    "enforce_eager": True,
    "max_model_len": 8192,
    "block_size": BLOCK_SIZE,
    "max_logprobs": 20,
}


def start(model, compression: CompressionConfig | None, **kwargs):
    """A real engine; stock vLLM without ``compression``."""
    from vllm import LLM

    settings = {**ENGINE, "kv_cache_memory_bytes": 512 << 20, **kwargs}
    if compression is not None:
        settings.setdefault("worker_cls", "tests.engine.mutants.MutableWorker")
        settings["scheduler_cls"] = "mikv_vllm.engine.scheduler.TieredScheduler"
        settings["additional_config"] = compression.to_additional_config()
    return LLM(model=str(model), **settings)


@contextmanager
def speculating_engine(model, speculative: dict):
    """MiKV with speculative decoding, and counts of its drafts."""
    from mikv_vllm import LLM

    settings = ENGINE | {"kv_cache_memory_bytes": 512 << 20, "disable_log_stats": False}
    llm = LLM(str(model), speculative_config=speculative, **settings)
    try:
        yield llm
    finally:
        stop(llm)


def stop(llm) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()


@pytest.fixture(scope="session")
def engine(model_path):
    """MiKV with default settings, a forced-decoding processor and a worker that can be mutated."""
    from mikv_vllm.evaluation.forced_decoding import ForcedDecoding

    llm = start(model_path, CompressionConfig(), logits_processors=[ForcedDecoding])
    yield llm
    stop(llm)


@pytest.fixture(scope="session")
def windows(engine):
    """Eight windows of 1,536 + 256 tokens."""
    from mikv_vllm.evaluation.windows import cut_windows

    return cut_windows(engine.get_tokenizer(), 8, 1536, 256)


@pytest.fixture
def all_pages_free(engine):
    """Afterwards the engine holds no page."""
    yield
    idle_stats(engine)


def idle_stats(engine) -> dict:
    """The statistics of an engine without requests, the same from all ranks; no page is held.

    An engine tells its workers of the last request's end in a step that follows its answer.
    """
    deadline = time.monotonic() + 30
    if hasattr(engine.llm_engine.engine_core, "engine_core"):  # here, where nobody else steps it
        engine.llm_engine.step()
    while True:
        stats, *others = engine.collective_rpc("mikv_stats")
        assert all(other == stats for other in others)
        if stats["pages"]["free"] == stats["pages"]["total"]:
            assert stats["requests"] == {"native": 0, "tiered": 0}
            return stats
        assert time.monotonic() < deadline, stats
        time.sleep(0.1)


def ratio(value: float, **extra) -> dict:
    """``extra_args`` of a request at this ratio."""
    return {RATIO_FIELD: value, **extra}
