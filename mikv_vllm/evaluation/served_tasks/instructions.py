"""Several instructions in one prompt, each of which code can verify.

A generator in the manner of IFEval (arXiv:2311.07911). The instructions are about an answer to a
question about a text.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

from mikv_vllm.evaluation.served_tasks.filler import paragraphs
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Sizes, Verdict

TASK = "instructions"
TOKENS = 800
"""Of the text."""
INSTRUCTIONS = 4
"""In a prompt."""
WORDS = ("window", "garden", "river", "copper", "music", "winter", "bread", "market")
"""Words that an answer has to contain or to avoid."""
COMMON = ("the", "and", "is", "python")


class Instruction(NamedTuple):
    """An instruction about an answer."""

    text: str
    is_followed: Callable[[str], bool]


def bullets(rng: random.Random) -> Instruction:
    """A number of bullet points."""
    count = rng.randint(3, 6)
    return Instruction(
        f"The answer has exactly {count} bullet points, which are lines that begin with '* '.",
        lambda text: len(re.findall(r"^\* ", text, re.MULTILINE)) == count,
    )


def sections(rng: random.Random) -> Instruction:
    """A number of paragraphs with a separator."""
    count = rng.randint(2, 4)
    return Instruction(
        f"The answer has exactly {count} paragraphs, with the line '***' between them.",
        lambda text: len([part for part in text.split("***") if part.strip()]) == count,
    )


def keyword(rng: random.Random) -> Instruction:
    """A word that has to be there several times."""
    word, count = rng.choice(WORDS), rng.randint(1, 3)
    return Instruction(
        f"The word '{word}' is in the answer at least {count} {'time' if count == 1 else 'times'}.",
        lambda text: len(_words(text, word)) >= count,
    )


def forbidden(rng: random.Random) -> Instruction:
    """A word that must not be there."""
    word = rng.choice(COMMON)
    return Instruction(
        f"The word '{word}' is not in the answer.", lambda text: not _words(text, word)
    )


def no_commas(rng: random.Random) -> Instruction:
    """No commas."""
    return Instruction("The answer has no commas.", lambda text: "," not in text)


def lowercase(rng: random.Random) -> Instruction:
    """Small letters only."""
    return Instruction("The answer has no capital letters.", lambda text: text == text.lower())


def ending(rng: random.Random) -> Instruction:
    """Given last words."""
    end = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
    return Instruction(
        f"The last words of the answer are '{end}', and nothing follows them.",
        lambda text: text.strip().endswith(end),
    )


def title(rng: random.Random) -> Instruction:
    """A title in double angle brackets."""
    return Instruction(
        "The answer begins with a title in double angle brackets, like <<title>>.",
        lambda text: re.match(r"\s*<<[^<>\n]+>>", text) is not None,
    )


def short(rng: random.Random) -> Instruction:
    """A largest number of words."""
    count = rng.choice((60, 80, 100))
    return Instruction(
        f"The answer has at most {count} words.", lambda text: len(text.split()) <= count
    )


def long(rng: random.Random) -> Instruction:
    """A least number of words."""
    count = rng.choice((40, 60, 80))
    return Instruction(
        f"The answer has at least {count} words.", lambda text: len(text.split()) >= count
    )


CHOICES = (
    (bullets, sections),
    (keyword, forbidden),
    (no_commas, lowercase),
    (ending, title),
    (short, long),
)
"""A prompt has at most one instruction of each row, so that all of them can be followed."""


def _words(text: str, word: str) -> list[str]:
    return re.findall(rf"\b{word}\b", text, re.IGNORECASE)


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each question."""
    characters = int(TOKENS * sizes.characters_per_token)
    sessions = []
    for _, rng in sizes.draws(TASK, sizes.count):
        rows = rng.sample(CHOICES, INSTRUCTIONS)
        chosen = [rng.choice(row)(rng) for row in rows]
        text = "\n\n".join(paragraphs(rng, characters))
        rules = "\n".join(f"{i}. {one.text}" for i, one in enumerate(chosen, 1))
        content = f"{text}\n\nExplain what this text is about. Follow all of these rules:\n{rules}"
        question = Question(
            TASK, f"{INSTRUCTIONS} instructions", content, follows(chosen), max_tokens=256
        )
        sessions.append(Session((question,)))
    return sessions


def follows(instructions: list[Instruction]) -> Callable[[Reply], Verdict]:
    """Return a check: the accuracy is the share of instructions that an answer follows."""

    def check(reply: Reply) -> Verdict:
        followed = sum(one.is_followed(reply.text) for one in instructions)
        return Verdict(followed / len(instructions))

    return check
