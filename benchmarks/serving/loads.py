"""The loads: what clients send, and the times that they see.

Conversations have a client of their own here, since a turn depends on the answer before it. The
other loads are those of ``vllm bench serve``.
"""

import asyncio
import contextlib
import io
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

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
class Conversations:
    """Conversations about documents that do not fit into the pool together.

    ``at_once`` of ``count`` conversations run at a time; each has one turn, then all have the next
    one, so that a conversation waits while the others use the pool.
    """

    count: int = 6
    document: int = 1000
    """Tokens."""
    turns: int = 3
    at_once: int = 3
    question: int = 60
    answer: int = 32
    title = "Conversations"

    @property
    def text(self) -> str:
        return (
            f"{self.count} conversations about documents of {self.document} tokens, "
            f"{self.turns} turns, {self.at_once} at a time, {self.question} tokens a question, "
            f"{self.answer} an answer; later requests are those of turn 2 on"
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with some for the chat template."""
        return self.document + self.turns * (self.question + self.answer + 20) + 40

    def run(self, target: Target) -> Times:
        return asyncio.run(self._run(target))

    async def _run(self, target: Target) -> Times:
        chat = Chat(target, self.at_once, self.answer)
        questions = self._questions(target.model)
        histories: list[list[dict[str, str]]] = [[] for _ in range(self.count)]
        rng = random.Random(0)
        start = second = time.perf_counter()
        for turn in range(self.turns):
            order = [*range(self.count)]
            if turn:
                rng.shuffle(order)
            if turn == 1:
                second = time.perf_counter()
            print(f"  turn {turn + 1} of {self.turns}", flush=True)
            for one in order:
                histories[one].append({"role": "user", "content": questions[one][turn]})
            answers = await asyncio.gather(*(chat.ask(histories[i], turn > 0) for i in order))
            for one, answer in zip(order, answers, strict=True):
                histories[one].append({"role": "assistant", "content": answer})
        end = time.perf_counter()
        chat.times.seconds, chat.times.later_seconds = end - start, end - second
        await chat.close()
        return chat.times

    def _questions(self, model: str) -> list[list[str]]:
        """What the user says in each turn, a list for each conversation."""
        sizes = [self.document, *[self.question] * self.turns]
        histories = []
        for document, question, *others in texts(model, self.count, sizes):
            histories.append([f"{document}\n\n{question}", *others])
        return histories


@dataclass(frozen=True)
class Documents:
    """Questions about shared documents, interleaved at random."""

    count: int = 3
    document: int = 1500
    """Tokens."""
    questions: int = 6
    at_once: int = 2
    question: int = 60
    answer: int = 32
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

    def run(self, target: Target) -> Times:
        return asyncio.run(self._run(target))

    async def _run(self, target: Target) -> Times:
        chat = Chat(target, self.at_once, self.answer)
        sizes = [self.document, *[self.question] * self.questions]
        left = dict(enumerate(texts(target.model, self.count, sizes)))
        order = [i for i in left for _ in range(self.questions)]
        random.Random(0).shuffle(order)
        start, requests = time.perf_counter(), []
        for i in order:
            document, *questions = left[i]
            left[i] = [document, *questions[1:]]
            messages = [{"role": "user", "content": f"{document}\n\n{questions[0]}"}]
            requests.append(chat.ask(messages, len(questions) <= self.questions - 2))
        await asyncio.gather(*requests)
        chat.times.seconds = time.perf_counter() - start
        await chat.close()
        return chat.times


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

LOADS: dict[str, tuple[Callable[[], Load], Callable[[], Load], int]] = {
    "conversations": (Conversations, lambda: Conversations(12, 1500, 4), 7000),
    "documents": (Documents, lambda: Documents(4, 3000, 12), 4500),
    "system-prompt": (system_prompt, lambda: system_prompt(2000, 48), 4000),
    "unrelated": (unrelated, lambda: unrelated(24), 4000),
}
"""By name: makers of the quick and of the full load, and the tokens of the full load's pool."""
