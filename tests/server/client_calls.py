"""Clients that people use: how each sets a ratio and where it shows the report."""

import asyncio
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import anthropic
import instructor
import litellm
import openai
from instructor.core.exceptions import InstructorRetryException
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

MODEL = "smollm2-135m-instruct"
QUESTION = "The quick brown fox jumps over the lazy dog. " * 60 + "What does the fox do?"
MESSAGES = [{"role": "user", "content": QUESTION}]
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
RATIO_HEADER = "X-KV-Compression-Ratio"


class Answer(NamedTuple):
    """What a client returns."""

    text: str
    report: dict[str, Any] | None
    """None if the server sent none, or if the client drops it."""


class Animal(BaseModel):
    """What the model is asked to fill in."""

    legs: int


def chat(**fields) -> dict:
    return {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0} | fields


def openai_client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none")


def report_of(usage: Any) -> dict | None:
    return getattr(usage, "kv_compression", None)


def openai_chat(url: str, ratio: dict) -> Answer:
    answer = openai_client(url).chat.completions.create(**chat(), extra_body=ratio)
    assert getattr(answer, "kv_compression", None) == report_of(answer.usage)
    return Answer(answer.choices[0].message.content, report_of(answer.usage))


def openai_header(url: str, ratio: dict) -> Answer:
    headers = {RATIO_HEADER: str(*ratio.values())} if ratio else {}
    completions = openai_client(url).chat.completions.with_raw_response
    raw = completions.create(**chat(), extra_headers=headers)
    report = raw.headers.get("x-kv-compression")
    return Answer(raw.parse().choices[0].message.content, report and json.loads(report))


def openai_async(url: str, ratio: dict) -> Answer:
    async def ask() -> Answer:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(**chat(), extra_body=ratio)
            return Answer(answer.choices[0].message.content, report_of(answer.usage))

    return asyncio.run(ask())


def openai_async_stream(url: str, ratio: dict) -> Answer:
    async def ask() -> Answer:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            stream = await client.chat.completions.create(**chat(), **options, extra_body=ratio)
            return joined([chunk async for chunk in stream])

    return asyncio.run(ask())


def joined(chunks: list) -> Answer:
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    return Answer("".join(texts), report_of(chunks[-1].usage))


def openai_stream(url: str, ratio: dict) -> Answer:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = openai_client(url).chat.completions.create(**chat(), **options, extra_body=ratio)
    return joined(list(stream))


def openai_stream_helper(url: str, ratio: dict) -> Answer:
    options = {"stream_options": {"include_usage": True}, "extra_body": ratio}
    with openai_client(url).chat.completions.stream(**chat(), **options) as stream:
        return joined([event.chunk for event in stream if event.type == "chunk"])


def openai_parse(url: str, ratio: dict) -> Answer:
    fields = chat(response_format=Animal, max_tokens=32)
    answer = openai_client(url).chat.completions.parse(**fields, extra_body=ratio)
    assert isinstance(answer.choices[0].message.parsed, Animal)
    return Answer(answer.choices[0].message.content, report_of(answer.usage))


def openai_tools(url: str, ratio: dict) -> Answer:
    choice = {"type": "function", "function": {"name": "weather"}}
    fields = chat(tools=[TOOL], tool_choice=choice, max_tokens=64)
    answer = openai_client(url).chat.completions.create(**fields, extra_body=ratio)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    return Answer(call.function.arguments, report_of(answer.usage))


def openai_responses(url: str, ratio: dict) -> Answer:
    fields = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    answer = openai_client(url).responses.create(**fields, extra_body=ratio)
    return Answer(answer.output_text, report_of(answer.usage))


def openai_responses_stream(url: str, ratio: dict) -> Answer:
    fields = {"model": MODEL, "input": QUESTION, "max_output_tokens": 8, "temperature": 0}
    *_, last = openai_client(url).responses.create(**fields, extra_body=ratio, stream=True)
    return Answer(last.response.output_text, report_of(last.response.usage))


def anthropic_fields(ratio: dict) -> dict:
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
    return fields | {"extra_body": {"temperature": 0} | ratio}


def anthropic_messages(url: str, ratio: dict) -> Answer:
    client = anthropic.Anthropic(base_url=url, api_key="none")
    answer = client.messages.create(**anthropic_fields(ratio))
    return Answer(answer.content[0].text, report_of(answer.usage))


def anthropic_stream(url: str, ratio: dict) -> Answer:
    client = anthropic.Anthropic(base_url=url, api_key="none")
    with client.messages.stream(**anthropic_fields(ratio)) as stream:
        (last,) = [event for event in stream if event.type == "message_delta"]
        return Answer(stream.get_final_text(), getattr(last, "kv_compression", None))


