"""Clients that people use, each with a ratio and its report, against one real server.

The server's default ratio is 1, so a request that does not set a ratio gets vLLM's own answer.
"""

import asyncio
import json
import subprocess
import sys

import anthropic
import httpx
import instructor
import litellm
import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from .serving import RunningServer

pytestmark = pytest.mark.engine

MODEL = "smollm2-135m-instruct"
QUESTION = "The quick brown fox jumps over the lazy dog. " * 60 + "What does the fox do?"
MESSAGES = [{"role": "user", "content": QUESTION}]
RATIO = {"kv_compression_ratio": 4.0}
HEADER = {"X-KV-Compression-Ratio": "4"}
WRONG = {"kv_compression_ratio": 99}
SAID = "kv_compression_ratio is 99, which is out of range"
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
"""
"""What ``vllm bench serve`` runs. The command itself needs a distribution named ``vllm``."""


class Animal(BaseModel):
    """What the model is asked to fill in."""

    legs: int


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(300 << 20)]
    flags += ["--enable-scale-out", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with RunningServer(flags, log) as running:
        yield running


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def check(report: dict) -> None:
    """A report of a request with ratio 4 that was compressed."""
    assert report["requested_ratio"] == 4.0
    assert report["low_tokens"] > 0
    assert report["achieved_ratio"] > 2


def chat(**fields) -> dict:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | fields


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/completions", {"prompt": QUESTION, "max_tokens": 4}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4}),
        ("/v1/chat/completions/batch", {"messages": [MESSAGES], "max_tokens": 4}),
        ("/v1/responses", {"input": QUESTION, "max_output_tokens": 4}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}),
        ("/invocations", {"messages": MESSAGES, "max_tokens": 4}),
        (
            "/inference/v1/generate",
            {"token_ids": [900] * 600, "sampling_params": {"max_tokens": 4}},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_sets_no_ratio_gets_the_answer_of_stock_vllm(server, route, fields, stream):
    if stream and route.endswith("/batch"):
        pytest.skip("vLLM has no streams on this route")
    response = server.client.post(route, json={"model": MODEL, "stream": stream} | fields)
    assert response.status_code == 200
    assert "kv_compression" not in response.text
    assert not any(name.startswith("x-kv") for name in response.headers)


def test_invocations_and_chat_completions_return_the_same(server):
    """As vLLM's own test of this route says."""
    answers = [
        server.client.post(route, json=chat()).json()
        for route in ("/v1/chat/completions", "/invocations")
    ]
    assert answers[0].keys() == answers[1].keys()
    assert answers[0]["choices"] == answers[1]["choices"]


def test_openai(client):
    answer = client.chat.completions.create(**chat(), extra_body=RATIO)
    check(answer.usage.kv_compression)
    check(answer.kv_compression)
    raw = client.chat.completions.with_raw_response.create(**chat(), extra_headers=HEADER)
    check(json.loads(raw.headers["x-kv-compression"]))
    with pytest.raises(openai.BadRequestError, match=SAID):
        client.chat.completions.create(**chat(), extra_body=WRONG)


def test_openai_streams(client):
    options = {"stream_options": {"include_usage": True}, "extra_body": RATIO}
    *_, last = client.chat.completions.create(**chat(), stream=True, **options)
    check(last.usage.kv_compression)
    with client.chat.completions.stream(**chat(), **options) as stream:
        *_, last = [event.chunk for event in stream if event.type == "chunk"]
    check(last.usage.kv_compression)
    with pytest.raises(openai.BadRequestError, match=SAID):
        client.chat.completions.create(**chat(), stream=True, extra_body=WRONG)


def test_openai_responses(client):
    fields = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8, "extra_body": RATIO}
    check(client.responses.create(**fields).usage.kv_compression)
    *_, last = client.responses.create(**fields, stream=True)
    check(last.response.usage.kv_compression)


def test_openai_tools_and_parse(client):
    choice = {"type": "function", "function": {"name": "weather"}}
    messages = [{"role": "user", "content": "What is the weather like in Paris?"}]
    fields = chat(messages=messages, tools=[TOOL], tool_choice=choice, max_tokens=64)
    answer = client.chat.completions.create(**fields, extra_body=RATIO)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert answer.usage.kv_compression["requested_ratio"] == 4.0
    fields = chat(response_format=Animal, max_tokens=32)
    answer = client.chat.completions.parse(**fields, extra_body=RATIO)
    assert isinstance(answer.choices[0].message.parsed, Animal)
    check(answer.usage.kv_compression)


def test_openai_async(server):
    async def ask() -> dict:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(**chat(), extra_body=RATIO)
            return answer.usage.kv_compression

    check(asyncio.run(ask()))


def test_anthropic(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none")
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
    check(client.messages.create(**fields, extra_body=RATIO).usage.kv_compression)
    with client.messages.stream(**fields, extra_headers=HEADER) as stream:
        (report,) = [event.kv_compression for event in stream if event.type == "message_delta"]
    check(report)
    with pytest.raises(anthropic.BadRequestError, match=SAID):
        client.messages.create(**fields, extra_body=WRONG)


def test_langchain(server):
    def model(fields: dict, **settings) -> ChatOpenAI:
        url = f"{server.url}/v1"
        return ChatOpenAI(
            base_url=url, api_key="none", model=MODEL, max_tokens=8, extra_body=fields, **settings
        )

    answer = model(RATIO).invoke(QUESTION)
    check(answer.response_metadata["token_usage"]["kv_compression"])
    with pytest.raises(openai.BadRequestError, match=SAID):
        model(WRONG).invoke(QUESTION)


def test_litellm(server):
    fields = {"model": f"hosted_vllm/{MODEL}", "messages": MESSAGES, "max_tokens": 8}
    fields |= {"api_base": f"{server.url}/v1", "api_key": "none"}
    check(dict(litellm.completion(**fields, extra_body=RATIO).usage.kv_compression))
    with pytest.raises(litellm.BadRequestError, match=SAID):
        litellm.completion(**fields, extra_body=WRONG)


def test_instructor(client):
    wrapped = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
    fields = chat(max_tokens=32, response_model=Animal, max_retries=0)
    animal, answer = wrapped.chat.completions.create_with_completion(**fields, extra_body=RATIO)
    assert isinstance(animal, Animal)
    check(answer.usage.kv_compression)


def compressed_so_far(server: RunningServer) -> int:
    return server.client.get("/mikv/stats").json()["operations"]["compress"]


def run(command: list[str], cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )


def test_vllm_bench_serve(server, model_path, tmp_path):
    before = compressed_so_far(server)
    command = [sys.executable, "-c", BENCH_SERVE]
    command += ["--base-url", server.url, "--model", MODEL, "--tokenizer", str(model_path)]
    command += ["--dataset-name", "random", "--random-input-len", "600", "--random-output-len", "4"]
    command += ["--num-prompts", "2", "--extra-body"]
    result = run([*command, json.dumps(RATIO)], tmp_path)
    assert result.returncode == 0, result.stderr
    assert compressed_so_far(server) > before
    refused = run([*command, json.dumps(WRONG)], tmp_path)
    assert "Bad Request" in refused.stdout + refused.stderr


def test_a_header_is_enough_for_any_client(server):
    response = httpx.post(f"{server.url}/v1/chat/completions", json=chat(), headers=HEADER)
    check(response.json()["usage"]["kv_compression"])
