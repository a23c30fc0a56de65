"""Comparison of methods on the same prompts: change of the predictions, and bytes.

Every measurement is a line of ``results.jsonl``. A run that was interrupted continues after the
last complete line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch

from mikv_vllm.evaluation.methods import CacheMethod
from mikv_vllm.evaluation.reference_model import Prefill, ReferenceModel, divergence
from mikv_vllm.evaluation.windows import Window

if TYPE_CHECKING:
    from mikv_vllm.evaluation.served import Served

UNCOMPRESSED = "uncompressed"
"""Family of the reference in reports."""
NORMAL_95 = 1.96
"""Half the width of the 95 % interval of a standard normal number."""


@dataclass(frozen=True)
class Measurement:
    """Result of one method on one window."""

    task: str
    window: int
    family: str
    setting: str
    ratio: float
    """Bytes at 16 bits divided by stored bytes, metadata included."""
    divergence: float
    """Mean KL divergence to the uncompressed model's next-token distribution, nats."""
    agreement: float
    """Share of tokens with the same likeliest next token."""
    log_loss: float
    """Mean negative log-probability of the known continuation, nats."""
    accuracy: float
    """Share of tokens of the continuation that are the likeliest ones."""
    exact: float
    """1 if all tokens of the continuation are the likeliest ones, otherwise 0."""


@dataclass(frozen=True)
class Summary:
    """Result of one method on one task: means over windows.

    Each ``..._error`` is half of the 95 % confidence interval.
    """

    task: str
    family: str
    setting: str
    windows: int
    ratio: float
    divergence: float
    divergence_error: float
    agreement: float
    agreement_error: float
    log_loss: float
    accuracy: float
    accuracy_error: float
    exact: float
    exact_error: float


def measure(
    model: ReferenceModel, task: str, windows: list[Window], methods: list[CacheMethod], out: Path
) -> Iterator[Measurement]:
    """Run methods in plain torch, and append their measurements to ``out/results.jsonl``.

    Measurements that are in the file already are skipped.

    Args:
        model: the model.
        task: name of the task, for the results.
        windows: prompts and continuations of the task.
        methods: methods to measure, in addition to the uncompressed cache.
        out: folder of the results.

    Yields:
        Each new measurement, after it is written.
    """
    path = out / "results.jsonl"
    done = {(m.task, m.window, m.family, m.setting) for m in load(out)}
    for index, window in enumerate(windows):
        todo = [m for m in methods if (task, index, m.family, m.setting) not in done]
        reference_done = (task, index, UNCOMPRESSED, "") in done
        if not todo and reference_done:
            continue
        prefill = model.prefill(window.prompt, any(method.reads_attention for method in todo))
        tokens = window.inputs
        wanted = torch.tensor(window.continuation)
        reference = model.continue_with(prefill, tokens, None).log_probs[-len(wanted) :]
        runs: list[CacheMethod | None] = [*([] if reference_done else [None]), *todo]
        with path.open("a") as results:
            for method in runs:
                found = _compare(model, prefill, tokens, wanted, reference, method)
                measurement = Measurement(
                    task,
                    index,
                    UNCOMPRESSED if method is None else method.family,
                    "" if method is None else method.setting,
                    **found,
                )
                results.write(json.dumps(asdict(measurement)) + "\n")
                results.flush()
                yield measurement


def measure_served(
    served: Served, task: str, windows: list[Window], out: Path
) -> Iterator[Measurement]:
    """Run engines, and append their measurements to ``out/results.jsonl``.

    All windows of a setting run in one batch. Settings that are in the file already are skipped.

    Args:
        served: the engines and their settings.
        task: name of the task, for the results.
        windows: prompts and continuations of the task.
        out: folder of the results.

    Yields:
        Each new measurement, after it is written.
    """
    done = {(m.task, m.window, m.family, m.setting) for m in load(out)}
    last = len(windows) - 1
    todo = [name for name in served.settings if (task, last, *name) not in done]
    if not todo:
        return
    for (family, setting), found in served.measure(windows, todo):
        measurements = []
        for i, one in enumerate(found):
            numbers = asdict(one)
            del numbers["low_format"]
            measurements.append(Measurement(task, i, family, setting, **numbers))
        with (out / "results.jsonl").open("a") as results:
            results.writelines(json.dumps(asdict(one)) + "\n" for one in measurements)
        yield from measurements


def _compare(
    model: ReferenceModel,
    prefill: Prefill,
    tokens: list[int],
    wanted: torch.Tensor,
    reference: torch.Tensor,
    method: CacheMethod | None,
) -> dict[str, float]:
    """Return the numbers of a :class:`Measurement` of a method, or of the untouched cache."""
    run = model.continue_with(prefill, tokens, method)
    log_probs = run.log_probs[-len(wanted) :]
    mine, theirs = log_probs.double(), reference.double()
    likeliest = mine.argmax(-1)
    right = (likeliest == wanted).double()
    return {
        "ratio": run.ratio,
        "divergence": divergence(reference, log_probs),
        "agreement": (likeliest == theirs.argmax(-1)).double().mean().item(),
        "log_loss": -mine.gather(1, wanted[:, None]).mean().item(),
        "accuracy": right.mean().item(),
        "exact": right.min().item(),
    }


def load(out: Path) -> list[Measurement]:
    """Return all measurements of a folder.

    An incomplete last line, which an interrupted run leaves, is removed from the file.
    """
    path = out / "results.jsonl"
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [Measurement(**json.loads(line)) for line in whole.splitlines()]


def summarize(measurements: list[Measurement]) -> list[Summary]:
    """Return means by task and method, in the order of their first measurement."""
    grouped: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measurements:
        grouped.setdefault((one.task, one.family, one.setting), []).append(one)

    def mean(rows: list[Measurement], name: str) -> float:
        return fmean(getattr(row, name) for row in rows)

    def error(rows: list[Measurement], name: str) -> float:
        if len(rows) == 1:
            return float("nan")
        return NORMAL_95 * stdev(getattr(row, name) for row in rows) / len(rows) ** 0.5

    return [
        Summary(
            *key,
            windows=len(rows),
            ratio=mean(rows, "ratio"),
            divergence=mean(rows, "divergence"),
            divergence_error=error(rows, "divergence"),
            agreement=mean(rows, "agreement"),
            agreement_error=error(rows, "agreement"),
            log_loss=mean(rows, "log_loss"),
            accuracy=mean(rows, "accuracy"),
            accuracy_error=error(rows, "accuracy"),
            exact=mean(rows, "exact"),
            exact_error=error(rows, "exact"),
        )
        for key, rows in grouped.items()
    ]
