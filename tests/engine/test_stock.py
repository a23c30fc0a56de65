"""At ratio 1 MiKV is stock vLLM, bit for bit."""

import pytest
from vllm import SamplingParams

from mikv_vllm.evaluation.quality import generate_together

from .conftest import ratio, start, stop

pytestmark = pytest.mark.engine

SAMPLING = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
}


def answers(llm, windows, extra_args):
    # All prompts fit into one step: stock vLLM on CPU cannot cut the prompt of a seeded request.
    prompts = [{"prompt_token_ids": windows[i % 8].prompt[40 * i : 41 * i + 20]} for i in range(32)]
    result = {}
    for name, sampling in SAMPLING.items():
        llm.reset_prefix_cache()
        params = SamplingParams(**sampling, max_tokens=24, logprobs=5, extra_args=extra_args)
        outputs = generate_together(llm, prompts, params)
        result[name] = [
            (
                o.outputs[0].token_ids,
                [{t: p.logprob for t, p in step.items()} for step in o.outputs[0].logprobs],
            )
            for o in outputs
        ]
    return result


@pytest.fixture(scope="module")
def stock_answers(model_path, windows):
    llm = start(model_path, None)
    yield answers(llm, windows, None)
    stop(llm)


@pytest.mark.parametrize("extra_args", [None, ratio(1.0)], ids=["none", "one"])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_ratio_one_is_stock_vllm(engine, windows, stock_answers, extra_args, sampling):
    assert answers(engine, windows, extra_args)[sampling] == stock_answers[sampling]
