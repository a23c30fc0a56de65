"""KL divergence and agreement of compressed requests to uncompressed ones."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, RequestOutput

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.forced_decoding import COLUMNS, Forced
from mikv_vllm.evaluation.windows import Window


def generate_together(llm: LLM, prompts: list, params: Any) -> list[RequestOutput]:
    """The outputs of requests that all wait when the engine begins.

    Prompts then share steps in the same way in every run, and rounding does not differ.
    """
    llm.sleep(level=0)
    llm.enqueue(prompts, params, use_tqdm=False)
    llm.wake_up(tags=["scheduling"])
    return llm.wait_for_completion(use_tqdm=False)


@dataclass(frozen=True)
class Quality:
    """What one ratio does, over all windows."""

    ratio: float
    achieved_ratio: float
    divergence: float
    """Mean KL divergence to the uncompressed next-token distribution, nats."""
    divergence_error: float
    """Standard error of that mean, over windows."""
    agreement: float
    """Share of tokens whose likeliest token is the same."""
    low_format: str | None


@dataclass(frozen=True)
class WindowQuality:
    """What one ratio does on one window: means over its tokens."""

    ratio: float
    """Achieved; 1.0 where the engine reports none."""
    divergence: float
    agreement: float
    log_loss: float
    """Negative log-probability of the forced tokens, nats."""
    accuracy: float
    """Share of them that are the likeliest."""
    exact: float
    """1 if all are."""
    low_format: str | None


class QualityRun:
    """Reference run of some windows, against which ratios are measured.

    Args:
        llm: an engine with ``logits_processors=[ForcedDecoding]``.
        windows: prompts and continuations; all run in one batch.
        ratio: of the reference.
    """

    def __init__(self, llm: LLM, windows: list[Window], ratio: float = 1.0) -> None:
        self._llm = llm
        self._windows = windows
        self._folder = tempfile.TemporaryDirectory(prefix="mikv-quality-")
        self._generate(ratio, None)

    def use(self, llm: LLM) -> None:
        """Measure another engine from now on, against the same reference."""
        self._llm = llm

    def _path(self, name: str, window: int) -> str:
        return str(Path(self._folder.name) / f"{name}-{window}")

    def _generate(self, ratio: float, measured: str | None) -> list[dict]:
        forced = [
            Forced(
                window.continuation,
                self._path("reference", i),
                None if measured is None else self._path(measured, i),
            )
            for i, window in enumerate(self._windows)
        ]
        outputs = generate_together(
            self._llm,
            [{"prompt_token_ids": window.prompt} for window in self._windows],
            [one.sampling_params(**{RATIO_FIELD: ratio}) for one in forced],
        )
        return [(output.kv_transfer_params or {}).get(REPORT_FIELD, {}) for output in outputs]

    def measure_windows(self, ratio: float) -> list[WindowQuality]:
        """Run all windows at ``ratio`` and compare."""
        name = "measured"
        reports = self._generate(ratio, name)
        found = []
        for i, report in enumerate(reports):
            path = Path(self._path(name, i))
            divergence, same, log_prob, right = np.fromfile(path).reshape(-1, COLUMNS).T
            path.unlink()
            found.append(
                WindowQuality(
                    ratio=float(report.get("achieved_ratio", 1.0)),
                    divergence=float(divergence.mean()),
                    agreement=float(same.mean()),
                    log_loss=-float(log_prob.mean()),
                    accuracy=float(right.mean()),
                    exact=float(right.min()),
                    low_format=report.get("low_format"),
                )
            )
        return found

    def measure(self, ratio: float) -> Quality:
        """Means over all windows at ``ratio``."""
        found = self.measure_windows(ratio)
        divergences = np.array([window.divergence for window in found])
        return Quality(
            ratio=ratio,
            achieved_ratio=float(np.mean([window.ratio for window in found])),
            divergence=float(divergences.mean()),
            divergence_error=float(divergences.std(ddof=1) / len(found) ** 0.5),
            agreement=float(np.mean([window.agreement for window in found])),
            low_format=found[0].low_format,
        )

    def close(self) -> None:
        """Delete the stored log-probabilities."""
        self._folder.cleanup()
