"""Windows of text: a prompt and the tokens that follow it. Also the texts of the evaluation."""

import operator
import pydoc_data.topics
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from typing import Any


@dataclass(frozen=True)
class Window:
    """A prompt and its continuation, as token ids."""

    prompt: list[int]
    """What is compressed first."""
    continuation: list[int]
    """What is measured."""
    turns: tuple[list[int], ...] = ()
    """Later turns, between both: they are not known when the prompt is compressed."""

    @property
    def prompts(self) -> list[list[int]]:
        """The whole prompt of each turn; the last one ends before the continuation."""
        return [*accumulate(self.turns, operator.add, initial=self.prompt)]

    @property
    def inputs(self) -> list[int]:
        """Inputs of the model after the prompt: the token before each one that follows it."""
        return [self.prompt[-1], *chain(*self.turns), *self.continuation[:-1]]


RUN_WORDS = 12
"""Two texts overlap if they share a run of this many words."""


def word_runs(text: str) -> set[tuple[str, ...]]:
    """Return all runs of :data:`RUN_WORDS` words."""
    words = text.split()
    return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


@cache
def _split_topics() -> tuple[str, str]:
    """Return the texts for evaluation and for calibration.

    Topics of the Python reference quote each other. A topic that shares a run of words with the
    calibration text is in neither text.
    """
    topics = pydoc_data.topics.topics
    names = sorted(topics)
    calibration = "\n".join(topics[name] for name in names[::4])
    known = word_runs(calibration)
    others = [topics[name] for name in names if name not in names[::4]]
    return "\n".join(text for text in others if not word_runs(text) & known), calibration


def topics_text() -> str:
    """Return the evaluation text: most topics of the Python reference, about 67,000 tokens.

    The topics are those of ``pydoc_data`` in the standard library.
    """
    return _split_topics()[0]


def calibration_text() -> str:
    """Return the calibration text: other topics of the Python reference, about 30,000 tokens."""
    return _split_topics()[1]


def cut_windows(
    tokenizer: Any, count: int, prompt: int, continuation: int, text: str | None = None
) -> list[Window]:
    """Cut windows that do not overlap, at equal distances in a text.

    Args:
        tokenizer: tokenizer of the model.
        count: number of windows.
        prompt: tokens of a prompt.
        continuation: tokens of a continuation.
        text: None for :func:`topics_text`.

    Raises:
        ValueError: the text is too short.
    """
    tokens = tokenizer(topics_text() if text is None else text).input_ids
    stride = (len(tokens) - prompt - continuation) // count
    if stride < 0 or (stride < prompt + continuation and count > 1):
        raise ValueError(
            f"{count} windows of {prompt} + {continuation} tokens do not fit into a text of "
            f"{len(tokens)} tokens; give fewer or shorter ones"
        )
    starts = [i * stride for i in range(count)]
    return [
        Window(tokens[s : s + prompt], tokens[s + prompt : s + prompt + continuation])
        for s in starts
    ]