def langchain_model(url: str, ratio: dict, kind: type[ChatOpenAI] = ChatOpenAI) -> ChatOpenAI:
    settings = {"model": MODEL, "max_tokens": 8, "temperature": 0, "extra_body": ratio}
    return kind(base_url=f"{url}/v1", api_key="none", stream_usage=True, **settings)


def langchain_invoke(url: str, ratio: dict) -> Answer:
    answer = langchain_model(url, ratio).invoke(QUESTION)
    return Answer(answer.content, answer.response_metadata["token_usage"].get("kv_compression"))


class ChatMiKV(ChatOpenAI):
    """``ChatOpenAI`` whose streams keep the report, in ``response_metadata``."""

    def _convert_chunk_to_generation_chunk(self, chunk, *args, **kwargs):
        generation = super()._convert_chunk_to_generation_chunk(chunk, *args, **kwargs)
        if generation and (report := (chunk.get("usage") or {}).get("kv_compression")):
            generation.message.response_metadata["kv_compression"] = report
        return generation


def langchain_stream(url: str, ratio: dict) -> Answer:
    first, *others = langchain_model(url, ratio, ChatMiKV).stream(QUESTION)
    answer = sum(others, first)
    return Answer(answer.content, answer.response_metadata.get("kv_compression"))


def litellm_fields(url: str) -> dict:
    return chat(model=f"hosted_vllm/{MODEL}", api_base=f"{url}/v1", api_key="none")


def litellm_completion(url: str, ratio: dict) -> Answer:
    answer = litellm.completion(**litellm_fields(url), extra_body=ratio)
    report = report_of(answer.usage)
    return Answer(answer.choices[0].message.content, report and dict(report))


def litellm_stream(url: str, ratio: dict) -> Answer:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return joined(list(litellm.completion(**litellm_fields(url), **options, extra_body=ratio)))


def instructor_create(url: str, ratio: dict) -> Answer:
    client = instructor.from_openai(openai_client(url), mode=instructor.Mode.JSON_SCHEMA)
    fields = chat(max_tokens=32, response_model=Animal, max_retries=0)
    animal, answer = client.chat.completions.create_with_completion(**fields, extra_body=ratio)
    assert isinstance(animal, Animal)
    return Answer(animal.model_dump_json(), report_of(answer.usage))


def cohere_fields(ratio: dict) -> dict:
    return chat(request_options={"additional_body_parameters": ratio})


def cohere_chat(url: str, ratio: dict) -> Answer:
    import cohere

    answer = cohere.ClientV2(api_key="none", base_url=f"{url}/cohere").chat(**cohere_fields(ratio))
    return Answer(answer.message.content[0].text, report_of(answer.usage))


def cohere_stream(url: str, ratio: dict) -> Answer:
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=f"{url}/cohere")
    events = list(client.chat_stream(**cohere_fields(ratio)))
    texts = [event.delta.message.content.text for event in events if event.type == "content-delta"]
    return Answer("".join(texts), getattr(events[-1], "kv_compression", None))


class Client(NamedTuple):
    """One way to call the server."""

    ask: Callable[[str, dict], Answer]
    """Receives the URL of the server and the ratio as a field of the request, or no field."""
    error: type[Exception]
    """What the client raises for HTTP 400."""
    keeps_report: bool = True


CLIENTS = {
    "openai": Client(openai_chat, openai.BadRequestError),
    "openai, header": Client(openai_header, openai.BadRequestError),
    "openai, async": Client(openai_async, openai.BadRequestError),
    "openai, async stream": Client(openai_async_stream, openai.BadRequestError),
    "openai, stream": Client(openai_stream, openai.BadRequestError),
    "openai, stream()": Client(openai_stream_helper, openai.BadRequestError),
    "openai, parse": Client(openai_parse, openai.BadRequestError),
    "openai, tools": Client(openai_tools, openai.BadRequestError),
    "openai, responses": Client(openai_responses, openai.BadRequestError),
    "openai, responses stream": Client(openai_responses_stream, openai.BadRequestError),
    "anthropic": Client(anthropic_messages, anthropic.BadRequestError),
    "anthropic, stream": Client(anthropic_stream, anthropic.BadRequestError),
    "langchain-openai": Client(langchain_invoke, openai.BadRequestError),
    "langchain-openai, stream": Client(langchain_stream, openai.BadRequestError),
    "litellm": Client(litellm_completion, litellm.BadRequestError),
    "litellm, stream": Client(litellm_stream, litellm.BadRequestError, keeps_report=False),
    "instructor": Client(instructor_create, InstructorRetryException),
}
if find_spec("cohere") is not None:
    import cohere

    CLIENTS["cohere"] = Client(cohere_chat, cohere.BadRequestError)
    CLIENTS["cohere, stream"] = Client(cohere_stream, cohere.BadRequestError)
