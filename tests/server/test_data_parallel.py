"""Two data-parallel engines behind one server."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from .serving import RunningServer

pytestmark = pytest.mark.engine

MODEL = "smollm2-135m-instruct"
FLAGS = [
    *("--max-model-len", "8192"),
    *("--kv-cache-memory-bytes", str(96 << 20)),  # 4,320 native tokens
    *("--kv-compression-ratio", "4"),
]
TWO = ["--data-parallel-size", "2"]


def bodies() -> list[dict]:
    texts = [f"{number} is a number. " * 120 for number in ("One", "Two", "Three", "Four")]
    common = {"model": MODEL, "max_tokens": 24, "temperature": 0, "logprobs": 1}
    common |= {"ignore_eos": True}  # reports count tokens: every answer has 24
    return [
        common | {"prompt": text, "kv_compression_ratio": ratio}
        for text in texts
        for ratio in (1.0, 4.0)
    ]


def answers(server: RunningServer, engines: list[int | None] | None = None) -> list[dict]:
    """Responses to :func:`bodies`, in order.

    Args:
        engines: rank of the engine for each request; None leaves the choice to the server.
    """

    def post(body: dict, engine: int | None) -> dict:
        headers = {} if engine is None else {"X-data-parallel-rank": str(engine)}
        response = server.client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(post, bodies(), engines or [None] * 8))


@pytest.fixture(scope="module")
def expected(tmp_path_factory, model_path):
    """Responses of a server with one engine, and the number of pages of its pool."""
    with RunningServer(FLAGS, tmp_path_factory.mktemp("one") / "log.txt") as server:
        return answers(server), server.client.get("/mikv/stats").json()["pages"]["total"]


@pytest.fixture(scope="module")
def server(tmp_path_factory, expected):
    cpus = sorted(os.sched_getaffinity(0))
    binding = {"VLLM_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"}
    log = tmp_path_factory.mktemp("two") / "log.txt"
    with RunningServer(FLAGS + TWO, log, env=binding) as running:
        yield running


def test_two_engines_give_the_results_of_one(server, expected):
    apart = []
    for ours, theirs in zip(answers(server), expected[0], strict=True):
        assert ours["kv_compression"] == theirs["kv_compression"]
        for one, other in zip(chosen(ours), chosen(theirs), strict=True):
            apart.append(abs(one[1] - other[1]))
            if one[0] != other[0]:
                break  # two tokens were almost equally likely; the texts differ from here on
    # The requests that share a step differ between runs, and so does the rounding of sums.
    print(f"{len(apart)} tokens, {sum(apart) / len(apart):.3f} apart, {max(apart):.3f} at most")
    assert len(apart) >= 48
    assert sum(apart) / len(apart) < 0.05
    assert max(apart) < 0.5


def chosen(answer: dict) -> list[tuple[str, float]]:
    """Each token and its log-probability."""
    logprobs = answer["choices"][0]["logprobs"]
    return list(zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True))


def test_both_engines_compress(server):
    answers(server, engines=[0, 0, 1, 1, 0, 0, 1, 1])  # both ratios on each engine
    metrics = server.client.get("/metrics").text
    line = r'^mikv_operations_total\{engine="(\d)",kind="compress",.*\} ([\d.]+)$'
    done = {engine: float(total) for engine, total in re.findall(line, metrics, re.MULTILINE)}
    assert done.keys() == {"0", "1"}
    assert all(done.values())


def test_stats_are_sums_over_both_engines(server, expected):
    answers(server)
    stats = server.client.get("/mikv/stats").json()
    assert stats["pages"]["total"] == 2 * expected[1]
    assert stats["operations"]["compress"] >= 4


def test_a_prompt_that_fits_into_no_engine_is_an_error_400(server):
    body = {"model": MODEL, "prompt": [7] * 4400, "max_tokens": 4}
    refused = server.client.post("/v1/completions", json=body | {"kv_compression_ratio": 1.0})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "kv_compression_ratio")
    assert "holds 4320" in error["message"]
    answer = server.client.post("/v1/completions", json=body)
    assert answer.json()["kv_compression"]["achieved_ratio"] > 3.6
