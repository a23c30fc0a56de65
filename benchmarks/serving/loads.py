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
from typing import Any

from mikv_vllm.evaluation.windows import topics_text


@dataclass
class Times:
    """What the clients of one load saw."""

    seconds: float = 0.0
    """From the first request to the end of the last answer."""
    prompt_tokens: int = 0
    new_tokens: int = 0
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
            f"{self.answer} an answer"
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with some for the chat template."""
        return self.document + self.turns * (self.question + self.answer + 20) + 40

    def run(self, target: Target) -> Times:
        return asyncio.run(self._run(target))

    async def _run(self, target: Target) -> Times:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(base_url=f"{target.url}/v1", api_key="none", timeout=1800)
        histories = self._documents(target.model)
        questions = random.Random(0)
        times, start = Times(), time.perf_counter()
        limit = asyncio.Semaphore(self.at_once)
        for turn in range(self.turns):
            order = list(histories)
            if turn:
                questions.shuffle(order)
            print(f"  turn {turn + 1} of {self.turns}", flush=True)
            turns = (self._turn(client, target, histories[name], limit, times) for name in order)
            await asyncio.gather(*turns)
        times.seconds = time.perf_counter() - start
        await client.close()
        return times

    def _documents(self, model: str) -> dict[int, "_History"]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokens = tokenizer(topics_text()).input_ids
        size = self.document + self.turns * self.question
        assert self.count * size <= len(tokens), "the text is too short for these conversations"
        histories = {}
        for i in range(self.count):
            own = tokens[i * size : (i + 1) * size]
            cut = [self.document + t * self.question for t in range(self.turns + 1)]
            parts = [tokenizer.decode(own[a:b]) for a, b in zip([0, *cut[:-1]], cut, strict=True)]
            questions = [f"{parts[0]}\n\n{parts[1]}", *parts[2:]]
            histories[i] = _History(questions)
        return histories

    async def _turn(
        self, client: Any, target: Target, history: "_History", limit: Any, times: Times
    ) -> None:
        async with limit:
            history.messages.append({"role": "user", "content": history.questions.pop(0)})
            last, start, answer = None, time.perf_counter(), []
            stream = await client.chat.completions.create(
                model=target.model,
                messages=history.messages,
                max_tokens=self.answer,
                temperature=0.0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True, **target.extra_body},
            )
            async for event in stream:
                now = time.perf_counter()
                if event.usage:
                    times.prompt_tokens += event.usage.prompt_tokens
                    times.new_tokens += event.usage.completion_tokens
                if not event.choices or not event.choices[0].delta.content:
                    continue
                answer.append(event.choices[0].delta.content)
                if last is None:
                    times.first.append(now - start)
                else:
                    times.between.append(now - last)
                last = now
            history.messages.append({"role": "assistant", "content": "".join(answer)})


@dataclass
class _History:
    """One conversation: the questions to come, and what was said."""

    questions: list[str]
    messages: list[dict[str, str]] = field(default_factory=list)


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


def documents(
    count: int = 3, document: int = 1500, questions: int = 6, question: int = 60, answer: int = 32
) -> BenchServe:
    """Questions about shared documents, interleaved at random."""
    return BenchServe(
        "Shared documents",
        f"{count} documents of {document} tokens, {questions} questions of {question} tokens about "
        f"each, interleaved at random, 2 at a time, {answer} tokens an answer",
        document + question + answer + 8,
        {
            "dataset-name": "prefix_repetition",
            "num-prompts": count * questions,
            "prefix-repetition-num-prefixes": count,
            "prefix-repetition-prefix-len": document,
            "prefix-repetition-suffix-len": question,
            "prefix-repetition-output-len": answer,
            "max-concurrency": 2,
        },
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


LOADS: dict[str, Callable[[], Conversations | BenchServe]] = {
    "conversations": Conversations,
    "documents": documents,
    "system-prompt": system_prompt,
    "unrelated": unrelated,
}
"""Makers of the default loads, by name."""
