"""Every route of vLLM takes a ratio or refuses it, and without one answers as stock vLLM does."""

import json
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from mikv_vllm.server.middleware import (
    AUDIO_ROUTES,
    COHERE_ROUTE,
    GENERATE_ROUTES,
    RENDER_ROUTES,
    WEBSOCKET_ROUTES,
)

from .serving import RunningServer

MODEL = "smollm2-135m-instruct"
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
MESSAGES = [{"role": "user", "content": TEXT}]
FLAGS = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(300 << 20), "--enable-scale-out"]
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_COHERE_API": "1"}
"""Adds routes that stock vLLM has only if they are asked for."""

SCORES = ("/generative_scoring", "/v1/systemone", "/v1/decisions")
"""Read the probabilities of the first token, which is computed before the prompt is compressed."""
OTHERS = (
    *("/tokenize", "/detokenize", "/v1/messages/count_tokens", "/cohere/v2/chat/render"),
    *("/v1/chat/completions/derender", "/v1/completions/derender"),
    *("/v1/responses/{response_id}/cancel", "/abort_requests", "/inference/v1/abort_requests"),
    *("/ping", "/pause", "/resume", "/sleep", "/wake_up", "/collective_rpc"),
    *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache"),
    *("/release_kv_cache_memory", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
    *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine"),
    *("/start_weight_update", "/start_draft_weight_update", "/finish_weight_update"),
    *("/update_weights", "/update_weight_version", "/weight_checker"),
)
"""Generate nothing."""
NEW_IN_0_33 = {"/v1/decisions"}
NAMES = {"id", "item_id", "request_id", "response_id", "msg_id", "system_fingerprint"}
TIMES = {"created", "created_at", "completed_at"}

needs_cohere = pytest.mark.skipif(find_spec("cohere") is None, reason="needs the package cohere")
ROUTES = [
    pytest.param(route, marks=needs_cohere) if route == COHERE_ROUTE else route
    for route in GENERATE_ROUTES
]


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with RunningServer(FLAGS, log, env=ENVIRONMENT) as running:
        yield running


@pytest.fixture(scope="module")
def stock(tmp_path_factory, model_path):
    """Stock vLLM with the settings that MiKV gives the embedded model."""
    log = tmp_path_factory.mktemp("stock") / "log.txt"
    flags = ["--model", str(model_path), "--served-model-name", MODEL]
    flags += ["--enforce-eager", "--block-size", "32", *FLAGS]
    module = "vllm.entrypoints.openai.api_server"
    with RunningServer(flags, log, env=ENVIRONMENT, module=module) as running:
        yield running


def request_of(route: str) -> dict:
    """A small request for a route that generates or renders."""
    route = route.removesuffix("/render")
    if route == "/v1/completions":
        fields = {"prompt": TEXT, "max_tokens": 4}
    elif route == "/v1/responses":
        fields = {"input": TEXT, "max_output_tokens": 4}
    elif route == "/inference/v1/generate":
        fields = {"token_ids": [900] * 600, "sampling_params": {"max_tokens": 4, "temperature": 0}}
    elif route == "/v1/chat/completions/batch":
        fields = {"messages": [MESSAGES, MESSAGES], "max_tokens": 4}
    else:
        fields = {"messages": MESSAGES, "max_tokens": 4}
    return {"model": MODEL, "temperature": 0} | fields


def events(text: str) -> list:
    """The events of a stream, or one JSON body."""
    lines = [
        line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")
    ]
    return [json.loads(line) for line in lines or [text]]


def without_names(value, hidden: set[str]):
    """A JSON value without what differs between two servers with the same answers."""
    if isinstance(value, list):
        return [without_names(each, hidden) for each in value]
    if isinstance(value, dict):
        return {k: without_names(v, hidden) for k, v in value.items() if k not in hidden}
    return value


def answer(server: RunningServer, route: str, body: dict, hidden: frozenset = frozenset()) -> list:
    response = server.client.post(route, json=body)
    assert response.status_code == 200, response.text
    return without_names(events(response.text), NAMES | TIMES | hidden)


def every_route(monkeypatch) -> Iterator[tuple[bool, str]]:
    """Whether it is a websocket, and its path, of each route that may generate in any model."""
    from fastapi.routing import APIWebSocketRoute
    from vllm.entrypoints.launchers.app import build_app
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from mikv_vllm.server.vllm_modules import make_arg_parser

    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    app = build_app(args, ("generate", "transcription", "realtime", "render"))
    for route in app.routes:
        if isinstance(route, APIWebSocketRoute):
            yield True, route.path
        elif "POST" in (getattr(route, "methods", None) or ()):
            yield False, route.path


def test_it_is_known_of_every_route_whether_it_takes_a_ratio(monkeypatch):
    taking = {*GENERATE_ROUTES, *RENDER_ROUTES, *AUDIO_ROUTES}
    refusing = {*SCORES, *OTHERS}
    assert not taking & refusing
    routes = set(every_route(monkeypatch))
    found = {path for is_websocket, path in routes if not is_websocket}
    absent = set()
    if find_spec("cohere") is None:
        absent = {route for route in taking | refusing if route.startswith("/cohere/")}
    assert found - taking - refusing == set()
    assert taking | refusing - NEW_IN_0_33 <= found | absent
    assert {path for is_websocket, path in routes if is_websocket} == set(WEBSOCKET_ROUTES)


@pytest.mark.engine
def test_the_routes_of_the_server_are_among_them(server):
    schema = server.client.get("/openapi.json").json()
    found = {path for path, operations in schema["paths"].items() if "post" in operations}
    assert found <= {*GENERATE_ROUTES, *RENDER_ROUTES, *SCORES, *OTHERS}


@pytest.mark.engine
@pytest.mark.parametrize("route", [*SCORES, *OTHERS])
def test_a_route_that_cannot_apply_a_ratio_refuses_it(server, route):
    route = route.format(response_id="resp_1")
    in_body = server.client.post(route, json={"kv_compression_ratio": 4})
    in_header = server.client.post(route, json={}, headers={"X-KV-Compression-Ratio": "4"})
    for response in (in_body, in_header):
        assert response.status_code == 400
        assert f"kv_compression_ratio is not supported by POST {route}." in response.text


@pytest.mark.engine
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_answers_without_a_ratio_and_at_ratio_1_are_those_of_stock_vllm(
    server, stock, route, stream
):
    if stream and route.endswith("/batch"):
        pytest.skip("vLLM has no streams on this route")
    body = request_of(route) | {"stream": stream}
    if stream:
        # vLLM joins tokens in one event if a busy machine sends them late.
        limit = "max_output_tokens" if route == "/v1/responses" else "max_tokens"
        body |= {limit: 1}
        body |= {"sampling_params": {"max_tokens": 1, "temperature": 0}}
    assert answer(server, route, body) == answer(stock, route, body)
    same = answer(server, route, body | {"kv_compression_ratio": 1}, frozenset({"kv_compression"}))
    # The second time, both find the prompt in their prefix caches, which rounds differently.
    assert same == answer(stock, route, body)


@pytest.mark.engine
@pytest.mark.parametrize("route", RENDER_ROUTES)
def test_rendered_requests_hold_the_ratio_and_are_otherwise_those_of_stock_vllm(
    server, stock, route
):
    body = request_of(route)
    expected = answer(stock, route, body)
    assert answer(server, route, body) == expected

    (rendered,) = answer(server, route, body | {"kv_compression_ratio": 4})
    rendered = rendered[0] if isinstance(rendered, list) else rendered
    params = rendered["sampling_params"]
    assert params["extra_args"]["kv_compression_ratio"] == 4.0
    report = server.client.post("/inference/v1/generate", json=rendered).json()["kv_compression"]
    assert report["requested_ratio"] == 4.0
    assert report["low_tokens"] > 0

    response = server.client.post(route, json=body | {"kv_compression_ratio": 99})
    assert response.status_code == 400
    assert "kv_compression_ratio is 99, which is out of range" in response.text


@needs_cohere
@pytest.mark.engine
def test_the_client_of_cohere_sets_a_ratio_and_reads_the_report(server):
    import cohere
    from cohere.core import RequestOptions

    client = cohere.ClientV2(api_key="none", base_url=f"{server.url}/cohere")
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4}

    def with_ratio(ratio: float) -> RequestOptions:
        return {"additional_body_parameters": {"kv_compression_ratio": ratio}}

    answered = client.chat(**fields, request_options=with_ratio(4.0))
    assert answered.kv_compression["requested_ratio"] == 4.0
    assert answered.kv_compression["low_tokens"] > 0
    *_, last = client.chat_stream(**fields, request_options=with_ratio(4.0))
    assert last.kv_compression["low_tokens"] > 0
    with pytest.raises(cohere.BadRequestError, match="kv_compression_ratio is 99"):
        client.chat(**fields, request_options=with_ratio(99))
