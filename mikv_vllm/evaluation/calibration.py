"""Find the ladder of a model: the low formats with the least divergence for their bytes."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from mikv_vllm.evaluation.methods import CacheMethod, HeadCache, Stored
from mikv_vllm.evaluation.methods.mikv import MiKV, store_tiers
from mikv_vllm.evaluation.reference_model import Prefill, ReferenceModel, divergence
from mikv_vllm.evaluation.windows import Window
from mikv_vllm.tiers.calibrations import ModelShape
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import largest_ratio

KEY_BITS = (
    *((6, 6, 5, 5), (6, 5, 5, 4), (6, 5, 4, 4), (6, 4, 4, 3), (6, 4, 3, 3), (5, 4, 3, 2)),
    *((5, 3, 3, 2), (5, 3, 2, 2), (4, 3, 2, 2), (4, 2, 2, 2), (4, 2, 2, 1), (3, 2, 2, 2)),
    *((3, 2, 2, 1), (3, 2, 1, 1), (2, 2, 1, 1)),
)
"""Bits of the quarters of a key that are measured, ranked by cost."""
VALUE_BITS = (5, 4, 3, 2)
"""Bits of a value that are measured."""
HIGH_SHARE = 0.05
"""Share of tokens in the high tier during the measurement."""
LEAST_STEP = 1.07
"""Least factor between the bytes of a format and of the next one of the ladder."""
NEAR = 1.25
"""Largest factor between the divergence of a format and of a mixture of two others with the same
bytes. In practice such a mixture is made of more high tokens, which is slightly worse."""
RATIOS = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
"""Requested ratios whose divergence is measured, as far as the ladder reaches them."""
MOST_DIVERGENCE = 0.05
"""Largest divergence of a format of the ladder, in nats."""


@dataclass(frozen=True)
class OneFormat(CacheMethod):
    """Keep a fixed share of the tokens in the high tier and the others in one low format.

    Bytes include all metadata, but they are not rounded up to whole pages.

    Args:
        low_format (LowFormat): format of the low tier.
        keys (bool, default True): store the keys in the tiers; otherwise they stay unchanged.
        values (bool, default True): the same for the values.
        recent (int, default 16): newest tokens, which stay in the high tier.
    """

    low_format: LowFormat
    keys: bool = True
    values: bool = True
    recent: int = 16
    family = "MiKV for vLLM, one format"

    @property
    def setting(self) -> str:
        return self.low_format.name

    def store(self, cache: HeadCache) -> Stored:
        geometry = TierGeometry(cache.head_dim, LOW_RECORD_TOKENS)
        num_high = max(self.recent, round(HIGH_SHARE * cache.num_tokens))
        num_high += (cache.num_tokens - num_high) % LOW_RECORD_TOKENS
        keys, values, order = store_tiers(cache, num_high, self.recent, self.low_format)
        return Stored(
            keys if self.keys else cache.keys[order],
            values if self.values else cache.values[order],
            num_high * geometry.high.num_bytes / HIGH_RECORD_TOKENS
            + (cache.num_tokens - num_high) * _token_bytes(self.low_format, cache.head_dim),
        )


@dataclass(frozen=True)
class Point:
    """A low format of the ladder, as it was measured."""

    name: str
    ratio: float
    """Compression ratio."""
    divergence: float
    """Mean KL divergence to the uncompressed cache, nats."""


@dataclass(frozen=True)
class RatioPoint:
    """A requested ratio, as it was measured."""

    ratio: float
    achieved: float
    """Compression ratio; whole pages are counted."""
    divergence: float
    """Mean KL divergence to the uncompressed cache, nats."""


def _token_bytes(low_format: LowFormat, head_dim: int) -> float:
    return TierGeometry(head_dim, LOW_RECORD_TOKENS).low(low_format).num_bytes / LOW_RECORD_TOKENS


def frontier(
    head_dim: int, of_keys: dict[tuple[int, ...], float], of_values: dict[int, float]
) -> list[LowFormat]:
    """Return the ladder, richest first: formats near the lower hull of log divergence over bytes.

    The divergence of a format is estimated as the sum of those of its keys and of its values, which
    is accurate for small divergences.

    Args:
        head_dim: channels of a head, which determine the bytes of a format.
        of_keys: divergence if only the keys are stored, by their bits.
        of_values: divergence if only the values are stored, by their bits.
    """
    points: list[tuple[float, float, LowFormat]] = []
    for keys, values in product(of_keys, of_values):
        low_format = LowFormat(keys, values)  # type: ignore[arg-type]
        both = of_keys[keys] + of_values[values]
        if both <= MOST_DIVERGENCE:
            points.append((_token_bytes(low_format, head_dim), math.log(both), low_format))
    # Each format has a smaller divergence than all formats with fewer bytes.
    falling: list[tuple[float, float, LowFormat]] = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not falling or point[1] < falling[-1][1]:
            falling.append(point)
    ladder: list[tuple[float, float, LowFormat]] = []
    for point in falling:
        if ladder and point[0] < LEAST_STEP * ladder[-1][0]:
            continue
        if point[1] <= math.log(NEAR) + _hull(falling, point[0]):
            ladder.append(point)
    return [low_format for _, _, low_format in reversed(ladder)]


def _hull(points: list[tuple[float, float, LowFormat]], size: float) -> float:
    """Return the lowest value at ``size`` of the straight lines between two of ``points``."""
    lowest = min(y for x, y, _ in points if x == size)
    for left, low, _ in points:
        for right, high, _ in points:
            if left < size < right:
                lowest = min(lowest, low + (high - low) * (size - left) / (right - left))
    return lowest


class Calibration:
    """Measurement of key bits and value bits. The constructor runs it.

    Args:
        model: the model.
        windows: prompts and continuations.
        progress: wraps the iteration over the windows, for example in a progress bar.
    """

    def __init__(
        self,
        model: ReferenceModel,
        windows: list[Window],
        progress: Callable[[list[Window]], Iterable[Window]],
    ) -> None:
        self._model = model
        self._of_keys: dict[tuple[int, ...], list[float]] = {bits: [] for bits in KEY_BITS}
        self._of_values: dict[int, list[float]] = {bits: [] for bits in VALUE_BITS}
        self._runs = []
        for window in progress(windows):
            prefill = model.prefill(window.prompt, attention=False)
            reference = model.continue_with(prefill, window.inputs, None).log_probs
            run = (prefill, window.inputs, reference)
            self._runs.append(run)
            for bits, found in self._of_keys.items():
                low_format = LowFormat(bits, VALUE_BITS[0])  # type: ignore[arg-type]
                found.append(self._measure(OneFormat(low_format, values=False), *run)[0])
            for value_bits, found in self._of_values.items():
                low_format = LowFormat(KEY_BITS[0], value_bits)
                found.append(self._measure(OneFormat(low_format, keys=False), *run)[0])

    def ladder(self) -> list[Point]:
        """Return the ladder, richest first, with each of its formats measured as a whole."""
        ladder = frontier(
            self._runs[0][0].layers[0][0].head_dim,
            {bits: fmean(found) for bits, found in self._of_keys.items()},
            {bits: fmean(found) for bits, found in self._of_values.items()},
        )
        points = []
        for low_format in ladder:
            measured = [self._measure(OneFormat(low_format), *run) for run in self._runs]
            mean, ratio = (fmean(numbers) for numbers in zip(*measured, strict=True))
            points.append(Point(low_format.name, ratio, mean))
        return points

    def _measure(
        self, method: CacheMethod, prefill: Prefill, tokens: list[int], reference: torch.Tensor
    ) -> tuple[float, float]:
        """Return the divergence and the ratio of a method on one window."""
        run = self._model.continue_with(prefill, tokens, method)
        return divergence(reference, run.log_probs), run.ratio

    def by_ratio(self, ladder: tuple[LowFormat, ...]) -> list[RatioPoint]:
        """Measure prompts that are compressed as a server does it.

        Args:
            ladder: low formats, richest first.
        """
        largest = largest_ratio(self._runs[0][0].layers[0][0].head_dim, ladder=ladder)
        points = []
        for ratio in (one for one in RATIOS if one <= largest):
            method = MiKV(ratio, ladder=ladder)
            measured = [self._measure(method, *run) for run in self._runs]
            mean, achieved = (fmean(numbers) for numbers in zip(*measured, strict=True))
            points.append(RatioPoint(ratio, achieved, mean))
        return points


def write(
    points: list[Point],
    by_ratio: list[RatioPoint],
    model: str,
    shape: ModelShape | None,
    path: Path,
) -> None:
    """Write a ladder and its measurements as JSON, for ``--kv-low-formats``.

    Args:
        points: the ladder, richest first.
        by_ratio: what was measured at some ratios.
        model: name of the model.
        shape: sizes of the model.
        path: file to write.
    """
    data = {
        "model": model,
        "shape": shape and vars(shape),
        "low_formats": [point.name for point in points],
        "measured": [vars(point) for point in points],
        "by_ratio": [vars(point) for point in by_ratio],
    }
    path.write_text(json.dumps(data, indent=2) + "\n")
