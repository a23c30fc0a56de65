"""Whether speculative decoding over compressed caches makes answers loop.

Prompts with tools, and prompts whose text repeats itself, are answered at temperature 0 with and
without drafts of n-grams. An answer loops if it ends with the same tokens again and again; without
drafts some answers of a small model loop, too. Answers part at near ties, because steps with other
numbers of tokens round differently, and then one of the two may loop. Ends with status 1 if more
answers loop with drafts only than without drafts only (sign test, 1 %).

  python -m benchmarks.loops --prompts 500
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from typing import Any

from vllm import LLM, SamplingParams

from benchmarks.engines import Contender, engines
from mikv_vllm.evaluation.served_tasks.filler import numbers, paragraphs, people, places
from mikv_vllm.evaluation.tables import markdown_table

LONGEST_PERIOD = 24
"""Tokens that a loop repeats, at most."""
LEAST_REPEATED = 72
"""Tokens at the end of an answer that are those before them again, at least."""
NEAR = 0.25
"""Largest difference of log-probabilities at a near tie."""
CHARACTERS = 1500
"""Of the text in a prompt with tools."""
POOL_BYTES = 512 << 20
AT_ONCE = 16
"""Requests at once. With more, prompts would be compressed in parts, as the pool allows."""
SIGNIFICANT = 0.01
"""Chance below which a difference is no accident."""


def is_loop(tokens: Sequence[int]) -> bool:
    """Whether an answer repeats the same tokens to its end."""
    return any(
        len(tokens) >= LEAST_REPEATED + period
        and tokens[-LEAST_REPEATED:] == tokens[-LEAST_REPEATED - period : -period]
        for period in range(1, LONGEST_PERIOD + 1)
    )


def tool(rng: random.Random, place: str) -> dict[str, Any]:
    """A function with three parameters."""
    names = rng.sample(("name", "date", "floor", "guests", "price", "reason", "colour"), 3)
    properties = {name: {"type": rng.choice(("string", "integer", "boolean"))} for name in names}
    return {
        "name": "book_" + place.replace(" ", "_"),
        "description": f"Books a room in the {place}.",
        "parameters": {"type": "object", "properties": properties, "required": names},
    }


def with_tools(rng: random.Random) -> list[dict[str, str]]:
    """Messages that offer tools and ask for calls of three."""
    tools = [tool(rng, place) for place in places(rng, 6)]
    offered = "\n".join(json.dumps(one) for one in tools)
    wanted = ", ".join(one["name"] for one in rng.sample(tools, 3))
    text = "\n\n".join(paragraphs(rng, CHARACTERS))
    (person,), (number,) = people(rng, 1), numbers(rng, 1, 3)
    return [
        {"role": "system", "content": f"Answer with JSON calls of these tools only:\n{offered}"},
        {"role": "user", "content": f"{text}\n\nCall {wanted} for {person} and {number} guests."},
    ]


def repetitive(rng: random.Random) -> list[dict[str, str]]:
    """Messages with lines of one form, to be written again."""
    facts = zip(people(rng, 20), places(rng, 20), numbers(rng, 20, 3), strict=True)
    lines = [f"{person} booked the {place} for {number} guests." for person, place, number in facts]
    text = "\n".join(2 * lines)
    return [{"role": "user", "content": f"{text}\n\nWrite these lines again, the number first."}]


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Prompts as token ids. Half of them have tools, half repeat themselves."""
    rng = random.Random(0)
    kinds = with_tools, repetitive
    texts = [
        tokenizer.apply_chat_template(kinds[i % 2](rng), add_generation_prompt=True, tokenize=False)
        for i in range(count)
    ]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def answers(llm: LLM, texts: list[list[int]], tokens: int, contender: Contender) -> list[Any]:
    """Answer prompts at temperature 0, with the likeliest tokens of each place."""
    params = SamplingParams(
        temperature=0.0, max_tokens=tokens, logprobs=2, extra_args=contender.extra_args
    )
    requests: Any = [{"prompt_token_ids": text, "cache_salt": contender.name} for text in texts]
    return [output.outputs[0] for output in llm.generate(requests, params)]


def parts_at_near_tie(one: Any, other: Any) -> bool | None:
    """Whether two answers part at a near tie of one of them; None if they are equal."""
    for mine, yours, *both in zip(
        one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False
    ):
        if mine != yours:
            return any(
                mine in probable
                and yours in probable
                and abs(probable[mine].logprob - probable[yours].logprob) <= NEAR
                for probable in both
            )
    return None if len(one.token_ids) == len(other.token_ids) else False


def chance(ours: int, theirs: int) -> float:
    """The chance of at least ``ours`` heads in ``ours + theirs`` throws of a fair coin."""
    throws = ours + theirs
    return sum(math.comb(throws, heads) for heads in range(ours, throws + 1)) / 2**throws


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loops",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=int, default=500, metavar="N", help="default: 500")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="default: 200")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1.0, 4.0], metavar="RATIO")
    parser.add_argument("--model", help="a local folder (default: the embedded model)")
    args = parser.parse_args()
    settings: dict[str, Any] = {"max_logprobs": 2, "max_num_seqs": AT_ONCE}
    if args.model:
        settings["model"] = args.model
    rows, faults = [], 0
    with engines({"mikv", "mikv drafts"}, POOL_BYTES, **settings) as llms:
        texts = prompts(llms["mikv"].get_tokenizer(), args.prompts)
        for ratio in args.ratios:
            plain, drafted = (
                answers(llms[name], texts, args.tokens, Contender(f"{name} {ratio}", name, ratio))
                for name in ("mikv", "mikv drafts")
            )
            parted = [parts_at_near_tie(*pair) for pair in zip(plain, drafted, strict=True)]
            without, with_drafts = (
                {i for i, one in enumerate(found) if is_loop([*one.token_ids])}
                for found in (plain, drafted)
            )
            only_without, only_with = len(without - with_drafts), len(with_drafts - without)
            faults += chance(only_with, only_without) < SIGNIFICANT
            rows.append(
                {
                    "ratio": f"{ratio:g}",
                    "answers": len(texts),
                    "equal": parted.count(None),
                    "parted at a near tie": parted.count(True),
                    "parted elsewhere": parted.count(False),
                    "loops without drafts": len(without),
                    "with drafts": len(with_drafts),
                    "without drafts only": only_without,
                    "with drafts only": only_with,
                }
            )
    print(markdown_table(rows))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
