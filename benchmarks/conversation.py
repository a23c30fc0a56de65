"""Quality of the fourth turn of a conversation that goes on from blocks of the earlier turns."""

import random
from typing import Any

from benchmarks.engines import engines
from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun
from mikv_vllm.evaluation.tasks import passkey
from mikv_vllm.evaluation.windows import Window, cut_windows, topics_text

RATIOS = (3.0, 4.0, 5.0)
TURNS = (768, 1024, 1280)
"""Tokens of the prompts of the first three turns."""
PROMPT = 1536
"""Tokens of the prompt of the fourth turn."""
CONTINUATION = 128
WINDOWS = 8
KEYS = 40
"""Conversations with a pass key."""


def measure() -> list[dict]:
    """Compare a fourth turn that finds blocks with a prompt that is compressed at once.

    The text of each conversation is a part of the Python reference, which is divergence to the
    uncompressed cache, and filler with a pass key in the first turn, which the fourth one asks for.

    Returns:
        A row for each ratio.
    """
    rows = []
    settings = {"dtype": "float16", "logits_processors": [ForcedDecoding], "max_num_seqs": 16}
    with engines({"mikv"}, 1 << 30, **settings) as llms:
        llm = llms["mikv"]
        tokenizer = llm.get_tokenizer()
        text = QualityRun(llm, cut_windows(tokenizer, WINDOWS, PROMPT, CONTINUATION))
        keys = QualityRun(llm, pass_keys(tokenizer))
        for ratio in (1.0, *RATIOS):
            found = keys.measure_windows(ratio, TURNS)
            row = {
                "ratio": ratio,
                "pass_keys": f"{sum(one.exact for one in found):g} of {len(found)}",
            }
            if ratio > 1:
                fresh, fourth = text.measure(ratio), text.measure(ratio, TURNS)
                row |= {
                    "divergence": round(fresh.divergence, 5),
                    "fourth_turn": round(fourth.divergence, 5),
                    "of_fresh": round(fourth.divergence / fresh.divergence, 2),
                }
            rows.append(row)
            print(row, flush=True)
        text.close()
        keys.close()
    return rows


def pass_keys(tokenizer: Any) -> list[Window]:
    """Conversations with a pass key in the first turn, which the last question asks for."""
    rng, tokens = random.Random(0), tokenizer(topics_text()).input_ids
    # The key ends before the first turn does.
    depth = 0.9 * TURNS[0] / PROMPT
    starts = range(0, KEYS * PROMPT, PROMPT)
    fillers = [tokens[start : start + PROMPT] for start in starts]
    return [passkey(tokenizer, rng, filler, PROMPT, depth) for filler in fillers]
