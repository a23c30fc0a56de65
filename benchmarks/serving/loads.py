"""The loads: what clients send, and the times that they see.

Conversations and questions about documents have a client of their own here: a turn depends on the
answer before it, and tokens that the cache found are counted per request. The other loads are those
of ``vllm bench serve``.
"""

import asyncio
import contextlib
import io
import random
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from mikv_vllm.evaluation.windows import topics_text


@dataclass
class Times:
    """What the clients of one load saw."""

    seconds: float = 0.0
    """From the first request to the end of the last answer."""
    later_seconds: float | None = None
    """The same for the requests whose beginning the cache can hold, where they are apart."""
    prompt_tokens: int = 0
    new_tokens: int = 0
    later_tokens: int = 0
    """Tokens of the prompts whose beginning the cache can hold, where that is known."""
    later_cached_tokens: int = 0
    """Of these, tokens that were found."""
    first: list[float] = field(default_factory=list)
    """Seconds until the first token, one per request."""
    between: list[float] = field(default_factory=list)
    """Seconds between consecutive tokens, of all requests."""


@dataclass(frozen=True)
class Target:
    """Where a load sends its requests."""

    url: str
    model: str
    """Path of the model, which is also its served name."""
    extra_body: dict[str, Any]


class Chat:
    """A client of the chat route that measures."""

    def __init__(self, target: Target, at_once: int, answer: int) -> None:
        from openai import AsyncOpenAI

        self._client = AsyncOpenAI(base_url=f"{target.url}/v1", api_key="none", timeout=1800)
        self._target = target
        self._limit = asyncio.Semaphore(at_once)
        self._answer = answer
        self.times = Times()

    async def ask(self, messages: list[dict[str, str]], is_later: bool) -> str:
        """Send one request and return its answer.

        Args:
            is_later: whether the cache can hold the beginning of the prompt.
        """
        times, target = self.times, self._target
        async with self._limit:
            last, start, answer = None, time.perf_counter(), []
            stream = await self._client.chat.completions.create(
                model=target.model,
                messages=messages,
                max_tokens=self._answer,
                temperature=0.0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True, **target.extra_body},
            )
            async for event in stream:
                now = time.perf_counter()
                if usage := event.usage:
                    times.prompt_tokens += usage.prompt_tokens
                    times.new_tokens += usage.completion_tokens
                    if is_later:
                        details = usage.prompt_tokens_details
                        times.later_tokens += usage.prompt_tokens
                        times.later_cached_tokens += (details and details.cached_tokens) or 0
                if not event.choices or not event.choices[0].delta.content:
                    continue
                answer.append(event.choices[0].delta.content)
                if last is None:
                    times.first.append(now - start)
                else:
                    times.between.append(now - last)
                last = now
        return "".join(answer)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


@dataclass(frozen=True)
class ChatLoad(ABC):
    """A load whose clients are a :class:`Chat`: ``count`` texts that begin with a document."""

    count: int
    document: int
    """Tokens."""
    questions: int
    """About each document, one after the other."""
    at_once: int
    """Requests."""
    question: int = 60
    """Tokens."""
    answer: int = 32
    """Tokens."""

    def run(self, target: Target) -> Times:
        return asyncio.run(self._run(target))

    async def _run(self, target: Target) -> Times:
        sizes = [self.document, *[self.question] * self.questions]
        parts = texts(target.model, self.count, sizes)
        chat = Chat(target, self.at_once, self.answer)
        start = time.perf_counter()
        await self._send(chat, parts)
        chat.times.seconds = time.perf_counter() - start
        await chat.close()
        return chat.times

    @abstractmethod
    async def _send(self, chat: Chat, parts: list[list[str]]) -> None:
        """Send all requests: ``parts`` has a document and its questions in each row."""


