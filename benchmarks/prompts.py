"""Prompts of real text without common prefixes."""

from typing import Any

from mikv_vllm.evaluation.windows import topics_text


def distinct_prompts(tokenizer: Any, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Return ``count`` prompts of ``length`` token ids that all differ in their first token.

    With the same ``count`` and ``seed`` a shorter prompt is the beginning of a longer one.
    """
    tokens = tokenizer(topics_text()).input_ids
    stride = len(tokens) // count
    prompts = []
    for i in range(count):
        start = (i * stride + 7919 * seed) % len(tokens)
        rolled = tokens[start:] + tokens[:start]
        prompts.append([1000 + 37 * i + seed, *rolled][:length])
    return prompts
