"""Speculative decoding with layers that have a compressed cache of their own."""

from statistics import fmean

import pytest
from vllm import SamplingParams

from mikv_vllm.evaluation.windows import calibration_text

from .conftest import idle_stats, ratio, speculating_engine
from .drafting_models import LEFT_OUT_LAYERS, make_draft_model, make_eagle_head, make_mtp_model
from .test_requests import first_gap, report
from .test_speculation import counters, logprob_differences

pytestmark = pytest.mark.engine

LAYERS = 30
"""Of the embedded model."""
DRAFT_LAYERS = {"eagle": 1, "mtp": 1, "draft_model": LAYERS - len(LEFT_OUT_LAYERS)}
RATIOS = (1.0, 4.0)


# An MTP layer runs as an EAGLE head does.
METHODS = ["eagle", pytest.param("mtp", marks=pytest.mark.slow), "draft_model"]


@pytest.fixture(scope="module", params=METHODS)
def method(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def speculating(method, engine, model_path, tmp_path_factory):
    """An engine that drafts with layers that have a cache."""
    tokens = engine.get_tokenizer().encode(calibration_text())
    texts = [tokens[i : i + 512] for i in range(0, 16 * 512, 512)]
    out = tmp_path_factory.mktemp(method)
    speculative = {"method": method, "num_speculative_tokens": 3}
    model = model_path
    if method == "eagle":
        speculative["model"] = str(make_eagle_head(model_path, texts, out))
    elif method == "mtp":
        model = make_mtp_model(model_path, texts, out)
    else:
        speculative["model"] = str(make_draft_model(model_path, out))
    with speculating_engine(model, speculative) as llm:
        yield llm


@pytest.fixture
def all_pages_free(speculating):
    yield
    idle_stats(speculating)


def answers(llm, windows, value: float, salt: str):
    """Answers to a prompt that is compressed while it is answered, and to a longer one."""
    params = SamplingParams(
        temperature=0, max_tokens=100, ignore_eos=True, logprobs=5, extra_args=ratio(value)
    )
    texts = windows[5].prompt[:220], windows[3].prompt[:900]
    prompts = [{"prompt_token_ids": text, "cache_salt": f"{salt} {value}"} for text in texts]
    return llm.generate(prompts, params, use_tqdm=False)


@pytest.mark.usefixtures("all_pages_free")
def test_tokens_and_reports_are_those_without_drafts(method, engine, speculating, windows):
    rates, differences, gaps = {}, {}, []
    for value in RATIOS:
        before = counters(speculating)
        differences[value] = []
        found, expected = (answers(llm, windows, value, method) for llm in (speculating, engine))
        for ours, theirs in zip(found, expected, strict=True):
            gaps.append(first_gap(theirs.outputs[0], ours.outputs[0]))
            differences[value] += logprob_differences(theirs.outputs[0], ours.outputs[0])
            told, wanted = dict(report(ours)), dict(report(theirs))
            for name in ("kv_bytes", "shared_kv_bytes", "uncompressed_kv_bytes"):
                wanted[name] = wanted[name] * (LAYERS + DRAFT_LAYERS[method]) // LAYERS
            assert told == wanted
        after = counters(speculating)
        accepted, drafts = (
            after[name] - before.get(name, 0)
            for name in (
                "vllm:spec_decode_num_accepted_tokens",
                "vllm:spec_decode_num_draft_tokens",
            )
        )
        rates[value] = accepted / drafts
        assert accepted > 20
    means = {value: fmean(of_ratio) for value, of_ratio in differences.items()}
    print(f"{method}: accepted drafts {rates}, differences {means}, gaps {gaps}")
    # Steps with several tokens round differently, and so do the biases of MiMo's form.
    assert max(gaps) <= (0.5 if method == "mtp" else 0.25)
    # At ratio 1 the model's layers are stock vLLM's, and only rounding differs.
    assert means[4.0] < max(0.02, 2 * means[1.0])
    # At ratio 4 the draft layers read tiers, and their guesses are as good.
    assert rates[4.0] > 0.75 * rates[1.0]


@pytest.mark.usefixtures("all_pages_free")
def test_the_next_turn_goes_on_from_a_tail_with_drafts(speculating, windows):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, extra_args=ratio(4.0))
    history = windows[0].prompt[:600]
    found = []
    for _ in range(2):
        prompt = {"prompt_token_ids": history, "cache_salt": "turns"}
        (output,) = speculating.generate(prompt, params, use_tqdm=False)
        found.append(report(output)["reused_tokens"])
        assert report(output)["kv_tokens"] == len(history) + 39
        history = [*history, *output.outputs[0].token_ids, *windows[1].prompt[:20]]
    assert found[0] == 0
    assert found[1] >= 600
