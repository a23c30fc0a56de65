"""Other settings on the real engine: H2O, 16 bits, a small pool, torch.compile, balanced keys."""

import pytest
from vllm import SamplingParams

from mikv_vllm.config import CompressionConfig
from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun
from mikv_vllm.evaluation.windows import cut_windows
from mikv_vllm.server.metrics import install_metrics

from .conftest import BLOCK_SIZE, ratio, start, stop

pytestmark = pytest.mark.engine

PAGE_BYTES = BLOCK_SIZE * 2 * 2 * 64 * 3 * 30
PAGES = 40


@pytest.fixture(scope="module")
def small_engine(model_path):
    """Room for 1,280 native tokens, and prompts that come in chunks."""
    llm = start(
        model_path,
        CompressionConfig(importance="h2o", high_bits=16),
        kv_cache_memory_bytes=(PAGES + 1) * PAGE_BYTES,
        max_model_len=1024,
        max_num_batched_tokens=256,
        logits_processors=[ForcedDecoding],
        disable_log_stats=False,
    )
    install_metrics(llm.llm_engine.logger_manager, llm.llm_engine.vllm_config)
    yield llm
    stop(llm)


def quality(llm, ratio, prompt):
    """Over two windows of ``prompt`` + 100 tokens."""
    run = QualityRun(llm, cut_windows(llm.get_tokenizer(), 2, prompt, 100))
    measured = run.measure(ratio)
    run.close()
    print(measured)
    return measured


def preemptions(llm) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def test_statistics_before_the_first_request(small_engine):
    stats = small_engine.collective_rpc("mikv_stats")[0]
    assert stats["pages"] == {"total": PAGES, "free": PAGES, "native": 0, "tiered": 0}


def test_quality_with_h2o_and_sixteen_bits(small_engine):
    measured = quality(small_engine, 2.0, 600)
    assert measured.achieved_ratio > 1.7
    assert 0 < measured.divergence < 0.01


def test_preempted_requests_finish_compressed(small_engine):
    before = preemptions(small_engine)
    windows = cut_windows(small_engine.get_tokenizer(), 4, 500, 1)
    outputs = small_engine.generate(
        [{"prompt_token_ids": window.prompt} for window in windows],
        SamplingParams(temperature=0, max_tokens=400, ignore_eos=True, extra_args=ratio(2.0)),
        use_tqdm=False,
    )
    assert preemptions(small_engine) > before
    for output in outputs:
        assert len(output.outputs[0].token_ids) == 400
        report = output.kv_transfer_params["kv_compression"]
        assert report["kv_tokens"] == 899
        assert report["achieved_ratio"] > 1.7
    stats = small_engine.collective_rpc("mikv_stats")[0]
    assert stats["pages"]["free"] == PAGES


@pytest.fixture(scope="module")
def compiled_engine(model_path):
    """vLLM's default mode, torch.compile; and the paper's codec."""
    llm = start(
        model_path,
        CompressionConfig(codec="balanced"),
        enforce_eager=False,
        max_model_len=1024,
        logits_processors=[ForcedDecoding],
    )
    yield llm
    stop(llm)


@pytest.mark.slow
def test_quality_with_torch_compile_and_balanced_keys(compiled_engine):
    measured = quality(compiled_engine, 3.5, 900)
    assert measured.low_format == "B4V4"
    assert measured.achieved_ratio > 3.1
    assert 0 < measured.divergence < 0.02