@dataclass(frozen=True)
class Conversations(ChatLoad):
    """Conversations about documents that do not fit into the pool together.

    Each conversation has one turn, then all have the next one, so that a conversation waits while
    the others use the pool.
    """

    title = "Conversations"

    @property
    def text(self) -> str:
        return (
            f"{self.count} conversations about documents of {self.document} tokens, "
            f"{self.questions} turns, {self.at_once} at a time, {self.question} tokens a question, "
            f"{self.answer} an answer; later requests are those of turn 2 on"
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with some for the chat template."""
        return self.document + self.questions * (self.question + self.answer + 20) + 40

    async def _send(self, chat: Chat, parts: list[list[str]]) -> None:
        histories: list[list[dict[str, str]]] = [[] for _ in parts]
        rng, order = random.Random(0), [*range(self.count)]
        second = time.perf_counter()
        for turn in range(self.questions):
            if turn == 1:
                second = time.perf_counter()
            if turn:
                rng.shuffle(order)
            print(f"  turn {turn + 1} of {self.questions}", flush=True)
            for i in order:
                said = parts[i][turn + 1] if turn else "\n\n".join(parts[i][:2])
                histories[i].append({"role": "user", "content": said})
            answers = await asyncio.gather(*(chat.ask(histories[i], turn > 0) for i in order))
            for i, answer in zip(order, answers, strict=True):
                histories[i].append({"role": "assistant", "content": answer})
        chat.times.later_seconds = time.perf_counter() - second


@dataclass(frozen=True)
class Documents(ChatLoad):
    """Questions about shared documents, interleaved at random."""

    title = "Shared documents"

    @property
    def text(self) -> str:
        return (
            f"{self.count} documents of {self.document} tokens, {self.questions} questions of "
            f"{self.question} tokens about each, interleaved at random, {self.at_once} at a time, "
            f"{self.answer} tokens an answer; later requests are those from the third question "
            "about a document on"
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with some for the chat template."""
        return self.document + self.question + self.answer + 60

    async def _send(self, chat: Chat, parts: list[list[str]]) -> None:
        order = [*range(self.count)] * self.questions
        random.Random(0).shuffle(order)
        asked, requests = [0] * self.count, []
        for i in order:
            document, question = parts[i][0], parts[i][asked[i] + 1]
            message = {"role": "user", "content": f"{document}\n\n{question}"}
            requests.append(chat.ask([message], is_later=asked[i] >= 2))
            asked[i] += 1
        await asyncio.gather(*requests)


def texts(model: str, count: int, sizes: list[int]) -> list[list[str]]:
    """Parts of a text.

    Args:
        sizes: tokens of each part.

    Returns:
        ``count`` lists of one part for each size, none of which overlap.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = iter(tokenizer(topics_text()).input_ids)
    cut = [[[*islice(tokens, size)] for size in sizes] for _ in range(count)]
    assert len(cut[-1][-1]) == sizes[-1], "the text is too short for this load"
    return [[tokenizer.decode(part) for part in parts] for parts in cut]


@dataclass(frozen=True)
class BenchServe:
    """A load of ``vllm bench serve``."""

    title: str
    text: str
    longest: int
    flags: dict[str, Any]

    def run(self, target: Target) -> Times:
        from vllm.benchmarks.serve import add_cli_args, main_async
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        flags = {
            "base-url": target.url,
            "model": target.model,
            "temperature": 0,
            "seed": 0,
            **self.flags,
        }
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        args = parser.parse_args([*arguments, "--ignore-eos", "--save-detailed", "--disable-tqdm"])
        args.extra_body = target.extra_body
        with contextlib.redirect_stdout(io.StringIO()):
            result = asyncio.run(main_async(args))
        failed = [error for error in result["errors"] if error]
        assert not failed, f"{len(failed)} requests failed, the first with: {failed[0]}"
        return Times(
            seconds=result["duration"],
            prompt_tokens=result["total_input_tokens"],
            new_tokens=result["total_output_tokens"],
            first=result["ttfts"],
            between=[seconds for request in result["itls"] for seconds in request],
        )


def system_prompt(
    length: int = 1000, requests: int = 24, prompt: int = 80, answer: int = 32
) -> BenchServe:
    """Short requests behind one system prompt."""
    return BenchServe(
        "One system prompt",
        f"one system prompt of {length} tokens, {requests} requests of {prompt} tokens, 8 at a "
        f"time, {answer} tokens an answer",
        length + prompt + answer + 8,
        {
            "dataset-name": "prefix_repetition",
            "num-prompts": requests,
            "prefix-repetition-num-prefixes": 1,
            "prefix-repetition-prefix-len": length,
            "prefix-repetition-suffix-len": prompt,
            "prefix-repetition-output-len": answer,
            "max-concurrency": 8,
        },
    )


def unrelated(requests: int = 12, prompt: int = 600, answer: int = 96) -> BenchServe:
    """Unrelated requests, all at once, more than the pool holds."""
    return BenchServe(
        "Unrelated requests",
        f"{requests} unrelated requests of {prompt} tokens at once, {answer} tokens an answer",
        prompt + answer + 8,
        {
            "dataset-name": "random",
            "num-prompts": requests,
            "random-input-len": prompt,
            "random-output-len": answer,
        },
    )


Load = Conversations | Documents | BenchServe


class Sizes(NamedTuple):
    """A load in two sizes."""

    quick: Load
    full: Load
    full_pool: int
    """Uncompressed tokens of the pool of the full one."""


QUICK_POOL = 4000
"""Uncompressed tokens of the pool of all quick loads."""
LOADS = {
    "conversations": Sizes(
        Conversations(6, 1000, 3, at_once=3), Conversations(12, 1500, 4, at_once=3), 7000
    ),
    "documents": Sizes(Documents(3, 1500, 6, at_once=2), Documents(4, 3000, 12, at_once=2), 4500),
    "system-prompt": Sizes(system_prompt(), system_prompt(2000, 48), 4000),
    "unrelated": Sizes(unrelated(), unrelated(24), 4000),
}
