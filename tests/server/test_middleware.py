"""The middleware around a small app, over real ASGI."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from mikv_vllm.server.middleware import RatioMiddleware
from mikv_vllm.server.reports import collect_reports, current_group

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


async def generate(request: Request):
    """Echo the body; the engine's report arrives in a task of its own."""
    body = await request.body()

    async def engine() -> None:
        group = current_group.get()
        assert group is not None
        group.add("0", REPORT)

    if b'"stream"' not in body:
        await asyncio.create_task(engine())
        return JSONResponse({"echo": body.decode(), "length": request.headers["content-length"]})

    async def stream():
        yield 'data: {"choices":[{"finish_reason":null}]}\n\n'
        await asyncio.create_task(engine())
        yield 'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
        yield "data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream")


async def other(request: Request):
    assert current_group.get() is None
    return PlainTextResponse(await request.body())


async def stored(request: Request):
    return JSONResponse({"id": "r", "kv_transfer_params": {"kv_compression": REPORT}})


async def failing(request: Request):
    return JSONResponse({"error": "no"}, status_code=500)


@pytest.fixture
def client():
    app = Starlette(
        routes=[
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/v1/chat/completions", generate, methods=["POST"]),
            Route("/v1/responses", failing, methods=["POST"]),
            Route("/v1/responses/r", stored, methods=["GET"]),
            Route("/v1/other", other, methods=["POST"]),
        ]
    )
    app.state.mikv_largest_ratio = 6.0
    app.add_middleware(RatioMiddleware)
    transport = httpx.ASGITransport(app=app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def post(client: httpx.AsyncClient, path: str, **kwargs) -> httpx.Response:
    async def call() -> httpx.Response:
        async with client:
            return await client.post(path, **kwargs)

    return asyncio.run(call())


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_ratio_reaches_the_route_and_the_report_comes_back(client, path):
    response = post(client, path, json={"prompt": "a", "kv_compression_ratio": 4})
    body = response.json()
    assert body["kv_compression"] == REPORT
    assert json.loads(body["echo"])["vllm_xargs"] == {"kv_compression_ratio": 4.0}
    assert int(body["length"]) == len(body["echo"])
    assert int(response.headers["content-length"]) == len(response.content)


def test_chunked_request_body_is_put_together(client):
    async def pieces():
        for piece in (b'{"kv_compression', b'_ratio": 2', b"}"):
            yield piece

    body = post(client, "/v1/completions", content=pieces()).json()
    assert json.loads(body["echo"]) == {"vllm_xargs": {"kv_compression_ratio": 2.0}}
    assert int(body["length"]) == len(body["echo"])


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
    response = post(client, "/v1/completions", json={"stream": True})
    *_, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert json.loads(last.removeprefix("data: "))["kv_compression"] == REPORT


def test_other_routes_are_left_alone(client):
    content = b'{"kv_compression_ratio": "nonsense"}'
    assert post(client, "/v1/other", content=content).content == content


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


def test_outputs_without_a_report_pass():
    processor = Processor()
    collect_reports(processor)
    processor.add_request(SimpleNamespace(request_id="r"), "prompt")
    processor.process_outputs([finished("r", None)])
    assert processor.processed == [None]
