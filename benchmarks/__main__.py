"""Compare MiKV with stock vLLM on the embedded model, in one run.

Parts:
  decode       milliseconds per decode step, by context and number of sequences
  first-token  time to the first token of a prompt that is not cached
  concurrency  number of requests that run at once in a pool of the same size
  sharing      peak pages of requests that share a beginning, at ratio 1 and compressed
  quality      KL divergence to the uncompressed cache, by ratio
  conversation quality of a turn that goes on from the blocks of earlier turns
  speculation  tokens and milliseconds of a step with and without drafts

The parts decode and first-token keep three engines alive at the same time and measure them in turn.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

from benchmarks import concurrency, decode, first_token, report, sharing
from benchmarks.engines import BLOCK_SIZE, MAX_MODEL_LEN, engines
from benchmarks.pool import GIB, pool_bytes
from mikv_vllm.server.memory import available_bytes

PARTS = (
    "decode",
    "first-token",
    "concurrency",
    "sharing",
    "quality",
    "conversation",
    "speculation",
)
EXTRA_ROUNDS = 2
"""Rounds of the first-token part in addition to ``--rounds``."""
ENGINES = ("stock", "stock fp8", "mikv")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help=f"{', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        default=[512, 2048, 8000],
        metavar="N",
        help=f"tokens per sequence in the decode part, at most {MAX_MODEL_LEN} "
        "(default: 512 2048 8000)",
    )
    parser.add_argument(
        "--sequences",
        nargs="+",
        type=int,
        default=[1, 4, 16],
        metavar="N",
        help="sequences per batch in the decode part (default: 1 4 16)",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of each measurement (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="decode steps per run (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt",
        type=int,
        default=4096,
        help="tokens of the prompt in the first-token part (default: %(default)s)",
    )
    parser.add_argument(
        "--pool-gib",
        type=float,
        metavar="GIB",
        help="page pool of each of the three engines (default: from --contexts, --sequences and "
        "the available memory)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=BLOCK_SIZE,
        help="tokens per page, in all engines (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help="folder for the results, as JSON and PNG (default: %(default)s)",
    )
    return parser


def most_tokens(args: argparse.Namespace) -> int:
    """Return the tokens that a pool has to hold: the largest batch, and vLLM's longest request.

    Raises:
        ValueError: a context or the prompt is too long or too short.
    """
    limits = {
        "--contexts": (args.contexts, args.steps + decode.MARGIN_TOKENS + 1, MAX_MODEL_LEN),
        "--prompt": ([args.prompt], 1, MAX_MODEL_LEN - 1),
    }
    for flag, (lengths, least, most) in limits.items():
        for length in lengths:
            if not least <= length <= most:
                raise ValueError(f"{flag}: {length} tokens is not between {least} and {most}")
    largest = max(args.contexts) * max(args.sequences) if "decode" in args.parts else 0
    # One page more, because vLLM reserves the null page.
    return max(largest, MAX_MODEL_LEN) + args.block_size


def main() -> None:
    command = parser()
    args = command.parse_args()
    result: dict = {"date": date.today().isoformat(), "machine": machine()}
    if {"decode", "first-token"} & set(args.parts):
        try:
            tokens = most_tokens(args)
            pool = pool_bytes(tokens, len(ENGINES), available_bytes(), args.pool_gib)
        except ValueError as error:
            command.error(str(error))
        print(f"pool of each engine: {pool / GIB:.2f} GiB", flush=True)
        with engines(set(ENGINES), pool, block_size=args.block_size) as llms:
            if "first-token" in args.parts:
                rounds = args.rounds + EXTRA_ROUNDS
                result["first_token"] = first_token.measure(llms, args.prompt, rounds)
            if "decode" in args.parts:
                result["decode"] = decode.measure(
                    llms, args.contexts, args.sequences, args.rounds, args.steps
                )
    if "concurrency" in args.parts:
        result["concurrency"] = concurrency.measure()
    if "sharing" in args.parts:
        result["sharing"] = sharing.measure()
    if "quality" in args.parts:
        from benchmarks import quality

        result["quality"] = quality.measure()
    if "conversation" in args.parts:
        from benchmarks import conversation

        result["conversation"] = conversation.measure()
    if "speculation" in args.parts:
        from benchmarks import speculation

        result["speculation"] = speculation.measure()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    charts = report.plot(result, path.with_suffix(".png"))
    print(report.tables(result))
    print(f"written: {', '.join(map(str, [path, *charts]))}")


def machine() -> str:
    """Return the name of the processor and the number of its cores."""
    import os

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
