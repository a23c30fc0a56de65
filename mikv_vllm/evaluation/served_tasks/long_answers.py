"""Long answers: does the text stay on its subject to the end?

A prompt asks for a handbook with given sections. The accuracy is the share of sections that the
answer has, in their order. Repetition and the divergence from the answer at ratio 1 are in a table
of their own.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil, sqrt
from statistics import fmean

from mikv_vllm.evaluation.served_tasks.filler import places
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Sizes, Verdict
from mikv_vllm.evaluation.served_tasks.results import Result
from mikv_vllm.evaluation.tables import markdown_table

TASK = "long-answers"
TOPICS = (
    "history location architecture staff training equipment energy water safety fire cleaning "
    "storage suppliers prices customers advertising accounting insurance transport weather repairs "
    "neighbours festivals complaints"
)
"""Subjects of sections."""
TOKENS_PER_SECTION = 125
"""Of an answer."""
SHARE = 6
"""Questions of other tasks for each of this one, whose answers are so much longer."""
GRAM = 4
"""Words that are a repetition if they follow each other a second time."""
PARTS = 4
"""Parts of an answer whose words are compared with those of the same part at ratio 1."""


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each question."""
    count = min(len(TOPICS.split()), max(2, sizes.answer_tokens // TOKENS_PER_SECTION))
    sessions = []
    for _, rng in sizes.draws(TASK, ceil(sizes.count / SHARE)):
        (place,) = places(rng, 1)
        topics = rng.sample(TOPICS.split(), count)
        headings = "\n".join(f"## {topic}" for topic in topics)
        content = (
            f"Write a detailed handbook for the new owner of the {place}. It has exactly these "
            f"{count} sections, in this order, each with this heading and about 90 words of "
            f"text:\n\n{headings}\n\nWrite the whole handbook now, and do not repeat yourself."
        )
        question = Question(
            TASK,
            f"{sizes.answer_tokens} tokens",
            content,
            has_sections(topics),
            max_tokens=sizes.answer_tokens,
        )
        sessions.append(Session((question,)))
    return sessions


def has_sections(topics: Sequence[str]) -> Callable[[Reply], Verdict]:
    """Return a check: the accuracy is the share of sections that are there, in their order."""

    def check(reply: Reply) -> Verdict:
        found = re.findall(r"^#+[\W\d]*(.*?)\W*$", reply.text.casefold(), re.MULTILINE)
        return Verdict(_common_order(list(topics), found) / len(topics))

    return check


def _common_order(wanted: Sequence[str], found: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    best = [0] * (len(found) + 1)
    for one in wanted:
        before = best
        best = [0]
        for i, other in enumerate(found):
            best.append(before[i] + 1 if one == other else max(before[i + 1], best[i]))
    return best[-1]


def repetition(text: str) -> float:
    """Return the share of runs of words that were in the text before."""
    words = text.casefold().split()
    runs = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def shared_words(text: str, reference: str) -> int:
    """Return the number of words before the first one that differs."""
    mine, theirs = text.split(), reference.split()
    different = (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b)
    return next(different, min(len(mine), len(theirs)))


def similarity(text: str, reference: str) -> list[float]:
    """Return the cosine of the word counts of each part of two texts."""

    def parts(whole: str) -> list[Counter[str]]:
        words = re.findall(r"\w+", whole.casefold())
        cuts = [len(words) * i // PARTS for i in range(PARTS + 1)]
        return [Counter(words[a:b]) for a, b in pairwise(cuts)]

    return [_cosine(a, b) for a, b in zip(parts(text), parts(reference), strict=True)]


def _cosine(a: Counter[str], b: Counter[str]) -> float:
    length = sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(a[word] * b[word] for word in a) / length if length else 0.0


def section(results: Sequence[Result]) -> str:
    """Return the section of the report about long answers; empty if there are none."""
    mine = [result for result in results if result.task == TASK]
    reference = {result.key: result.text for result in mine if result.ratio == 1.0}
    table = []
    for ratio in dict.fromkeys(result.ratio for result in mine):
        answers = [result for result in mine if result.ratio == ratio]
        pairs = [(r.text, reference[r.key]) for r in answers if ratio > 1 and r.key in reference]
        parts = [similarity(*pair) for pair in pairs]
        table.append(
            {
                "ratio": f"{ratio:g}",
                "words": f"{fmean(len(result.text.split()) for result in answers):.0f}",
                f"repeated runs of {GRAM} words, %": _percent(
                    [repetition(result.text) for result in answers]
                ),
                "words before the first difference": f"{fmean(shared_words(*p) for p in pairs):.0f}"
                if pairs
                else None,
                **{
                    f"words like ratio 1, part {i + 1}, %": _percent([part[i] for part in parts])
                    for i in range(PARTS)
                },
            }
        )
    return f"## Long answers\n\n{markdown_table(table)}" if table else ""


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * fmean(shares):.1f}" if shares else ""
