"""KL divergence to the uncompressed cache, by ratio."""

from dataclasses import asdict

from benchmarks.engines import engines
from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun
from mikv_vllm.evaluation.windows import cut_windows

RATIOS = (1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0)
DTYPES = ("bfloat16", "float16")
"""In bfloat16 the rounding of activations hides part of the effect of the tiers."""


def measure(num_windows: int = 8, prompt: int = 1536, continuation: int = 256) -> list[dict]:
    """Measure forced decoding of the Python reference over the full vocabulary.

    The reference of each dtype is the same engine at ratio 1.

    Args:
        num_windows: number of prompts.
        prompt: tokens per prompt.
        continuation: tokens that follow the prompt and are predicted.

    Returns:
        A row for each dtype and ratio.
    """
    rows = []
    for dtype in DTYPES:
        with engines({"mikv"}, 1 << 30, dtype=dtype, logits_processors=[ForcedDecoding]) as llms:
            llm = llms["mikv"]
            windows = cut_windows(llm.get_tokenizer(), num_windows, prompt, continuation)
            run = QualityRun(llm, windows)
            for ratio in RATIOS:
                row = {"dtype": dtype, **asdict(run.measure(ratio))}
                rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
                print(rows[-1], flush=True)
            run.close()
    return rows
