"""Time the decode steps of the MiKV version that Python finds, in this process.

:mod:`benchmarks.versions` runs this module for each version, which may be older than this file.
"""

import argparse
import json
from statistics import median

from benchmarks.decode import MARGIN_TOKENS, WARM_UP_STEPS
from benchmarks.engines import RATIOS, engines, step_times
from benchmarks.prompts import distinct_prompts

POOL_BYTES = 1400 << 20

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("contexts", type=int, nargs="+")
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    args = parser.parse_args()
    # Without the prefix cache: a request could begin with richer blocks of one at a lower ratio.
    with engines({"mikv"}, POOL_BYTES, enable_prefix_caching=False) as llms:
        tokenizer = llms["mikv"].get_tokenizer()
        for context in args.contexts:
            length = context - args.steps - MARGIN_TOKENS
            prompts = distinct_prompts(tokenizer, args.sequences, length)
            for one in RATIOS:
                _, times, _ = step_times(llms["mikv"], prompts, args.steps, one.extra_args)
                seconds = median(times[WARM_UP_STEPS:])
                row = {"context": context, "ratio": one.ratio, "seconds": seconds}
                print(json.dumps(row), flush=True)
