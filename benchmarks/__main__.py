"""Ours and stock vLLM, side by side in one run, on the embedded model."""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

from benchmarks import concurrency, decode, first_token, report
from benchmarks.engines import BLOCK_SIZE, engines

PARTS = ("decode", "first-token", "concurrency", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 8000])
    parser.add_argument("--sequences", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3, help="times that each cell is run")
    parser.add_argument("--steps", type=int, default=40, help="decode steps a run")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of the first-token part")
    parser.add_argument(
        "--pool-gib", type=float, default=4.5, help="pool of each of the three engines"
    )
    parser.add_argument(
        "--block-size", type=int, default=BLOCK_SIZE, help="tokens a page, in every engine"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()

    result: dict = {"date": date.today().isoformat(), "machine": machine()}
    pool = int(args.pool_gib * 2**30)
    if {"decode", "first-token"} & set(args.parts):
        with engines({"stock", "stock fp8", "mikv"}, pool, block_size=args.block_size) as llms:
            if "first-token" in args.parts:
                result["first_token"] = first_token.measure(llms, args.prompt, args.rounds + 2)
            if "decode" in args.parts:
                result["decode"] = decode.measure(
                    llms, args.contexts, args.sequences, args.rounds, args.steps
                )
    if "concurrency" in args.parts:
        result["concurrency"] = concurrency.measure()
    if "quality" in args.parts:
        from benchmarks import quality

        result["quality"] = quality.measure()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    report.plot(result, path.with_suffix(".png"))
    print(report.tables(result))
    print(f"written: {path}, {path.with_suffix('.png')}")


def machine() -> str:
    """The processor's name and how many of it there are."""
    import os

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
