"""Decode: milliseconds a step and tokens a second, by context and batch."""

from statistics import median

from vllm import LLM

from benchmarks.engines import RATIOS, STOCK, STOCK_FP8, Contender, step_times
from benchmarks.prompts import distinct_prompts

CONTENDERS = (STOCK, STOCK_FP8, *RATIOS)


def measure(
    llms: dict[str, LLM],
    contexts: list[int],
    batches: list[int],
    rounds: int,
    steps: int,
    contenders: tuple[Contender, ...] = CONTENDERS,
) -> list[dict]:
    """Time every cell, the contenders in turn within each round.

    Prompts come from the prefix cache after their first use, so that a round is nearly all decode.
    """
    tokenizer = next(iter(llms.values())).get_tokenizer()
    rows = []
    for context in contexts:
        for batch in batches:
            prompts = distinct_prompts(tokenizer, batch, context - steps - 8)
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
                    # The first steps compress late-comers and warm caches.
                    times[contender.name] += found[4:]
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
