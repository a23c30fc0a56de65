"""Text that surrounds what a question asks for, and random names and numbers."""

import random

from mikv_vllm.evaluation.windows import topics_text

COLOURS = (
    "amber azure beige black bronze coral crimson emerald golden grey indigo ivory jade lilac "
    "maroon olive orange pink purple ruby scarlet silver teal turquoise violet white"
)
PLACES = (
    "abbey bakery barn bridge castle cellar chapel cottage dairy factory ferry forge garden "
    "granary harbour hospital hotel lighthouse library market mill museum observatory orchard "
    "pavilion pier quarry school station theatre tower tunnel vineyard warehouse workshop"
)
FIRST_NAMES = (
    "Ada Bruno Carla Dmitri Elena Farid Greta Hugo Ines Jonas Katya Liam Mira Nils Olga Pavel "
    "Quinn Rosa Stefan Tara Ulrich Vera Wanda Xavier Yusuf Zoe"
)
LAST_NAMES = (
    "Abbott Bauer Castro Dubois Eklund Ferrari Gruber Hansen Ivanov Jensen Kowalski Larsen Moreau "
    "Novak Okafor Petrov Rossi Santos Tanaka Urban Vargas Weber Yilmaz Zhang"
)


def places(rng: random.Random, count: int) -> list[str]:
    """Return different places, for example ``amber lighthouse``, no two with the same noun."""
    nouns = rng.sample(PLACES.split(), count)
    return [f"{rng.choice(COLOURS.split())} {noun}" for noun in nouns]


def people(rng: random.Random, count: int) -> list[str]:
    """Return names of people, no two with the same first or last name."""
    firsts, lasts = rng.sample(FIRST_NAMES.split(), count), rng.sample(LAST_NAMES.split(), count)
    return [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]


def numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """Return different numbers of ``digits`` digits."""
    return [str(n) for n in rng.sample(range(10 ** (digits - 1), 10**digits), count)]


def paragraphs(rng: random.Random, characters: int) -> list[str]:
    """Return consecutive paragraphs of the Python reference.

    Args:
        rng: chooses the first one.
        characters: length of all paragraphs together; the last one is cut.
    """
    text = topics_text()
    start = rng.randrange(max(1, len(text) - characters))
    found, length = [], 0
    # The text is long enough: after its end its beginning follows.
    for paragraph in (text[start:] + text).split("\n\n")[1:]:
        if not paragraph.strip():
            continue
        found.append(paragraph.strip("\n")[: characters - length])
        length += len(found[-1]) + 2
        if length >= characters:
            break
    return found


def hide(filler: list[str], facts: list[str], depths: list[float]) -> str:
    """Return the text of ``filler`` with each fact as a paragraph of its own.

    Args:
        filler: paragraphs.
        facts: sentences to insert.
        depths: position of each fact in the text, from 0 to 1, by characters.
    """
    total = sum(map(len, filler))
    ends, reached = [0], 0
    for paragraph in filler:
        reached += len(paragraph)
        ends.append(reached)
    parts: list[tuple[int, int, str]] = [(i, 1, text) for i, text in enumerate(filler)]
    for fact, depth in zip(facts, depths, strict=True):
        nearest = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * total))
        parts.append((nearest, 0, fact))
    return "\n\n".join(text for _, _, text in sorted(parts, key=lambda part: part[:2]))
