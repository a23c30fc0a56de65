"""Windows of text: a prompt and the tokens that follow it."""

import pydoc_data.topics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one text, cut in two."""

    prompt: list[int]
    continuation: list[int]


def topics_text() -> str:
    """The Python reference in the standard library, about 113,000 tokens."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


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
