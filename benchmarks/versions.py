"""Compare the decode steps of this version of MiKV with those of another one.

Install the other version into a folder of its own, for example the commit 8a83eb8:

  git worktree add /tmp/other 8a83eb8
  pip install --no-deps --target /tmp/other-version /tmp/other
  python -m benchmarks.versions /tmp/other-version

The versions take turns, each in a new process: other, this, this, other, and so on. Steps are also
given relative to ratio 1 of the same process, where both versions run vLLM's own kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("other", type=Path, help="folder with the other version")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[2048, 8000],
        metavar="N",
        help="tokens per sequence after the last step, at most 8192 (default: 2048 8000)",
    )
    parser.add_argument("--sequences", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="default: 60")
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="processes per version (default: 3)"
    )
    return parser


def run(other: Path | None, arguments: argparse.Namespace) -> dict[tuple[int, float], float]:
    """Time the steps in a new process.

    Args:
        other: folder with the version to run; None for this one.
        arguments: of the command line.

    Returns:
        Seconds per step by context and ratio.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "VLLM_CPU_OMP_THREADS_BIND": str(max(os.sched_getaffinity(0))),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    command = [sys.executable]
    if other is not None:
        # Without `site`, the finder of an editable install does not hide the other version.
        command.append("-S")
        folders = str(other), sysconfig.get_path("purelib"), str(ROOT)
        environment["PYTHONPATH"] = os.pathsep.join(folders)
    command += ["-m", "benchmarks.steps", *map(str, arguments.contexts)]
    command += ["--sequences", str(arguments.sequences), "--steps", str(arguments.steps)]
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd="/"
    )
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {(row["context"], row["ratio"]): row["seconds"] for row in rows}


def main() -> None:
    arguments = parser().parse_args()
    other = arguments.other.resolve()
    if not (other / "mikv_vllm").is_dir():
        sys.exit(f"{other} has no folder mikv_vllm: install a version of MiKV into it")
    found: dict[str, list[dict]] = defaultdict(list)
    for number in range(arguments.rounds):
        turn = [("other", other), ("this", None)]
        for name, folder in turn if number % 2 == 0 else reversed(turn):
            print(f"round {number + 1}: {name} version …", flush=True)
            found[name].append(run(folder, arguments))
    print("| context | ratio | other, ms | this, ms | this / other | relative to ratio 1 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for key in found["this"][0]:
        context, ratio = key
        other_ms, this_ms = (
            1e3 * median(steps[key] for steps in found[name]) for name in ("other", "this")
        )
        relative = [
            median(steps[key] / steps[context, 1.0] for steps in found[name])
            for name in ("other", "this")
        ]
        print(
            f"| {context} | {ratio:g} | {other_ms:.1f} | {this_ms:.1f} | {this_ms / other_ms:.3f} "
            f"| {relative[1] / relative[0]:.3f} |"
        )


if __name__ == "__main__":
    main()
