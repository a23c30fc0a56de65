"""Results as Markdown tables and as CSV."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mikv_vllm.evaluation.served_tasks.intervals import Interval, mean_of, paired, wilson
from mikv_vllm.evaluation.served_tasks.results import Result
from mikv_vllm.evaluation.tables import markdown_table

ALL = "all tasks"
"""Name of the mean over tasks in tables."""


@dataclass(frozen=True)
class Row:
    """Results of a task, or of a kind of its questions, at one ratio."""

    task: str
    kind: str
    """Empty for all kinds together."""
    ratio: float
    questions: int
    achieved: float
    """Uncompressed bytes divided by stored bytes, of all answers together."""
    kv_bytes: float
    """Mean bytes of the cache of a request."""
    accuracy: Interval
    difference: Interval | None
    """Accuracy minus that at ratio 1, paired by question; None at ratio 1 and without it."""
    valid: Interval | None
    """Share of valid answers; None where no form is asked for."""
    reused: float
    """Share of the prompt's tokens in compressed blocks that an earlier request wrote."""


def rows(results: Sequence[Result], by_kind: bool) -> list[Row]:
    """Return the rows of all tasks or of all kinds, in the order of ``results``."""
    found: dict[tuple[str, str, float], list[Result]] = {}
    for result in results:
        kind = result.kind if by_kind else ""
        found.setdefault((result.task, kind, result.ratio), []).append(result)
    return [_row(*name, mine, results) for name, mine in found.items()]


def _row(task: str, kind: str, ratio: float, mine: list[Result], results: Sequence[Result]) -> Row:
    reference = {result.key: result.accuracy for result in results if result.ratio == 1.0}
    differences = [
        result.accuracy - reference[result.key] for result in mine if result.key in reference
    ]
    valid = [float(result.valid) for result in mine if result.valid is not None]
    stored = sum(result.report["kv_bytes"] for result in mine)
    return Row(
        task,
        kind,
        ratio,
        len(mine),
        sum(result.report["uncompressed_kv_bytes"] for result in mine) / stored,
        stored / len(mine),
        wilson([result.accuracy for result in mine]),
        paired(differences) if differences and ratio > 1.0 else None,
        wilson(valid) if valid else None,
        sum(result.report["reused_tokens"] for result in mine)
        / sum(result.prompt_tokens for result in mine),
    )


def mean_rows(of_tasks: Sequence[Row]) -> list[Row]:
    """Return the mean over tasks at each ratio."""
    found = []
    for ratio in dict.fromkeys(row.ratio for row in of_tasks):
        mine = [row for row in of_tasks if row.ratio == ratio]
        differences = [row.difference for row in mine if row.difference is not None]
        valid = [row.valid for row in mine if row.valid is not None]
        questions = sum(row.questions for row in mine)
        found.append(
            Row(
                ALL,
                "",
                ratio,
                questions,
                sum(row.achieved * row.kv_bytes * row.questions for row in mine)
                / sum(row.kv_bytes * row.questions for row in mine),
                sum(row.kv_bytes * row.questions for row in mine) / questions,
                mean_of([row.accuracy for row in mine]),
                mean_of(differences) if differences else None,
                mean_of(valid) if valid else None,
                sum(row.reused for row in mine) / len(mine),
            )
        )
    return found


def cells(row: Row, by_kind: bool) -> dict[str, str]:
    """Return a row of a Markdown table."""
    return {
        "task": row.task,
        **({"kind": row.kind} if by_kind else {}),
        "questions": str(row.questions),
        "ratio": f"{row.ratio:g}",
        "achieved": f"{row.achieved:.2f}",
        "KV cache per request, MB": f"{row.kv_bytes / 1e6:.2f}",
        "accuracy, %": _percent(row.accuracy),
        "difference from ratio 1": _percent(row.difference, sign="+"),
        "valid, %": _percent(row.valid),
        "in reused blocks, %": f"{100 * row.reused:.0f}",
    }


def _percent(interval: Interval | None, sign: str = "") -> str:
    """Return for example ``91.7 (64.6 to 98.5)``."""
    if interval is None:
        return ""
    mean, low, high = (f"{100 * number:{sign}.1f}" for number in interval)
    return f"{mean} ({low} to {high})"


def markdown(title: str, results: Sequence[Result], more: str = "") -> str:
    """Return the report.

    Args:
        title: heading and description.
        results: at least one result.
        more: further sections.
    """
    of_tasks = rows(results, by_kind=False)
    tables = [*of_tasks, *(mean_rows(of_tasks) if len({row.task for row in of_tasks}) > 1 else [])]
    parts = [title, markdown_table([cells(row, by_kind=False) for row in tables]), more]
    parts += [
        "## Kinds of questions",
        markdown_table([cells(row, by_kind=True) for row in rows(results, by_kind=True)]),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def write_csv(results: Sequence[Result], path: Path) -> None:
    """Write the rows of tasks and of kinds, in which the kind is not empty."""
    of_tasks = rows(results, by_kind=False)
    names = ("accuracy", "difference", "valid")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        plain = ["task", "kind", "ratio", "questions", "achieved", "kv_bytes", "reused"]
        writer.writerow(plain + [f"{n}{part}" for n in names for part in ("", "_low", "_high")])
        for row in [*of_tasks, *mean_rows(of_tasks), *rows(results, by_kind=True)]:
            numbers = [getattr(row, name) or ("", "", "") for name in names]
            writer.writerow([*(getattr(row, name) for name in plain), *chain(*numbers)])
