"""The middleware around a small app, over real ASGI."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from mikv_vllm.server.middleware import GENERATE_ROUTES, RatioMiddleware
from mikv_vllm.server.reports import HttpRequest, collect_reports, current_request

REPORT = {
    "requested_ratio": 4.0,
    "achieved_ratio": 4.0,
    "kv_tokens": 100,
    "high_tokens": 4,
    "low_tokens": 96,
    "reused_tokens": 64,
    "kv_bytes": 1000,
    "shared_kv_bytes": 500,
    "uncompressed_kv_bytes": 4000,
    "low_format": "K6433V3",
}


DEFAULT = 1.0
"""The server's default ratio."""


async def generate(request: Request):
    """Echo the body; the engine's report arrives in a task of its own."""
    body = await request.body()

    request_of_http = current_request.get()
    assert request_of_http is not None

    async def engine() -> None:
        request_of_http.add("0", REPORT | {"requested_ratio": request_of_http.ratio or DEFAULT})

    if b'"stream"' not in body:
        await asyncio.create_task(engine())
        echo = {"echo": body.decode(), "length": request.headers["content-length"]}
        return JSONResponse(echo | {"ratio": request_of_http.ratio, "usage": {"total_tokens": 3}})

    async def stream():
        yield 'data: {"choices":[{"finish_reason":null}]}\n\n'
        await asyncio.create_task(engine())
        yield 'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
        yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


async def other(request: Request):
    assert current_request.get() is None
    return PlainTextResponse(await request.body())


async def stored(request: Request):
    return JSONResponse({"id": "r", "kv_transfer_params": {"kv_compression": REPORT}})


async def failing(request: Request):
    return JSONResponse({"error": "no"}, status_code=500)


TAKING_ROUTES = [path for path in GENERATE_ROUTES if path != "/v1/responses"]


@pytest.fixture
def client():
    app = Starlette(
        routes=[
            *(Route(path, generate, methods=["POST"]) for path in TAKING_ROUTES),
            Route("/v1/completions/render", generate, methods=["POST"]),
            Route("/v1/audio/transcriptions", generate, methods=["POST"]),
            Route("/v1/responses", failing, methods=["POST"]),
            Route("/v1/responses/r", stored, methods=["GET"]),
            Route("/v1/other", other, methods=["POST"]),
        ]
    )
    app.state.mikv_largest_ratio = 6.0
    app.add_middleware(RatioMiddleware)
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


RATIO = "kv_compression_ratio"


def post(client: httpx.AsyncClient, path: str, **kwargs) -> httpx.Response:
    return asyncio.run(client.post(path, **kwargs))


@pytest.mark.parametrize("path", TAKING_ROUTES)
@pytest.mark.parametrize(
    ("fields", "headers"),
    [
        ({"kv_compression_ratio": 4}, {}),
        ({"vllm_xargs": {"kv_compression_ratio": 4}}, {}),
        ({"sampling_params": {"extra_args": {"kv_compression_ratio": 4}}}, {}),
        ({}, {"X-KV-Compression-Ratio": "4"}),
    ],
)
def test_ratio_is_taken_and_the_report_comes_back(client, path, fields, headers):
    response = post(client, path, json={"prompt": "a"} | fields, headers=headers)
    body = response.json()
    assert body["ratio"] == 4.0
    assert body["kv_compression"] == body["usage"]["kv_compression"] == REPORT
    assert json.loads(response.headers["X-KV-Compression"]) == REPORT
    assert "kv_compression_ratio" not in body["echo"]
    assert int(body["length"]) == len(body["echo"])
    assert int(response.headers["content-length"]) == len(response.content)


def test_request_without_a_ratio_is_untouched_and_has_no_report(client):
    response = post(client, "/v1/completions", content=b'{"prompt":  "a"}')
    body = response.json()
    assert body["echo"] == '{"prompt":  "a"}'
    assert "kv_compression" not in response.text
    assert "X-KV-Compression" not in response.headers


