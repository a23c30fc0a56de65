"""Results of the serving benchmark as Markdown tables and as one picture."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.loads import Times
from benchmarks.serving.servers import Counted
from mikv_vllm.evaluation.tables import markdown_table

PERCENTILES = (50, 95, 99)


def row(name: str, times: Times, counted: Counted) -> dict[str, Any]:
    """One contender's row in the table of a load."""
    first = np.percentile(times.first, PERCENTILES)
    between = 1000 * np.percentile(times.between, PERCENTILES)
    later: dict[str, Any] = {}
    if times.later_seconds is not None:
        later["later requests, s"] = round(times.later_seconds, 1)
    if times.later_tokens:
        later["later found"] = f"{times.later_cached_tokens / times.later_tokens:.1%}"
    return {
        "server": name,
        "seconds": round(times.seconds, 1),
        **later,
        "tokens/s": round((times.prompt_tokens + times.new_tokens) / times.seconds),
        "first token p50/p95/p99, s": " / ".join(f"{value:.2f}" for value in first),
        "between tokens p50/p95/p99, ms": " / ".join(f"{value:.0f}" for value in between),
        "found in cache": f"{counted.found:.0%}",
        "preemptions": counted.preemptions,
        "peak pages": f"{counted.peak_pages} of {counted.pages}",
    }


def tables(result: dict[str, Any]) -> str:
    """All loads of a result, one Markdown table each."""
    parts = [f"{result['date']}, {result['machine']}"]
    for load in result["loads"]:
        text = f"{load['text']}. Pool: {load['pool tokens']:,} uncompressed tokens"
        parts.append(f"## {load['title']}\n\n{text}.\n\n{markdown_table(load['rows'])}")
    return "\n\n".join(parts)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the time of each contender, one panel a load."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = result["loads"]
    figure, axes = plt.subplots(1, len(loads), figsize=(3.6 * len(loads), 3.2), squeeze=False)
    for axis, load in zip(axes[0], loads, strict=True):
        rows = load["rows"]
        colors = ["0.6" if r["server"].startswith("stock") else "C0" for r in rows]
        bars = axis.barh([r["server"] for r in rows], [r["seconds"] for r in rows], color=colors)
        axis.bar_label(bars, fmt="%.0f s", padding=2, fontsize=8)
        axis.invert_yaxis()
        axis.set(title=load["title"], xlabel="seconds, less is better")
        axis.margins(x=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
