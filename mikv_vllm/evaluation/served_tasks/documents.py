"""Several questions about one document, which is compressed before they are asked.

The first turn of a conversation is the document alone. Every question is a second turn of it, so it
reads blocks whose important tokens were chosen without it: the case that SCBench (arXiv:2412.10319)
measures.
"""

import random
import re
from collections.abc import Callable
from math import ceil

from mikv_vllm.evaluation.served_tasks.filler import hide, numbers, paragraphs, people, places
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Sizes, Verdict

TASK = "documents"
QUESTIONS = 6
"""About each document."""


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each document; lengths take turns."""
    sessions = []
    for index, rng in sizes.draws(TASK, ceil(sizes.count / QUESTIONS)):
        length = sizes.lengths[index % len(sizes.lengths)]
        characters = int(length * sizes.characters_per_token)
        count = min(QUESTIONS, sizes.count - index * QUESTIONS)
        sessions.append(_document(rng, f"{length} tokens", characters, count))
    return sessions


def _document(rng: random.Random, kind: str, characters: int, count: int) -> Session:
    """Return a document with ``QUESTIONS`` facts, and questions about ``count`` of them."""
    facts, questions = [], []
    keepers, years = people(rng, QUESTIONS), numbers(rng, QUESTIONS, 4)
    for i, place in enumerate(places(rng, QUESTIONS)):
        if i % 2:
            facts.append(f"The {place} was opened in the year {years[i]}.")
            asked, right, others = "In which year was the {} opened?", years[i], years
        else:
            facts.append(f"The keeper of the {place} is {keepers[i]}.")
            asked, right, others = "Who is the keeper of the {}?", keepers[i], keepers
        questions.append(
            Question(
                TASK,
                kind,
                asked.format(place) + " Answer in one sentence.",
                says(right, [other for other in others if other != right]),
                max_tokens=48,
            )
        )
    depths = [(i + rng.random()) / QUESTIONS for i in range(QUESTIONS)]
    rng.shuffle(depths)
    head = "Read this document. Questions about it follow later.\n\n"
    tail = '\n\nThis is the end of the document. For now, answer with the word "ready".'
    room = characters - len(head) - len(tail) - sum(len(fact) + 2 for fact in facts)
    return Session(
        tuple(rng.sample(questions, QUESTIONS)[:count]),
        opening=head + hide(paragraphs(rng, room), facts, depths) + tail,
    )


def says(right: str, others: list[str]) -> Callable[[Reply], Verdict]:
    """Return a check that an answer contains a name or number, and none of the others."""

    def contains(text: str, word: str) -> bool:
        return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None

    def check(reply: Reply) -> Verdict:
        wrong = any(contains(reply.text, other) for other in others)
        return Verdict(float(contains(reply.text, right) and not wrong))

    return check
