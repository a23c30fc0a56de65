"""Tasks: known text to continue, and generated tasks that depend on the whole prompt."""

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from mikv_vllm.evaluation.json_lines import read_texts
from mikv_vllm.evaluation.windows import Window, cut_windows, topics_text

KEYS = 24
"""Pairs in the recall task."""
PASSAGE_WORDS = 48
"""Words of the passage in the copying task."""
LEAD_WORDS = 12
"""Words of the passage that are repeated at the end of the prompt."""


def _words(rng: random.Random, count: int) -> list[str]:
    """Return random made-up words."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(count)]


def _place(
    tokenizer: Any, filler: list[int], text: str, question: str, length: int, depth: float
) -> list[int]:
    """Return a prompt of ``length`` tokens: filler that contains ``text``, then ``question``.

    Args:
        tokenizer: tokenizer of the model.
        filler: token ids, at least ``length``.
        text: text that the answer depends on.
        question: end of the prompt.
        length: tokens of the prompt.
        depth: position of ``text`` in the filler, from 0 to 1.

    Raises:
        ValueError: ``text`` and ``question`` are longer than the prompt.
    """
    needle, end = tokenizer(text).input_ids, tokenizer(question).input_ids
    room = length - len(needle) - len(end)
    if room < 0:
        raise ValueError(f"a prompt of {length} tokens cannot hold the task's {length - room}")
    before = int(depth * room)
    return filler[:before] + needle + filler[before:room] + end


def passkey(
    tokenizer: Any, rng: random.Random, filler: list[int], length: int, depth: float = 1.0
) -> Window:
    """Hide a number in the first ``depth`` of the filler and ask for it at the end.

    Source: Landmark Attention (Mohtashami and Jaggi, 2023, arXiv:2305.16300).
    """
    number = str(rng.randint(10000, 99999))
    text = f"\n\nThe pass key is {number}. Remember it. {number} is the pass key.\n\n"
    question = "\n\nWhat is the pass key? The pass key is"
    prompt = _place(tokenizer, filler, text, question, length, depth * rng.random())
    return Window(prompt, tokenizer(f" {number}").input_ids)


def conversation(tokenizer: Any, rng: random.Random, filler: list[int], length: int) -> Window:
    """Hide a number in the first turn of a conversation and ask for it in the fourth one."""
    # The key ends before the first turn, which is half of the text, does.
    window = passkey(tokenizer, rng, filler, length, depth=0.45)
    first, *later = split_turns(window.prompt)
    return Window(first, window.continuation, tuple(later))


def split_turns(tokens: list[int]) -> list[list[int]]:
    """Split a text into four turns: a half, and three sixths."""
    half, sixth = len(tokens) // 2, len(tokens) // 6
    cuts = [0, half, half + sixth, half + 2 * sixth, len(tokens)]
    return [tokens[start:end] for start, end in pairwise(cuts)]


def copying(tokenizer: Any, rng: random.Random, filler: list[int], length: int) -> Window:
    """Hide a passage of made-up words, and repeat its beginning at the end."""
    words = _words(rng, PASSAGE_WORDS)
    text = "\n\n" + " ".join(words) + ".\n\n"
    question = "\n\n" + " ".join(words[:LEAD_WORDS])
    rest = " " + " ".join(words[LEAD_WORDS:])
    prompt = _place(tokenizer, filler, text, question, length, rng.random())
    return Window(prompt, tokenizer(rest).input_ids)


def recall(tokenizer: Any, rng: random.Random, filler: list[int], length: int) -> Window:
    """Hide pairs of made-up words, and ask for the second word of one pair."""
    names, values = _words(rng, KEYS), _words(rng, KEYS)
    pairs = "".join(f"{name} = {value}\n" for name, value in zip(names, values, strict=True))
    asked = rng.randrange(KEYS)
    prompt = _place(
        tokenizer, filler, f"\n\n{pairs}\n", f"\n\n{names[asked]} =", length, rng.random()
    )
    return Window(prompt, tokenizer(f" {values[asked]}").input_ids)


GENERATED: dict[str, Callable[[Any, random.Random, list[int], int], Window]] = {
    "passkey": passkey,
    "conversation": conversation,
    "copying": copying,
    "recall": recall,
}
"""Functions that make a window of ``length`` tokens from ``filler``."""
TASKS = ("text", *GENERATED)


def windows_of(
    task: str, tokenizer: Any, count: int, prompt: int, continuation: int, text: str | None = None
) -> list[Window]:
    """Return windows of a task, the same ones for the same arguments.

    Args:
        task: one of :data:`TASKS`, or a file with lines ``{"prompt": …, "answer": …}``. The texts
            of a file keep their lengths.
        tokenizer: tokenizer of the model.
        count: number of windows; largest number for a file.
        prompt: tokens of a prompt.
        continuation: tokens of a continuation. Answers of generated tasks keep their lengths.
        text: text to continue, and filler of generated tasks; None for the Python reference.

    Raises:
        ValueError: the task does not exist, or the text is too short.
    """
    text = topics_text() if text is None else text
    if task not in TASKS:
        return _own_windows(tokenizer, Path(task), count)
    if task == "text":
        return cut_windows(tokenizer, count, prompt, continuation, text)
    tokens = tokenizer(text).input_ids
    rng = random.Random(f"{task} {count} {prompt}")
    windows = []
    for _ in range(count):
        start = rng.randrange(max(1, len(tokens) - prompt))
        windows.append(GENERATED[task](tokenizer, rng, tokens[start : start + prompt], prompt))
    return windows


def _own_windows(tokenizer: Any, path: Path, count: int) -> list[Window]:
    """Read at most ``count`` windows from a file."""
    if not path.is_file():
        raise ValueError(
            f"--tasks: {path} is neither a file nor one of the tasks {', '.join(TASKS)}"
        )
    lines = read_texts(path, ("prompt", "answer"), "--tasks")[:count]
    return [Window(*(tokenizer(text).input_ids for text in texts)) for texts in lines]
