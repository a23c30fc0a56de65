"""The HTTP interface of a real server with the embedded model."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from mikv_vllm.evaluation import cli
from mikv_vllm.server.middleware import COHERE_ROUTE, GENERATE_ROUTES

from .serving import RunningServer

pytestmark = pytest.mark.engine

KEY = "a-key-for-tests"
MODEL = "smollm2-135m-instruct"
LONG_PROMPT = "The quick brown fox jumps over the lazy dog. " * 200  # about 2,000 tokens
FLAGS = [
    *("--max-model-len", "4096"),
    *("--kv-cache-memory-bytes", str(400 << 20)),
    *("--api-key", KEY),
    *("--kv-compression-ratio", "2.0"),
    "--enable-prompt-tokens-details",
    "--enable-scale-out",
]
REPORT_FIELDS = {
    "requested_ratio",
    "achieved_ratio",
    "kv_tokens",
    "high_tokens",
    "low_tokens",
    "reused_tokens",
    "kv_bytes",
    "shared_kv_bytes",
    "uncompressed_kv_bytes",
    "low_format",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    # Development mode adds routes, for example /pause.
    with RunningServer(FLAGS, log, KEY, env={"VLLM_SERVER_DEV_MODE": "1"}) as running:
        yield running


def completion(server: RunningServer, **fields) -> dict:
    body = {"model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 8, "temperature": 0} | fields
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def found_tokens(body: dict) -> int:
    """Tokens of the prompt that were found in the prefix cache."""
    details = body["usage"]["prompt_tokens_details"]
    return (details or {}).get("cached_tokens") or 0


def events(response: httpx.Response) -> list[dict]:
    lines = (line for line in response.text.splitlines() if line.startswith("data: {"))
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def request_of(route: str) -> dict:
    """A small request for each of the routes."""
    if route in ("/v1/completions", "/invocations"):
        return {"model": MODEL, "prompt": LONG_PROMPT, "max_tokens": 4}
    if route == "/v1/responses":
        return {"model": MODEL, "input": LONG_PROMPT, "max_output_tokens": 4}
    if route == "/inference/v1/generate":
        return {"token_ids": [500 + i % 300 for i in range(2000)], "sampling_params": SAMPLING}
    messages = [{"role": "user", "content": LONG_PROMPT}]
    if route == "/v1/chat/completions/batch":
        return {"model": MODEL, "messages": [messages, messages], "max_tokens": 4}
    return {"model": MODEL, "messages": messages, "max_tokens": 4}


SAMPLING = {"max_tokens": 4}
ROUTES = [route for route in GENERATE_ROUTES if route != COHERE_ROUTE]
STREAMING_ROUTES = [route for route in ROUTES if not route.endswith("/batch")]
HEADER = {"X-KV-Compression-Ratio": "4"}


@pytest.mark.parametrize("ratio", [3, 4.0, 5.0])
def test_ratio_is_achieved(server, ratio):
    # Blocks of a smaller ratio would serve it as well.
    fields = {"kv_compression_ratio": ratio, "cache_salt": str(ratio)}
    report = completion(server, **fields)["kv_compression"]
    assert set(report) == REPORT_FIELDS
    assert report["requested_ratio"] == ratio
    assert report["achieved_ratio"] == pytest.approx(ratio, rel=0.13)
    assert report["high_tokens"] + report["low_tokens"] == report["kv_tokens"]
    exact = report["uncompressed_kv_bytes"] / report["kv_bytes"]
    assert report["achieved_ratio"] == pytest.approx(exact, abs=1e-3)
    assert report["low_format"].startswith("K")


def test_ratio_1_is_untouched(server):
    report = completion(server, kv_compression_ratio=1.0)["kv_compression"]
    assert (report["requested_ratio"], report["achieved_ratio"]) == (1.0, 1.0)
    assert (report["high_tokens"], report["low_tokens"], report["low_format"]) == (0, 0, None)


def test_default_comes_from_the_command_line(server):
    for fields in ({}, {"kv_compression_ratio": None}):
        assert completion(server, **fields)["kv_compression"]["requested_ratio"] == 2.0


def test_ratio_in_xargs(server):
    fields = {"vllm_xargs": {"kv_compression_ratio": 3.0}}
    assert completion(server, **fields)["kv_compression"]["requested_ratio"] == 3.0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", ["NaN", '"four"', "true", "[4]", "0.5", "1e9"])
def test_wrong_ratio_is_400_on_every_route(server, route, value):
    body = json.dumps(request_of(route) | {"kv_compression_ratio": "@"}).replace('"@"', value)
    headers = {"Content-Type": "application/json"}
    response = server.client.post(route, content=body, headers=headers)
    error = response.json()["error"]
    assert response.status_code == 400
    if route == "/v1/messages":
        # vLLM 0.33 has Anthropic's names of errors.
        assert error["type"] in ("BadRequestError", "invalid_request_error")
    else:
        assert error["type"] == "BadRequestError"
        assert (error["code"], error["param"]) == (400, "kv_compression_ratio")
    assert error["message"].startswith("kv_compression_ratio is ")
    assert "from 1.0" in error["message"]


@pytest.mark.parametrize("place", ["sampling_params", "extra_args"])
def test_wrong_ratio_in_sampling_params_is_400(server, place):
    wrong = {"kv_compression_ratio": 99}
    params = SAMPLING | (wrong if place == "sampling_params" else {"extra_args": wrong})
    body = request_of("/inference/v1/generate") | {"sampling_params": params}
    error = server.client.post("/inference/v1/generate", json=body).json()["error"]
    assert error["code"] == 400
    assert "kv_compression_ratio is 99, which is out of range" in error["message"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("in_header", [False, True])
def test_body_of_every_route_has_the_report(server, route, in_header):
    fields = {} if in_header else {"kv_compression_ratio": 4}
    headers = HEADER if in_header else {}
    response = server.client.post(route, json=request_of(route) | fields, headers=headers)
    body = response.json()
    report = body["kv_compression"]
    assert set(report) == REPORT_FIELDS
    assert report["requested_ratio"] == 4.0
    assert report["low_tokens"] > 0
    assert body["usage"]["kv_compression"] == report
    assert json.loads(response.headers["X-KV-Compression"]) == report
    assert body.get("kv_transfer_params") is None


@pytest.mark.parametrize("route", STREAMING_ROUTES)
@pytest.mark.parametrize("usage", [False, True])
def test_last_event_of_a_stream_has_the_report(server, route, usage):
    body = request_of(route) | {"stream": True, "kv_compression_ratio": 4}
    if route not in ("/v1/responses", "/v1/messages"):  # these always show the usage
        body |= {"stream_options": {"include_usage": usage}}
    response = server.client.post(route, json=body)
    reports = [find_report(event) for event in events(response)]
    (shown,) = [report for report in reports if report is not None]
    assert set(shown) == REPORT_FIELDS
    assert shown["requested_ratio"] == 4.0
    if route == "/v1/messages":
        assert reports[-2:] == [shown, None]  # the event message_stop follows
    else:
        assert reports[-1] == shown
    if usage:
        with_usage = next(event for event in events(response) if find_report(event) is not None)
        with_usage = with_usage.get("response", with_usage)
        assert with_usage["usage"]["kv_compression"] == shown


def find_report(event: dict) -> dict | None:
    return event.get("response", event).get("kv_compression")


def test_a_rendered_request_keeps_its_ratio(server):
    body = request_of("/v1/completions") | {"kv_compression_ratio": 4}
    (rendered,) = server.client.post("/v1/completions/render", json=body).json()
    answer = server.client.post("/inference/v1/generate", json=rendered).json()
    assert answer["kv_compression"]["requested_ratio"] == 4.0
    assert answer["kv_compression"]["low_tokens"] > 0


def test_beam_search_is_not_compressed(server):
    body = request_of("/v1/completions") | {"use_beam_search": True, "n": 2}
    answer = server.client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert "kv_compression" not in answer.text
    for route in ("/v1/completions", "/v1/chat/completions"):
        body = request_of(route) | {"use_beam_search": True, "kv_compression_ratio": 4}
        error = server.client.post(route, json=body).json()["error"]
        assert error["code"] == 400
        assert error["message"].startswith("kv_compression_ratio is 4, but it must be 1 with ")


@pytest.mark.parametrize("route", ["/tokenize", "/v1/messages/count_tokens", "/v1/embeddings"])
def test_a_route_that_does_not_generate_refuses_a_ratio(server, route):
    body = request_of("/v1/messages") | {"kv_compression_ratio": 4}
    error = server.client.post(route, json=body).json()["error"]
    assert error["message"] == f"kv_compression_ratio is not supported by POST {route}."


def test_stream_is_not_held_back(server):
    body = request_of("/v1/completions") | {"stream": True, "max_tokens": 50, "ignore_eos": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        arrivals = [time.monotonic() for line in response.iter_lines() if line]
    assert 25 < len(arrivals) <= 51  # vLLM joins tokens that a busy machine sends late
    assert arrivals[-1] - arrivals[0] > 0.1


@pytest.mark.parametrize("stream", [False, True])
def test_report_of_several_choices_and_prompts_is_their_sum(server, stream):
    fields = {"max_tokens": 4, "ignore_eos": True, "kv_compression_ratio": 4.0}
    one = completion(server, **fields)["kv_compression"]
    body = {"model": MODEL, "prompt": [LONG_PROMPT] * 2, "n": 2, "stream": stream} | fields
    response = server.client.post("/v1/completions", json=body)
    total = (events(response)[-1] if stream else response.json())["kv_compression"]
    assert total["kv_tokens"] == 4 * one["kv_tokens"]
    assert total["uncompressed_kv_bytes"] == 4 * one["uncompressed_kv_bytes"]
    assert total["requested_ratio"] == 4.0


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_ends_at_a_stop_string_has_a_report(server, stream):
    fields = {"stop": ["fox"], "max_tokens": 64, "kv_compression_ratio": 4.0, "temperature": 0}
    body = {"model": MODEL, "prompt": LONG_PROMPT, "stream": stream} | fields
    response = server.client.post("/v1/completions", json=body)
    last = events(response)[-1] if stream else response.json()
    assert last["choices"][0]["finish_reason"] == "stop"
    assert set(last["kv_compression"]) == REPORT_FIELDS


def test_client_of_openai_asks_and_reads(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY)
    answer = client.completions.create(
        model=MODEL,
        prompt="The capital of France is",
        max_tokens=4,
        temperature=0,
        extra_body={"kv_compression_ratio": 4.0},
    )
    assert "Paris" in answer.choices[0].text
    assert answer.model_extra["kv_compression"]["requested_ratio"] == 4.0


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_without_the_key_it_is_401(server, headers):
    body = request_of("/v1/completions") | {"kv_compression_ratio": "wrong as well"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/mikv/stats", headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/health", headers=headers).status_code == 200


def test_stats_and_metrics_show_compressed_requests_and_then_none(server):
    before = server.client.get("/mikv/stats").json()
    body = request_of("/v1/completions") | {"kv_compression_ratio": 4, "max_tokens": 400}
    # Without a salt it might begin with blocks of another test, and never be compressed.
    body |= {"ignore_eos": True, "cache_salt": "statistics"}
    with ThreadPoolExecutor() as threads:
        running = threads.submit(server.client.post, "/v1/completions", json=body)
        seen = []
        while not running.done():
            seen.append(server.client.get("/mikv/stats").json())
            time.sleep(0.05)
    assert running.result().status_code == 200
    assert any(stats["requests"]["tiered"] == 1 for stats in seen)
    assert any(stats["tokens"]["low"] > stats["tokens"]["high"] > 0 for stats in seen)
    for stats in seen:
        pages = dict(stats["pages"])
        assert pages.pop("total") == sum(pages.values())
    after = server.client.get("/mikv/stats").json()
    assert after["requests"] == {"native": 0, "tiered": 0}
    assert after["pages"]["free"] == after["pages"]["total"]
    assert after["operations"]["compress"] == before["operations"]["compress"] + 1
    metrics = server.client.get("/metrics").text
    assert f'mikv_operations_total{{engine="0",kind="compress",model_name="{MODEL}"}}' in metrics
    assert "# HELP mikv_kv_cache_pages Pages of vLLM's block pool" in metrics


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_repeated_prompt_is_found_but_for_its_last_tokens(server, ratio):
    """All tokens but one in blocks, which has to be computed; whole ones of native pages."""
    prompt = list(range(1000 * int(ratio), 1000 * int(ratio) + 400))
    fields = {"prompt": prompt, "kv_compression_ratio": ratio}
    found = [found_tokens(completion(server, **fields)) for _ in range(2)]
    assert found == [0, 384 if ratio == 1.0 else 399]


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_answer_has_no_report_and_the_next_one_has(server, stream):
    body = request_of("/v1/completions") | {"kv_compression_ratio": 4, "max_tokens": 1500}
    body |= {"ignore_eos": True, "stream": stream}
    with ThreadPoolExecutor() as threads:
        running = threads.submit(server.client.post, "/v1/completions", json=body)
        while server.client.get("/mikv/stats").json()["requests"]["tiered"] == 0:
            assert not running.done()
            time.sleep(0.05)
        assert server.client.post("/pause", params={"mode": "abort"}).status_code == 200
    try:
        last = events(running.result())[-1] if stream else running.result().json()
        assert last["choices"][0]["finish_reason"] == "abort"
        assert "kv_compression" not in last
    finally:
        assert server.client.post("/resume").status_code == 200
    assert set(completion(server)["kv_compression"]) == REPORT_FIELDS
    stats = server.client.get("/mikv/stats").json()
    assert stats["pages"]["free"] == stats["pages"]["total"]


def test_the_schema_names_the_field_and_the_report(server):
    schema = server.client.get("/openapi.json").json()
    report = schema["components"]["schemas"]["KVCompressionReport"]
    assert set(report["properties"]) == REPORT_FIELDS
    for route in ROUTES:
        operation = schema["paths"][route]["post"]
        request = operation["requestBody"]["content"]["application/json"]["schema"]
        *_, request = request.get("allOf", [request])
        (number, _) = request["properties"]["kv_compression_ratio"]["anyOf"]
        assert number == {"type": "number", "minimum": 1.0, "maximum": pytest.approx(6.7, abs=0.1)}
        answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
        assert answer["properties"]["kv_compression"]["$ref"].endswith("/KVCompressionReport")


def counted_hits(server: RunningServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("vllm:prefix_cache_hits_total{")]
    return float(line.split()[-1])


def test_a_repeated_prompt_is_found_in_blocks(server):
    fields = {"prompt": LONG_PROMPT[:2700], "kv_compression_ratio": 4.0, "cache_salt": "repeated"}
    first, before = completion(server, **fields), counted_hits(server)
    again, after = completion(server, **fields), counted_hits(server)
    assert first["usage"]["prompt_tokens"] > 550
    assert found_tokens(first) == first["kv_compression"]["reused_tokens"] == 0
    assert found_tokens(again) >= 0.95 * again["usage"]["prompt_tokens"]
    assert again["kv_compression"]["reused_tokens"] == found_tokens(again) == after - before


def test_later_turns_of_a_conversation_find_the_earlier_ones(server):
    messages = [{"role": "user", "content": LONG_PROMPT[:2700]}]
    body = {"model": MODEL, "temperature": 0, "max_tokens": 40, "kv_compression_ratio": 4.0}
    before = server.client.get("/mikv/stats").json()
    lengths = []
    for turn in range(3):
        answer = server.client.post(
            "/v1/chat/completions", json=body | {"messages": messages, "cache_salt": "turns"}
        ).json()
        if turn:
            assert found_tokens(answer) >= 0.95 * lengths[-1]
            assert answer["kv_compression"]["reused_tokens"] == found_tokens(answer)
        lengths.append(answer["usage"]["prompt_tokens"])
        messages.append(
            {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
        )
        messages.append({"role": "user", "content": "And what does the dog do then?"})
    after = server.client.get("/mikv/stats").json()
    assert after["operations"]["compress"] == before["operations"]["compress"] + 1
    assert after["operations"]["reuse"] == before["operations"]["reuse"] + 2
    assert (
        after["reused_tokens"]["adopt"] >= before["reused_tokens"]["adopt"] + 2 * lengths[0] * 0.95
    )
    assert after["blocks"]["sealed"] == after["blocks"]["tail"] == 0 < after["blocks"]["kept"]


def test_settings_are_in_the_log(server):
    echo = next(line for line in server.log.read_text().splitlines() if "MiKV: ratio" in line)
    assert "ratio 2.0, importance window, window 32" in echo
    assert "largest ratio" in echo


def test_answers_at_several_ratios_are_compared(server, capsys):
    command = ["compare", "--url", server.url, "--api-key", KEY, "--count", "2"]
    assert cli.main([*command, "--max-tokens", "16", "--ratios", "1", "4"]) == 0
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "|" in line]
    untouched, compressed = table[-2:]
    assert float(untouched[2]) > 3 * float(compressed[2])
    assert untouched[1] == "1.00"
    assert float(compressed[1]) > 3.3
    assert untouched[4] == "100%"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ratios", "9.5"], "out of range"),
        (["--api-key", "wrong"], "401"),
        (["--model", "another"], "does not exist"),
    ],
)
def test_a_comparison_that_the_server_refuses_says_why(server, capsys, flags, said):
    command = ["compare", "--url", server.url, "--api-key", KEY, "--count", "1"]
    assert cli.main([*command, *flags]) == 2
    assert said in capsys.readouterr().err
