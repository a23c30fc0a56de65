"""Decode: milliseconds per step and tokens per second, by context and number of sequences."""

from statistics import median

from vllm import LLM

from benchmarks.engines import RATIOS, STOCK, STOCK_FP8, Contender, step_times
from benchmarks.prompts import distinct_prompts

CONTENDERS = (STOCK, STOCK_FP8, *RATIOS)
MARGIN_TOKENS = 8
"""A sequence is this many tokens shorter than the context after its last step."""
WARM_UP_STEPS = 4
"""First steps of a run, which are not timed: the last requests are compressed in them."""


def measure(
    llms: dict[str, LLM],
    contexts: list[int],
    batches: list[int],
    rounds: int,
    steps: int,
    contenders: tuple[Contender, ...] = CONTENDERS,
) -> list[dict]:
    """Time the decode steps of all contenders, which take turns in each round.

    Prompts are in the prefix cache after their first use, so a round is almost only decode.

    Args:
        llms: engines by name.
        contexts: tokens per sequence, the decoded ones included.
        batches: numbers of sequences.
        rounds: runs of each contender per context and batch.
        steps: decode steps per run.
        contenders: columns of the table.

    Returns:
        A row for each context, batch and contender, with the median step over all rounds.
    """
    tokenizer = next(iter(llms.values())).get_tokenizer()
    rows = []
    for context in contexts:
        for batch in batches:
            prompts = distinct_prompts(tokenizer, batch, context - steps - MARGIN_TOKENS)
            times: dict[str, list[float]] = {c.name: [] for c in contenders}
            achieved: dict[str, float] = {}
            for name in {c.engine for c in contenders}:
                step_times(llms[name], prompts, 1, None)
            for number in range(rounds):
                print(f"decode {context} tokens x {batch}, round {number + 1}", flush=True)
                for contender in contenders:
                    _, found, reports = step_times(
                        llms[contender.engine], prompts, steps, contender.extra_args
                    )
                    times[contender.name] += found[WARM_UP_STEPS:]
                    if reports[0]:
                        achieved[contender.name] = reports[0]["achieved_ratio"]
            stock = median(times[STOCK.name])
            for contender in contenders:
                step = median(times[contender.name])
                rows.append(
                    {
                        "context": context,
                        "sequences": batch,
                        "contender": contender.name,
                        "ms_per_step": round(1e3 * step, 2),
                        "tokens_per_s": round(batch / step, 1),
                        "of_stock": round(step / stock, 3),
                        "achieved_ratio": achieved.get(contender.name),
                    }
                )
                print(
                    "  {contender:>10}: {ms_per_step:8.1f} ms, {of_stock:.2f}x".format(**rows[-1])
                )
    return rows
