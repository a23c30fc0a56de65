"""What models are asked: known text to continue, and generated tasks that need the whole prompt."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mikv_vllm.evaluation.json_lines import read_texts
from mikv_vllm.evaluation.windows import Window, cut_windows, topics_text

KEYS = 24
"""Pairs of a key-value task."""
PASSAGE_WORDS = 48
"""Length of a passage to copy."""
LEAD_WORDS = 12
"""Words of it that are repeated before the model goes on."""


def _words(rng: random.Random, count: int) -> list[str]:
    """Made-up words that no model knows."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return ["".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(count)]


def _place(
    tokenizer: Any, filler: list[int], text: str, question: str, length: int, depth: float
) -> list[int]:
    """A prompt of ``length`` tokens: filler with ``text`` at ``depth`` in it, then ``question``."""
    needle, end = tokenizer(text).input_ids, tokenizer(question).input_ids
    room = length - len(needle) - len(end)
    if room < 0:
        raise ValueError(f"a prompt of {length} tokens cannot hold the task's {length - room}")
    before = int(depth * room)
    return filler[:before] + needle + filler[before:room] + end


def passkey(tokenizer: Any, rng: random.Random, filler: list[int], length: int) -> Window:
    """A number, somewhere in text about something else, asked for at the end."""
    number = str(rng.randint(10000, 99999))
    text = f"\n\nThe pass key is {number}. Remember it. {number} is the pass key.\n\n"
    question = "\n\nWhat is the pass key? The pass key is"
    prompt = _place(tokenizer, filler, text, question, length, rng.random())
    return Window(prompt, tokenizer(f" {number}").input_ids)


def copying(tokenizer: Any, rng: random.Random, filler: list[int], length: int) -> Window:
    """A passage of made-up words that begins again at the end."""
    words = _words(rng, PASSAGE_WORDS)
    text = "\n\n" + " ".join(words) + ".\n\n"
    question = "\n\n" + " ".join(words[:LEAD_WORDS])
    rest = " " + " ".join(words[LEAD_WORDS:])
    prompt = _place(tokenizer, filler, text, question, length, rng.random())
    return Window(prompt, tokenizer(rest).input_ids)


def recall(tokenizer: Any, rng: random.Random, filler: list[int], length: int) -> Window:
    """Pairs of made-up words, one of which is asked for."""
    names, values = _words(rng, KEYS), _words(rng, KEYS)
    pairs = "".join(f"{name} = {value}\n" for name, value in zip(names, values, strict=True))
    asked = rng.randrange(KEYS)
    prompt = _place(
        tokenizer, filler, f"\n\n{pairs}\n", f"\n\n{names[asked]} =", length, rng.random()
    )
    return Window(prompt, tokenizer(f" {values[asked]}").input_ids)


GENERATED: dict[str, Callable[[Any, random.Random, list[int], int], Window]] = {
    "passkey": passkey,
    "copying": copying,
    "recall": recall,
}
TASKS = ("text", *GENERATED)


def windows_of(
    task: str, tokenizer: Any, count: int, prompt: int, continuation: int, text: str | None = None
) -> list[Window]:
    """``count`` windows of a task, the same for the same arguments.

    Args:
        task: one of :data:`TASKS`, or a file of JSON lines, ``{"prompt": …, "answer": …}``, whose
            texts have their own lengths.
        prompt, continuation: tokens; a generated task's answer has a length of its own.
        text: what is continued, and what generated tasks are hidden in; None for the Python
            reference.

    Raises:
        ValueError: there is no such task, or no room for as many windows.
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
    """Lines of a file, ``count`` at most."""
    if not path.is_file():
        raise ValueError(f"--tasks: {path} is no file, and no task: {', '.join(TASKS)}")
    lines = read_texts(path, ("prompt", "answer"), "--tasks")[:count]
    return [Window(*(tokenizer(text).input_ids for text in texts)) for texts in lines]
