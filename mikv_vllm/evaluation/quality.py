"""Quality of the engine: compressed requests compared with uncompressed ones."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm import LLM, RequestOutput, SamplingParams

from mikv_vllm.config import RATIO_FIELD, REPORT_FIELD
from mikv_vllm.evaluation.forced_decoding import COLUMNS, Forced
from mikv_vllm.evaluation.windows import Window


def generate_together(llm: LLM, prompts: list, params: Any) -> list[RequestOutput]:
    """Generate after all requests are queued, and return their outputs.

    The scheduler then forms the same batches in every run, so that rounding does not differ.

    Args:
        llm: the engine; no other request is in it.
        prompts: as in ``LLM.generate``.
        params: sampling parameters of all prompts, or one for each.
    """
    llm.sleep(level=0)
    llm.enqueue(prompts, params, use_tqdm=False)
    llm.wake_up(tags=["scheduling"])
    return llm.wait_for_completion(use_tqdm=False)


@dataclass(frozen=True)
class Quality:
    """Result of one ratio: means over all windows."""

    ratio: float
    achieved_ratio: float
    divergence: float
    """Mean KL divergence to the uncompressed next-token distribution, nats."""
    divergence_error: float
    """Standard error of that mean, over windows."""
    agreement: float
    """Share of tokens with the same likeliest next token."""
    low_format: str | None


@dataclass(frozen=True)
class WindowQuality:
    """Result of one ratio on one window: means over its tokens."""

    ratio: float
    """Achieved ratio; 1.0 if the engine reports none."""
    divergence: float
    agreement: float
    log_loss: float
    """Mean negative log-probability of the forced tokens, nats."""
    accuracy: float
    """Share of forced tokens that are the likeliest ones."""
    exact: float
    """1 if all forced tokens are the likeliest ones, otherwise 0."""
    low_format: str | None


class QualityRun:
    """Measures ratios against a reference run. The constructor runs the reference.

    Args:
        llm: an engine with ``logits_processors=[ForcedDecoding]``.
        windows: prompts and continuations, which all run in one batch.
        ratio: ratio of the reference.
    """

    def __init__(self, llm: LLM, windows: list[Window], ratio: float = 1.0) -> None:
        self._llm = llm
        self._windows = windows
        self._folder = tempfile.TemporaryDirectory(prefix="mikv-quality-")
        self._generate(ratio, None)

    def use(self, llm: LLM) -> None:
        """Use another engine for the following measurements, with the same reference."""
        self._llm = llm

    def _path(self, name: str, window: int) -> str:
        return str(Path(self._folder.name) / f"{name}-{window}")

    def _generate(self, ratio: float, measured: str | None) -> list[dict]:
        """Run all windows and return their reports, empty for stock vLLM."""
        # Blocks of another ratio would serve a prompt as well.
        salt = f"ratio {ratio:g}"
        prompts = [window.prompts for window in self._windows]
        for turn in range(max(map(len, prompts)) - 1):
            earlier = [one[turn] for one in prompts if turn < len(one) - 1]
            generate_together(
                self._llm,
                [{"prompt_token_ids": one, "cache_salt": salt} for one in earlier],
                SamplingParams(max_tokens=1, extra_args={RATIO_FIELD: ratio}),
            )
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
            [{"prompt_token_ids": one[-1], "cache_salt": salt} for one in prompts],
            [one.sampling_params(**{RATIO_FIELD: ratio}) for one in forced],
        )
        return [(output.kv_transfer_params or {}).get(REPORT_FIELD, {}) for output in outputs]

    def measure_windows(self, ratio: float) -> list[WindowQuality]:
        """Run all windows at ``ratio``, turn by turn, and return a result for each."""
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
        """Run all windows at ``ratio``, turn by turn, and return their means."""
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
