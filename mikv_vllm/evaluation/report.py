"""Results as CSV, charts, Markdown, and an HTML page without external files."""

import base64
import csv
import html
import io
import math
from dataclasses import asdict, fields
from pathlib import Path

from mikv_vllm.evaluation.lab import UNCOMPRESSED, Summary
from mikv_vllm.evaluation.tables import markdown_table

OURS = "MiKV for vLLM"
"""Family that the chart draws in bold."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px }
th, td { padding: .2rem .6rem; text-align: right }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left }
tr:nth-child(even) { background: #f4f4f4 } img { max-width: 100% }
"""
PANELS = {
    "text": ("divergence", "KL divergence, nats"),
    "generated": ("accuracy", "share of the answer's tokens right"),
}
"""Measured number and axis label of the chart, for the text task and for generated tasks."""


def write_csv(summaries: list[Summary], path: Path) -> None:
    """Write all summaries, one row each."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Summary)])
        writer.writeheader()
        writer.writerows(asdict(summary) for summary in summaries)


def tables(summaries: list[Summary]) -> dict[str, list[dict]]:
    """Return the rows of each task by heading, ascending by ratio."""
    found = {}
    for task in dict.fromkeys(summary.task for summary in summaries):
        rows = sorted((s for s in summaries if s.task == task), key=lambda s: s.ratio)
        found[f"{task}, {rows[0].windows} windows"] = [
            {
                "method": s.family,
                "setting": s.setting,
                "ratio": f"{s.ratio:.2f}",
                "KL divergence": f"{s.divergence:.4f} ± {s.divergence_error:.4f}",
                "top-1 agreement": f"{s.agreement:.3f} ± {s.agreement_error:.3f}",
                "perplexity": f"{math.exp(s.log_loss):.3f}",
                "accuracy": f"{s.accuracy:.3f} ± {s.accuracy_error:.3f}",
                "exact": f"{s.exact:.2f}",
            }
            for s in rows
        ]
    return found


def markdown(summaries: list[Summary]) -> str:
    """Return all tables."""
    return "\n\n".join(
        f"## {heading}\n\n{markdown_table(rows)}" for heading, rows in tables(summaries).items()
    )


def draw(summaries: list[Summary], paths: list[Path]) -> None:
    """Draw quality against ratio, one panel per task, into each of ``paths``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(summary.task for summary in summaries))
    figure, axes = plt.subplots(1, len(tasks), figsize=(6 * len(tasks), 5), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        name, label = PANELS.get(task, PANELS["generated"])
        mine = [summary for summary in summaries if summary.task == task]
        for family in dict.fromkeys(summary.family for summary in mine):
            rows = sorted((s for s in mine if s.family == family), key=lambda s: s.ratio)
            if family == UNCOMPRESSED:
                if name != "divergence":
                    axis.axhline(getattr(rows[0], name), color="gray", ls=":", label=family)
                continue
            axis.errorbar(
                [row.ratio for row in rows],
                [getattr(row, name) for row in rows],
                [getattr(row, f"{name}_error") for row in rows],
                marker="o",
                lw=3 if family == OURS else 1,
                color="black" if family == OURS else None,
                label=family,
            )
        axis.set(title=task, xlabel="compression ratio, all bytes counted", ylabel=label)
        if name == "divergence":
            axis.set_yscale("log")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    for path in paths:
        figure.savefig(path, dpi=130)
    plt.close(figure)


def write_html(summaries: list[Summary], chart: Path, title: str, path: Path) -> None:
    """Write the tables and the chart as one file."""
    image = base64.b64encode(chart.read_bytes()).decode()
    out = io.StringIO()
    out.write(f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title>")
    out.write(f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    out.write(f'<img alt="quality against ratio" src="data:image/png;base64,{image}">')
    for heading, rows in tables(summaries).items():
        out.write(f"<h2>{html.escape(heading)}</h2><table>")
        for tag, cells in [("th", list(rows[0])), *(("td", list(row.values())) for row in rows)]:
            out.write("<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>")
        out.write("</table>")
    path.write_text(out.getvalue())
