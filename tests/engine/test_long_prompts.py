"""A prompt of twice the pool's native tokens is compressed while it is computed."""

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

import mikv_vllm
from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun
from mikv_vllm.evaluation.windows import cut_windows
from mikv_vllm.server import wiring

from .conftest import BLOCK_SIZE, ENGINE, idle_stats, ratio, stop
from .mutants import mutated

pytestmark = pytest.mark.engine

PROMPT, POOL_TOKENS = 6000, 3072
TOKEN_BYTES = 30 * 3 * 64 * 2 * 2  # layers, KV heads, channels, key and value, 16 bits
MOST_DIVERGENCE = 0.008  # as for a prompt that fits, at ratio 4


@pytest.fixture(scope="module")
def reference(engine):
    """Predictions behind the prompt at ratio 1, in a pool that holds it."""
    run = QualityRun(engine, cut_windows(engine.get_tokenizer(), 2, PROMPT, 64))
    yield run
    run.close()


@pytest.fixture(scope="module")
def small(model_path, reference):
    """MiKV in a pool of half the prompt, with a worker that can be mutated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(wiring.WORKER_CLS, "cpu", "tests.engine.mutants.MutableWorker")
        llm = mikv_vllm.LLM(
            str(model_path),
            kv_compression_ratio=4.0,
            logits_processors=[ForcedDecoding],
            **ENGINE | {"max_model_len": 6400},
            kv_cache_memory_bytes=POOL_TOKENS * TOKEN_BYTES,
        )
    yield llm
    stop(llm)


def test_the_answer_is_as_good_as_if_the_prompt_fitted(small, reference):
    reference.use(small)
    quality = reference.measure(4.0)
    print(quality)
    assert quality.divergence <= MOST_DIVERGENCE
    assert quality.achieved_ratio >= 3.6
    stats = idle_stats(small)
    assert (stats["pages"]["total"] + 1) * BLOCK_SIZE == POOL_TOKENS
    # The beginning was compressed once, what followed joined it.
    assert stats["operations"]["demote"] >= 2 * (PROMPT - POOL_TOKENS) // 32


@pytest.mark.slow
def test_a_beginning_restored_wrongly_is_noticed(small, reference):
    reference.use(small)
    with mutated(small, "zeroed workspace"):
        divergence = reference.measure(4.0).divergence
    print(divergence)
    assert divergence > 2 * MOST_DIVERGENCE


@pytest.mark.slow
def test_long_and_short_prompts_share_the_pool(small, reference):
    prompt = cut_windows(small.get_tokenizer(), 1, PROMPT, 1)[0].prompt
    prompts = [{"prompt_token_ids": prompt[-count:]} for count in (6000, 50, 5000, 900, 4000)]
    params = [
        SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0, extra_args=ratio(one))
        for one in (4.0, 1.0, 5.0, 2.0, 3.0)
    ]
    outputs = small.generate(prompts, params, use_tqdm=False)
    reports = [output.kv_transfer_params["kv_compression"] for output in outputs]
    for output, report in zip(outputs, reports, strict=True):
        assert len(output.outputs[0].token_ids) == 40
        assert report["achieved_ratio"] >= 0.85 * report["requested_ratio"]
    idle_stats(small)


def test_what_does_not_fit_at_its_ratio_is_refused(small):
    params = SamplingParams(max_tokens=40, extra_args=ratio(1.0))
    with pytest.raises(
        VLLMValidationError, match=r"5000 tokens, but at kv_compression_ratio 1 the KV cache"
    ):
        small.generate([{"prompt_token_ids": [1] * 5000}], params, use_tqdm=False)
    idle_stats(small)


def test_an_answer_ends_where_the_pool_does(small):
    fits = POOL_TOKENS - BLOCK_SIZE  # vLLM keeps one page for itself
    params = SamplingParams(max_tokens=400, ignore_eos=True, extra_args=ratio(1.0))
    prompts = [{"prompt_token_ids": [7] * (fits - 100)}]
    (output,) = small.generate(prompts, params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 100
    assert output.outputs[0].finish_reason == "length"
    idle_stats(small)
