"""Time to the first token of a prompt that is not in the prefix cache."""

from statistics import median

from vllm import LLM

from benchmarks.engines import RATIOS, STOCK, step_times
from benchmarks.prompts import distinct_prompts

CONTENDERS = (STOCK, *(c for c in RATIOS if c.ratio in (1.0, 4.0)))


def measure(llms: dict[str, LLM], length: int, rounds: int) -> list[dict]:
    """Measure the seconds to the first token, scoring and compression included.

    Args:
        llms: engines by name.
        length: tokens of the prompt.
        rounds: prompts per contender.

    Returns:
        A row for each contender with its median.
    """
    tokenizer = next(iter(llms.values())).get_tokenizer()
    times: dict[str, list[float]] = {c.name: [] for c in CONTENDERS}
    for number in range(rounds):
        print(f"first token of {length} tokens, round {number + 1}", flush=True)
        for i, contender in enumerate(CONTENDERS):
            seed = 1 + number * len(CONTENDERS) + i
            (prompt,) = distinct_prompts(tokenizer, 1, length, seed)
            first, _, _ = step_times(llms[contender.engine], [prompt], 1, contender.extra_args)
            times[contender.name].append(first)
    stock = median(times[STOCK.name])
    return [
        {
            "prompt": length,
            "contender": name,
            "first_token_s": round(median(found), 3),
            "of_stock": round(median(found) / stock, 3),
        }
        for name, found in times.items()
    ]
