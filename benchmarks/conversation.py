"""Quality of the fourth turn of a conversation that goes on from blocks of the earlier turns."""

from benchmarks.engines import engines
from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun
from mikv_vllm.evaluation.tasks import split_turns, windows_of
from mikv_vllm.evaluation.windows import Window

RATIOS = (3.0, 4.0, 5.0)
PROMPT = 1536
"""Tokens of the prompt of the fourth turn."""
CONTINUATION = 128
WINDOWS = 4
KEYS = 40
"""Conversations with a pass key."""
AT_ONCE = 12
"""Requests that run at once."""


def measure() -> list[dict]:
    """Compare a fourth turn that finds blocks with a prompt that is compressed at once.

    Divergence is that of a text to the uncompressed cache. Other conversations have a pass key in
    the first turn, which the fourth one asks for.

    Returns:
        A row for each ratio.
    """
    rows = []
    settings = {"dtype": "float16", "logits_processors": [ForcedDecoding], "max_num_seqs": AT_ONCE}
    with engines({"mikv"}, 2 << 30, **settings) as llms:
        llm = llms["mikv"]
        tokenizer = llm.get_tokenizer()
        whole = windows_of("text", tokenizer, WINDOWS, PROMPT, CONTINUATION)
        parts = []
        for window in whole:
            first, *later = split_turns(window.prompt)
            parts.append(Window(first, window.continuation, tuple(later)))
        fresh_run = QualityRun(llm, whole)
        fourth_run = QualityRun(llm, parts)
        keys_run = QualityRun(llm, windows_of("conversation", tokenizer, KEYS, PROMPT, 0))
        for ratio in (1.0, *RATIOS):
            row: dict = {"ratio": ratio}
            if ratio > 1:
                llm.reset_prefix_cache()
                fresh = fresh_run.measure(ratio).divergence
                llm.reset_prefix_cache()
                fourth = fourth_run.measure(ratio).divergence
                row |= {
                    "divergence": round(fresh, 5),
                    "fourth_turn": round(fourth, 5),
                    "of_fresh": round(fourth / fresh, 2),
                }
            found = [one.exact for one in keys_run.measure_windows(ratio)]
            rows.append(row | {"pass_keys": f"{sum(found):g} of {len(found)}"})
            print(rows[-1], flush=True)
        for run in (fresh_run, fourth_run, keys_run):
            run.close()
    return rows