def test_request_without_a_ratio_has_a_report_if_the_server_compresses(client, monkeypatch):
    monkeypatch.setattr(f"{__name__}.DEFAULT", 4.0)
    assert post(client, "/v1/completions", json={}).json()["kv_compression"] == REPORT


def test_ratio_1_has_a_report(client):
    report = post(client, "/v1/completions", json={"kv_compression_ratio": 1}).json()
    assert report["kv_compression"]["requested_ratio"] == 1.0


def test_beam_search_is_not_compressed_and_has_no_report(client, monkeypatch):
    monkeypatch.setattr(f"{__name__}.DEFAULT", 4.0)
    for fields in ({}, {"kv_compression_ratio": 1}):
        body = post(client, "/v1/completions", json={"use_beam_search": True} | fields).json()
        assert body["ratio"] == 1.0
        assert "kv_compression" not in body
    refused = post(client, "/v1/completions", json={"use_beam_search": True, RATIO: 4}).json()
    assert refused["error"]["message"] == f"{RATIO} is 4, but it must be 1 with use_beam_search."


def test_a_rendered_request_contains_the_ratio(client):
    body = post(client, "/v1/completions/render", json={}, headers={"X-KV-Compression-Ratio": "4"})
    assert json.loads(body.json()["echo"]) == {"vllm_xargs": {RATIO: 4.0}}


def test_a_form_takes_the_header_alone(client):
    form, path = {"files": {"file": b"sound"}}, "/v1/audio/transcriptions"
    taken = post(client, path, **form, headers={"X-KV-Compression-Ratio": "4"}).json()
    refused = post(client, path, **form, data={RATIO: "4"}).json()
    assert taken["ratio"] == 4.0
    assert refused["error"]["message"] == (
        f"{RATIO} is not a field of a form; set x-kv-compression-ratio."
    )


