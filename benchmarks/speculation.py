"""Speculative decoding: tokens and milliseconds of a step on text that repeats itself."""

from statistics import median

from benchmarks.engines import STOCK, Contender, engines, step_times
from mikv_vllm.evaluation.windows import cut_windows

CONTEXTS = (2048, 8000)
"""Tokens of a sequence after its last step."""
PASSAGE = 400
"""The prompt is one passage of this many tokens, again and again."""
NEW_TOKENS = 150
ROUNDS = 3
RATIOS = (1.0, 4.0)
DRAFTS = Contender("stock bf16, drafts", "stock drafts")
CONTENDERS = (
    STOCK,
    DRAFTS,
    *(Contender(f"ratio {ratio:g}", "mikv", ratio) for ratio in RATIOS),
    *(Contender(f"ratio {ratio:g}, drafts", "mikv drafts", ratio) for ratio in RATIOS),
)


def measure(contexts: tuple[int, ...] = CONTEXTS) -> list[dict]:
    """Decode one sequence with and without drafts; the contenders take turns in each round.

    Returns:
        A row for each context and contender: tokens of a step, and milliseconds of a token, the
        median of the rounds.
    """
    rows = []
    with engines({contender.engine for contender in CONTENDERS}, 512 << 20) as llms:
        tokenizer = llms["mikv"].get_tokenizer()
        (window,) = cut_windows(tokenizer, 1, PASSAGE, 1)
        for context in contexts:
            length = context - NEW_TOKENS
            prompt = (window.prompt * (length // PASSAGE + 1))[:length]
            found: dict[str, list[tuple[float, float]]] = {c.name: [] for c in CONTENDERS}
            for contender in CONTENDERS:
                step_times(llms[contender.engine], [prompt], 8, contender.extra_args)
            for _ in range(ROUNDS):
                for contender in CONTENDERS:
                    _, times, _ = step_times(
                        llms[contender.engine], [prompt], NEW_TOKENS, contender.extra_args
                    )
                    tokens = NEW_TOKENS - 1
                    found[contender.name].append((tokens / len(times), sum(times) / tokens))
            stock = median(time for _, time in found[STOCK.name])
            for contender in CONTENDERS:
                time = median(time for _, time in found[contender.name])
                rows.append(
                    {
                        "context": context,
                        "contender": contender.name,
                        "tokens_per_step": round(median(n for n, _ in found[contender.name]), 2),
                        "ms_per_token": round(1e3 * time, 2),
                        "of_stock": round(time / stock, 3),
                    }
                )
                print(rows[-1], flush=True)
    return rows
