"""Needles: numbers in a long text, one of which the question asks for.

A generator in the manner of RULER (arXiv:2404.06654): one key, several keys, several values.
"""

import random
import re
from collections.abc import Callable

from mikv_vllm.evaluation.served_tasks.filler import hide, numbers, paragraphs, places
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Sizes, Verdict

TASK = "needles"
DIGITS = 6
OTHER_KEYS = 7
"""Keys in the text that the question does not ask for, of the kind with several keys."""
VALUES = 4
"""Values of the key, of the kind with several values."""
KINDS = {"one key": (0, 1), "several keys": (OTHER_KEYS, 1), "several values": (0, VALUES)}
"""Other keys in the text, and values of the key that is asked for."""


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each question; kinds and lengths take turns."""
    kinds = [(kind, length) for kind in KINDS for length in sizes.lengths]
    sessions = []
    for index, rng in sizes.draws(TASK, sizes.count):
        kind, length = kinds[index % len(kinds)]
        characters = int(length * sizes.characters_per_token)
        question = _question(rng, f"{kind}, {length} tokens", characters, *KINDS[kind])
        sessions.append(Session((question,)))
    return sessions


def _question(rng: random.Random, kind: str, characters: int, others: int, values: int) -> Question:
    """Return a question.

    Args:
        kind: kind of the question.
        characters: length of the prompt.
        others: keys that the question does not ask for.
        values: values of the key.
    """
    place, *other_places = places(rng, 1 + others)
    wanted = numbers(rng, values, DIGITS)
    facts = [f"An access code of the {place} is {number}." for number in wanted]
    facts += [
        f"An access code of the {other} is {number}."
        for other, number in zip(other_places, numbers(rng, others, DIGITS), strict=True)
    ]
    depths = [rng.random() for _ in facts]
    head = "This text contains access codes. Remember them.\n\n"
    codes = "is the access code" if values == 1 else f"are the {values} access codes"
    tail = f"\n\nWhat {codes} of the {place}? Answer with numbers only."
    room = characters - len(head) - len(tail) - sum(len(fact) + 2 for fact in facts)
    text = hide(paragraphs(rng, room), facts, depths)
    return Question(TASK, kind, head + text + tail, names(wanted), 16 + 16 * values)


def names(wanted: list[str]) -> Callable[[Reply], Verdict]:
    """Return a check that an answer names these numbers and no others.

    The accuracy is the share of the numbers that are both wanted and named.
    """

    def check(reply: Reply) -> Verdict:
        found = set(re.findall(rf"(?<!\d)\d{{{DIGITS}}}(?!\d)", reply.text))
        return Verdict(len(found & set(wanted)) / len(found | set(wanted)))

    return check
