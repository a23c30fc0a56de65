"""Test the Triton kernels on this GPU, then compare their speed with bf16 and int4 attention.

python -m benchmarks.gpu                       # everything
python -m benchmarks.gpu --contexts 32768 --batches 8 --ratios 4 --skip-tests
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import torch
import triton

from benchmarks.gpu import cases, xformers_int4
from benchmarks.gpu.cases import DEVICE, MODELS, TOGETHER, Heads, decode_rows, prompt_rows
from benchmarks.gpu.timing import copy_bandwidth
from mikv_vllm.evaluation.tables import markdown_table

TESTS = ("test_triton_decode.py", "test_triton_compress.py", "test_triton_extend.py")
LEAST_TRITON = (3, 6)
"""Older versions are not tested."""
CONTEXTS = [4096, 32768, 131072]
WORKERS = min(12, os.cpu_count() or 1)
"""Processes that compile. Each one takes half a gigabyte of GPU memory."""


def check_kernels() -> None:
    """Run the tests of the kernels on this device."""
    tests = [f"tests/kernels/{name}" for name in TESTS]
    # Most of the time is spent in Triton's compiler, which uses one core.
    spread = ["-n", str(WORKERS)] if importlib.util.find_spec("xdist") else []
    subprocess.run([sys.executable, "-m", "pytest", "-q", *spread, *tests], check=True)


def compile_ahead(models: list[Heads], batches: list[int], ratios: list[float]) -> None:
    """Fill Triton's cache, using all cores.

    Low formats that only longer contexts choose are compiled later, by the measurements.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, spawn) as pool:
        runs = [
            pool.submit(cases.compile_kernels, heads, min(CONTEXTS), ratio, batches)
            for heads in models
            for ratio in ratios
        ]
        for run in runs:
            run.result()


def verdicts(decode: list[dict], prompts: list[dict]) -> list[dict]:
    """Compare the measurements with the goals of the project, for each model."""
    rows = []

    def add(model: str, what: str, measured: float | None, wanted: float) -> None:
        if measured is not None:
            row = {"model": model, "what": what, "measured": round(measured, 3)}
            rows.append({**row, "wanted": wanted})

    for model in dict.fromkeys(row["model"] for row in decode):
        found = {
            (row["context"], row["ratio"]): row
            for row in decode
            if (row["model"], row["batch"]) == (model, 8) and row["contender"].startswith("ours")
        }

        def value(context: int, ratio: float, name: str, found: dict = found) -> float | None:
            row = found.get((context, ratio))
            return None if row is None else float(str(row[name]).rstrip("%"))

        for ratio, wanted in ((4, 2.5), (2, 1.6)):
            speed = value(32768, ratio, "speed-up")
            add(model, f"speed-up, ratio {ratio}, 32k x 8", speed, wanted)
        share = value(32768, 4, "of copy")
        add(model, "% of a copy, ratio 4, 32k x 8", share, 60)
        for ratio in (4, 2):
            short, long = (value(context, ratio, "speed-up") for context in (4096, 131072))
            if short and long:
                add(model, f"speed-up at 128k / at 4k, ratio {ratio}", long / short, 1)
        for row in prompts:
            if (row["model"], row["operation"]) == (model, TOGETHER):
                share = float(row["of prefill attention"].rstrip("%"))
                add(
                    model, f"{TOGETHER}, % of prefill attention at {row['context']}, most", share, 5
                )
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Plot the speed-up over bf16 against the context, one panel per model and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    columns = max(sum(model == other for other, _ in panels) for model, _ in panels)
    count = -(-len(panels) // columns)
    figure, axes = plt.subplots(count, columns, figsize=(4 * columns, 3.5 * count), squeeze=False)
    for axis, (model, batch) in zip(axes.flat, panels, strict=False):
        mine = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
        for name in dict.fromkeys((row["contender"], row["ratio"]) for row in mine):
            points = [
                (row["context"], row["speed-up"])
                for row in mine
                if (row["contender"], row["ratio"]) == name
            ]
            label = f"{name[0]}, ratio {name[1]:g}"
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set(title=f"{model}, batch {batch}", xlabel="context, tokens", ylabel="speed-up")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def chosen(names: list[str]) -> list[Heads]:
    return [heads for heads in MODELS if heads.model in names]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [heads.model for heads in MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--ratios", nargs="+", type=float, default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--skip-tests", action="store_true", help="do not run the tests of the kernels"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "python -m benchmarks.gpu needs a CUDA device, but torch finds none; "
            "run `python -m benchmarks.gpu.compile`, which needs no device",
            file=sys.stderr,
        )
        return 1
    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        wanted = ".".join(map(str, LEAST_TRITON))
        print(
            f"Triton is {triton.__version__}, but must be {wanted} or newer",
            file=sys.stderr,
        )
        return 1
    if not args.skip_tests:
        check_kernels()
    compile_ahead(chosen(args.models), args.batches, args.ratios)
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    memory = torch.cuda.get_device_properties(0).total_memory
    print(f"{device}: a copy reads and writes {bandwidth / 1e9:.0f} GB/s", flush=True)
    if obstacle := xformers_int4.obstacle(DEVICE):
        print(obstacle, flush=True)
    limits = (bandwidth, memory, obstacle is None)
    decode, prompts = [], []
    for heads in chosen(args.models):
        for context in args.contexts:
            for row in decode_rows(heads, context, args.batches, args.ratios, *limits):
                decode.append(row)
                print(f"  {row}", flush=True)
        prompts += [row for context in args.contexts for row in prompt_rows(heads, context, 4.0)]
    result = {
        "date": date.today().isoformat(),
        "device": device,
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "copy_gb_per_s": round(bandwidth / 1e9),
        "left_out": obstacle,
        "decode": decode,
        "prompt": prompts,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"gpu-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}\n")
    for rows in (decode, prompts, verdicts(decode, prompts)):
        if rows:
            print(f"{markdown_table(rows)}\n")
    plot(decode, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
