"""Questions whose answers code can check."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class ToolCall(NamedTuple):
    """A tool call of an answer, as the server returned it."""

    name: str
    arguments: str
    """JSON, not parsed."""


@dataclass(frozen=True)
class Reply:
    """What a server answered to one request."""

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""
    report: dict[str, Any] = field(default_factory=dict)
    """Field ``kv_compression`` of the response."""


@dataclass(frozen=True)
class Verdict:
    """How right an answer is."""

    accuracy: float
    """From 0 to 1."""
    valid: bool | None = None
    """Whether the answer has the form that was asked for; None where no form is asked for."""


@dataclass(frozen=True)
class Question:
    """One request, and the check of its answer."""

    task: str
    kind: str
    """Questions of one kind share a row of the detailed table."""
    content: str
    """Message of the user."""
    check: Callable[[Reply], Verdict]
    max_tokens: int
    tools: tuple[dict[str, Any], ...] = ()
    response_format: dict[str, Any] | None = None


@dataclass(frozen=True)
class Session:
    """Questions that are asked one after the other, at each ratio."""

    questions: tuple[Question, ...]
    opening: str = ""
    """First turn of the conversation, which is sent once at each ratio, before the questions are
    known; every question continues it. Empty: a question is the first turn."""
    opening_max_tokens: int = 16

    def identifiers(self) -> list[str]:
        """Return an identifier of each question, which changes with anything that is sent."""
        return [
            hashlib.sha256(
                json.dumps(
                    [
                        self.opening,
                        question.task,
                        question.kind,
                        question.content,
                        question.max_tokens,
                        question.tools,
                        question.response_format,
                    ]
                ).encode()
            ).hexdigest()[:16]
            for question in self.questions
        ]


@dataclass(frozen=True)
class Sizes:
    """How many questions to make, and how long."""

    count: int
    """Questions of each task, spread over its kinds."""
    lengths: tuple[int, ...]
    """Tokens of the prompts of needles and documents."""
    answer_tokens: int
    """Most tokens of a long answer."""
    characters_per_token: float
    """Of the model's tokenizer, in the filler."""
    seed: int = 0

    def draws(self, task: str, count: int) -> Iterator[tuple[int, random.Random]]:
        """Yield ``count`` indices, each with its own random numbers.

        So the questions of a smaller count are among those of a larger one.
        """
        for index in range(count):
            yield index, random.Random(f"{task} {index} {self.seed}")

    def order(self, task: str, total: int) -> list[int]:
        """Return the indices of ``total`` given questions in random order."""
        return random.Random(f"{task} {self.seed}").sample(range(total), total)
