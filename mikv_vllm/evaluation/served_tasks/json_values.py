"""JSON by a schema: values of a text, with and without structured output.

Structured output constrains the server to the schema, so without it answers can be invalid.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from mikv_vllm.evaluation.served_tasks.filler import hide, numbers, paragraphs, people, places
from mikv_vllm.evaluation.served_tasks.json_text import JsonError, find_json, follows_schema
from mikv_vllm.evaluation.served_tasks.question import Question, Reply, Session, Sizes, Verdict

TASK = "json"
KINDS = {"free": False, "structured output": True}
"""Whether the request has a ``response_format``."""
TOKENS = 1024
"""Of a prompt."""
ANSWER_TOKENS = 480
"""Most tokens of an answer."""
ITEMS = 4
"""Orders in a text."""
GOODS = ["apples", "bricks", "candles", "drums", "engines", "flutes", "gloves", "kites", "lamps"]
TEXT = {"type": "string", "maxLength": 40}
SCHEMA = {
    "type": "object",
    "properties": {
        "place": TEXT,
        "orders": {
            "type": "array",
            "maxItems": ITEMS + 2,
            "items": {
                "type": "object",
                "properties": {
                    "customer": TEXT,
                    "goods": {"type": "string", "enum": GOODS},
                    "pieces": {"type": "integer", "minimum": 0, "maximum": 9999},
                    "paid": {"type": "boolean"},
                },
                "required": ["customer", "goods", "pieces", "paid"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["place", "orders"],
    "additionalProperties": False,
}
"""Schema of the answer. Its limits let structured output end within ``ANSWER_TOKENS``."""


def make(sizes: Sizes) -> list[Session]:
    """Return a session for each question; the kinds take turns on the same texts."""
    sessions = []
    for index, _ in sizes.draws(TASK, sizes.count):
        kind = list(KINDS)[index % len(KINDS)]
        rng = random.Random(f"{TASK} {index // len(KINDS)} {sizes.seed}")
        characters = int(TOKENS * sizes.characters_per_token)
        sessions.append(Session((_question(rng, kind, characters, KINDS[kind]),)))
    return sessions


def _question(rng: random.Random, kind: str, characters: int, structured: bool) -> Question:
    (place,) = places(rng, 1)
    orders: list[dict[str, Any]] = [
        {"customer": name, "goods": goods, "pieces": int(pieces), "paid": rng.random() < 0.5}
        for name, goods, pieces in zip(
            people(rng, ITEMS), rng.sample(GOODS, ITEMS), numbers(rng, ITEMS, 3), strict=True
        )
    ]
    facts = [f"These are orders that the {place} received."]
    facts += [
        f"{order['customer']} ordered {order['pieces']} {order['goods']} and has "
        f"{'already paid' if order['paid'] else 'not paid yet'}."
        for order in orders
    ]
    depths = [i / len(facts) for i in range(len(facts))]
    tail = (
        "\n\nThe text above contains orders. Write the place that received them, and all orders in "
        "the order of the text, as one JSON object that follows this JSON schema:\n"
        f"{json.dumps(SCHEMA)}\nAnswer with the JSON object only."
    )
    room = characters - len(tail) - sum(len(fact) + 2 for fact in facts)
    return Question(
        TASK,
        kind,
        hide(paragraphs(rng, room), facts, depths) + tail,
        has_values({"place": place, "orders": orders}),
        max_tokens=ANSWER_TOKENS,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "orders", "schema": SCHEMA},
        }
        if structured
        else None,
    )


def has_values(wanted: dict[str, Any]) -> Callable[[Reply], Verdict]:
    """Return a check that an answer is JSON with these values.

    An answer is valid if it follows the schema. The accuracy is the share of right values.
    """

    def check(reply: Reply) -> Verdict:
        try:
            found = find_json(reply.text)
        except JsonError:
            return Verdict(0.0, valid=False)
        right = dict(leaves(wanted))
        mine = dict(leaves(found))
        names = right.keys() | mine.keys()
        same = len(right.items() & mine.items())
        return Verdict(same / len(names), valid=follows_schema(found, SCHEMA))

    return check


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return all values that contain no others, with their paths. Case does not matter."""
    if isinstance(value, dict):
        return [leaf for name, one in value.items() for leaf in leaves(one, f"{path}.{name}")]
    if isinstance(value, list):
        return [leaf for i, one in enumerate(value) for leaf in leaves(one, f"{path}[{i}]")]
    return [(path, _normal(value))]


def _normal(value: Any) -> Any:
    """Return a text without case and article, and any other value as it is, with its type."""
    if isinstance(value, str):
        return value.casefold().removeprefix("the ").strip()
    return type(value).__name__, value
