"""Windows of text: a prompt and the tokens that follow it."""

import pydoc_data.topics
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text, cut in two."""

    prompt: list[int]
    continuation: list[int]

    @property
    def inputs(self) -> list[int]:
        """What a model is given to predict the continuation: the prompt's last token, and so on."""
        return [self.prompt[-1], *self.continuation[:-1]]


RUN_WORDS = 12
"""Texts that have this many words in a row in common overlap."""


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of :data:`RUN_WORDS` words."""
    words = text.split()
    return {tuple(words[i : i + RUN_WORDS]) for i in range(len(words) - RUN_WORDS + 1)}


@cache
def _split_topics() -> tuple[str, str]:
    """Texts for evaluation and for calibration. Topics quote one another: none is in both."""
    topics = pydoc_data.topics.topics
    names = sorted(topics)
    calibration = "\n".join(topics[name] for name in names[::4])
    known = word_runs(calibration)
    others = [topics[name] for name in names if name not in names[::4]]
    return "\n".join(text for text in others if not word_runs(text) & known), calibration


def topics_text() -> str:
    """Most of the Python reference in the standard library, about 67,000 tokens: for evaluation."""
    return _split_topics()[0]


def calibration_text() -> str:
    """Other topics of it, about 30,000 tokens: what formats were chosen by, never evaluated on."""
    return _split_topics()[1]


def cut_windows(
    tokenizer: Any, count: int, prompt: int, continuation: int, text: str | None = None
) -> list[Window]:
    """``count`` windows, spread evenly over ``text`` (:func:`topics_text`), lengths in tokens.

    Raises:
        ValueError: the text is too short for as many.
    """
    tokens = tokenizer(topics_text() if text is None else text).input_ids
    stride = (len(tokens) - prompt - continuation) // count
    if stride < 0 or (stride < prompt + continuation and count > 1):
        raise ValueError(
            f"{count} windows of {prompt} + {continuation} tokens do not fit {len(tokens)} tokens"
        )
    starts = [i * stride for i in range(count)]
    return [
        Window(tokens[s : s + prompt], tokens[s + prompt : s + prompt + continuation])
        for s in starts
    ]
