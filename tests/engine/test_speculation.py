"""Speculative decoding over tiers: tokens, tiers and reports are those without it."""

import pytest
from vllm import SamplingParams

from benchmarks.engines import NGRAMS

from .conftest import idle_stats, ratio, speculating_engine
from .test_requests import first_gap, report

pytestmark = pytest.mark.engine

RATIOS = (1.0, 2.0, 4.0)


@pytest.fixture(scope="module")
def speculating(model_path):
    """An engine that drafts what followed the last tokens earlier in the request."""
    with speculating_engine(model_path, NGRAMS) as llm:
        yield llm


@pytest.fixture
def all_pages_free(speculating):
    yield
    idle_stats(speculating)


def prompts(windows, salt: str) -> list[dict]:
    """Texts that repeat themselves, and texts that do not."""
    repeated = [windows[i].prompt[:150] * 9 for i in range(3)]
    # The last one is compressed while it is generated.
    texts = [*repeated, *[windows[i].prompt for i in range(3, 5)], windows[5].prompt[:60] * 2]
    return [{"prompt_token_ids": text, "cache_salt": salt} for text in texts]


def answers(llm, windows, value: float, **sampling):
    sampling = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True} | sampling
    params = SamplingParams(logprobs=5, extra_args=ratio(value), **sampling)
    return llm.generate(prompts(windows, f"drafts {value}"), params, use_tqdm=False)


@pytest.fixture(scope="module")
def expected(engine, windows):
    """Answers without drafts, by ratio."""
    return {value: answers(engine, windows, value) for value in RATIOS}


@pytest.fixture(scope="module")
def rounding() -> list[float]:
    """The mean difference at ratio 1, where only the number of tokens in a step differs."""
    return []


def logprob_differences(one, other) -> list[float]:
    """Of the log-probabilities of the tokens that both answers share before they part."""
    differences = []
    for mine, yours, ours, theirs in zip(
        one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=True
    ):
        if mine != yours:
            break
        differences.append(abs(ours[mine].logprob - theirs[mine].logprob))
    return differences


def counters(llm) -> dict[str, int]:
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num") and hasattr(metric, "value")
    }


@pytest.mark.usefixtures("all_pages_free")
@pytest.mark.parametrize("value", RATIOS)
def test_tokens_and_reports_are_those_without_drafts(
    speculating, windows, expected, value, rounding
):
    before = counters(speculating)
    found = answers(speculating, windows, value)
    after = counters(speculating)
    parted = 0
    differences = []
    for ours, theirs in zip(found, expected[value], strict=True):
        assert report(ours) == report(theirs)
        one, other = theirs.outputs[0], ours.outputs[0]
        # Steps with several tokens round differently: a near tie may tip over. How many do
        # depends on the CPU's instructions.
        parted += list(one.token_ids) != list(other.token_ids)
        assert first_gap(one, other) <= 0.25
        differences += logprob_differences(one, other)
    accepted, drafts = (
        after[name] - before.get(name, 0)
        for name in ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
    )
    difference = sum(differences) / len(differences)
    print(
        f"ratio {value}: {accepted} of {drafts} drafts accepted, {parted} answers parted, "
        f"{len(differences)} tokens compared, mean difference {difference:.4f}"
    )
    assert accepted > 300
    if value == 1.0:
        rounding.append(difference)
        assert difference < 0.1
    else:
        assert difference < max(0.02, *(2 * one for one in rounding))


@pytest.mark.usefixtures("all_pages_free")
def test_the_next_turn_goes_on_from_a_tail_with_drafts(speculating, windows):
    """Rejected drafts are no tokens of a kept tail."""
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True, extra_args=ratio(4.0))
    history = windows[0].prompt[:150] * 8
    found = []
    for _ in range(3):
        prompt = {"prompt_token_ids": history, "cache_salt": "turns"}
        (output,) = speculating.generate(prompt, params, use_tqdm=False)
        found.append(report(output)["reused_tokens"])
        assert report(output)["kv_tokens"] == len(history) + 49
        history = [*history, *output.outputs[0].token_ids, *windows[1].prompt[:20]]
    print(found)
    assert found[0] == 0
    assert found[1] >= 1200
    assert found[2] >= 1270


@pytest.mark.usefixtures("all_pages_free")
def test_samples_of_one_prompt_share_its_blocks(speculating, windows):
    params = SamplingParams(
        n=3, temperature=0.8, seed=3, max_tokens=40, ignore_eos=True, extra_args=ratio(4.0)
    )
    prompt = {"prompt_token_ids": windows[2].prompt[:150] * 8, "cache_salt": "n"}
    (output,) = speculating.generate(prompt, params, use_tqdm=False)
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    assert all(len(one.token_ids) == 40 for one in output.outputs)


@pytest.mark.usefixtures("all_pages_free")
def test_a_stop_string_ends_an_answer_within_drafts(speculating, windows):
    params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, extra_args=ratio(4.0))
    prompt = {"prompt_token_ids": windows[0].prompt[:150] * 8, "cache_salt": "stop"}
    (whole,) = speculating.generate(prompt, params, use_tqdm=False)
    text = whole.outputs[0].text
    params.stop = [text[len(text) // 2 :][:12]]
    (stopped,) = speculating.generate(prompt, params, use_tqdm=False)
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].text == text[: text.index(params.stop[0])]
    assert report(stopped)["achieved_ratio"] > 3.0