def test_header_and_body_have_to_agree(client):
    headers = {"X-KV-Compression-Ratio": "4"}
    response = post(client, "/v1/completions", json={RATIO: 3}, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == (
        f"x-kv-compression-ratio is 4, but {RATIO} is 3; give one of them."
    )


def test_wrong_ratio_is_400_in_the_shape_of_anthropic(client):
    response = post(client, "/v1/messages", json={RATIO: 9})
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert response.json()["error"]["message"].startswith(f"{RATIO} is 9, which is out of range")


def test_wrong_ratio_is_400_in_the_shape_of_cohere(client):
    response = post(client, "/cohere/v2/chat", json={RATIO: 9})
    assert response.status_code == 400
    assert response.json()["message"].startswith(f"{RATIO} is 9, which is out of range")


def test_a_websocket_refuses_the_header():
    async def echo(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("opened")
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/v1/realtime", echo)])
    app.add_middleware(RatioMiddleware)
    client = TestClient(app)
    with client.websocket_connect("/v1/realtime") as connection:
        assert connection.receive_text() == "opened"
    headers = {"X-KV-Compression-Ratio": "4"}
    with (
        pytest.raises(WebSocketDenialResponse) as refusal,
        client.websocket_connect("/v1/realtime", headers=headers),
    ):
        pass
    assert refusal.value.status_code == 400
    assert refusal.value.json()["error"]["message"] == (
        "x-kv-compression-ratio is not supported by the websocket /v1/realtime."
    )


def test_chunked_request_body_is_put_together(client):
    async def pieces():
        for piece in (b'{"kv_compression', b'_ratio": 2', b"}"):
            yield piece

    body = post(client, "/v1/completions", content=pieces()).json()
    assert (body["echo"], body["length"], body["ratio"]) == ("{}", "2", 2.0)


def test_invalid_json_reaches_the_route_unchanged(client):
    assert post(client, "/v1/completions", content=b"{bad").json()["echo"] == "{bad"


@pytest.mark.parametrize("value", [b"NaN", b'"four"', b"0", b"7", b"[]", b"false"])
def test_wrong_ratio_is_400_in_the_shape_of_openai(client, value):
    content = b'{"kv_compression_ratio": ' + value + b"}"
    response = post(client, "/v1/completions", content=content)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error.pop("message").startswith("kv_compression_ratio is ")
    assert error == {"type": "BadRequestError", "param": "kv_compression_ratio", "code": 400}


def test_stream_ends_with_the_report(client):
    response = post(client, "/v1/completions", json={"stream": True, RATIO: 4})
    *_, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["kv_compression"] == REPORT


def test_other_routes_are_left_alone(client):
    content = b'{"text": "kv_compression_ratio"}'
    assert post(client, "/v1/other", content=content).content == content


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'{"kv_compression_ratio": 4}', {}),
        (b'{"vllm_xargs": {"kv_compression_ratio": 4}}', {}),
        (b"{}", {"X-KV-Compression-Ratio": "4"}),
    ],
)
def test_a_ratio_that_a_route_cannot_apply_is_refused(client, content, headers):
    response = post(client, "/v1/other", content=content, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"{RATIO} is not supported by POST /v1/other."


def test_error_response_is_left_alone(client):
    response = post(client, "/v1/responses", json={})
    assert (response.status_code, response.json()) == (500, {"error": "no"})


def test_stored_response_shows_its_report(client):
    async def get() -> dict:
        async with client:
            return (await client.get("/v1/responses/r")).json()

    assert asyncio.run(get()) == {"id": "r", "kv_transfer_params": None, "kv_compression": REPORT}


class Processor:
    """As much of vLLM's OutputProcessor as reports need."""

    def __init__(self):
        self.request_states = {}
        self.processed = []

    def add_request(self, request, prompt, parent_req=None):
        self.request_states[request.request_id] = State(parent_req)

    def process_outputs(self, outputs):
        self.processed += [output.kv_transfer_params for output in outputs]
        for output in outputs:
            self.request_states.pop(output.request_id, None)


class State:
    def __init__(self, parent_req):
        self.parent_req = parent_req


def finished(request_id: str, report: dict | None) -> SimpleNamespace:
    params = None if report is None else {"kv_compression": report}
    return SimpleNamespace(request_id=request_id, kv_transfer_params=params)


def test_reports_of_several_choices_are_summed():
    processor, parent = Processor(), State(None)
    collect_reports(processor)
    for name in ("0_r", "1_r"):
        processor.add_request(SimpleNamespace(request_id=name), "prompt", parent)
    native = REPORT | {"kv_bytes": 3000, "uncompressed_kv_bytes": 3000, "low_format": None}
    processor.process_outputs([finished("0_r", native)])
    processor.process_outputs([finished("1_r", REPORT), finished("gone", REPORT)])
    total = processor.processed[1]["kv_compression"]
    assert total == {
        "requested_ratio": 4.0,
        "achieved_ratio": 1.75,
        "kv_tokens": 200,
        "high_tokens": 8,
        "low_tokens": 192,
        "reused_tokens": 128,
        "kv_bytes": 4000,
        "shared_kv_bytes": 1000,
        "uncompressed_kv_bytes": 7000,
        "low_format": "K6433V3",
    }


@pytest.mark.parametrize(("is_stored", "ratio"), [(False, 4.0), (True, 4.0), (True, None)])
def test_over_http_only_a_stored_answer_carries_a_report(is_stored, ratio):
    processor = Processor()
    collect_reports(processor, over_http=True)
    request = HttpRequest(ratio, ratio is not None, is_stored)
    token = current_request.set(request)
    processor.add_request(SimpleNamespace(request_id="r"), "prompt")
    current_request.reset(token)
    report = REPORT | {"requested_ratio": ratio or 1.0}
    processor.process_outputs([finished("r", report)])
    carried = is_stored and ratio is not None
    assert processor.processed == [{"kv_compression": report} if carried else None]
    assert request.total() == (None if ratio is None else report)


def test_outputs_without_a_report_pass():
    processor = Processor()
    collect_reports(processor)
    processor.add_request(SimpleNamespace(request_id="r"), "prompt")
    processor.process_outputs([finished("r", None)])
    assert processor.processed == [None]
