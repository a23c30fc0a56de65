"""Quality of engines, measured by forced decoding against their own uncompressed run."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from vllm import LLM as StockLLM

from mikv_vllm.evaluation.forced_decoding import ForcedDecoding
from mikv_vllm.evaluation.quality import QualityRun, WindowQuality
from mikv_vllm.evaluation.windows import Window
from mikv_vllm.server.llm import LLM

OURS_SERVED = "MiKV for vLLM, served"
FP8 = "stock vLLM, fp8"
STEP_TOKENS = 2048
"""Least token budget of a step (``max_num_batched_tokens``)."""
Name = tuple[str, str]
"""Family and setting, as in :class:`~mikv_vllm.evaluation.lab.Measurement`."""


class Served:
    """MiKV at some ratios, and stock vLLM with its fp8 cache.

    Args:
        model: folder or name of the model.
        ratios: requested compression ratios.
        block_size: tokens per page.
        dtype: dtype of the engines. In float16 there is less rounding that hides the effect of the
            tiers than in bfloat16.
    """

    def __init__(self, model: str | Path, ratios: list[float], block_size: int, dtype: str) -> None:
        self._model, self._block_size, self._dtype = str(model), block_size, dtype
        self._ratios = {(OURS_SERVED, f"ratio {ratio:g}, {dtype}"): ratio for ratio in ratios}
        self._fp8 = (FP8, dtype)

    @property
    def settings(self) -> list[Name]:
        """All settings that :meth:`measure` accepts."""
        return [*self._ratios, self._fp8]

    def measure(
        self, windows: list[Window], names: list[Name]
    ) -> Iterator[tuple[Name, list[WindowQuality]]]:
        """Measure settings, one engine after the other.

        Args:
            windows: prompts and continuations.
            names: settings to measure.

        Yields:
            Each setting with a result for each window.
        """
        longest = max(len(window.prompts[-1]) + len(window.continuation) for window in windows)
        with self._engine(LLM, longest) as llm:
            pages = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
            run = QualityRun(llm, windows)
            for name in names:
                if name in self._ratios:
                    yield name, run.measure_windows(self._ratios[name])
        if self._fp8 in names:
            with self._engine(StockLLM, longest, kv_cache_dtype="fp8") as llm:
                # The number of pages in a pool of the same bytes shows the bytes of a token.
                more = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks / pages
                run.use(llm)
                found = run.measure_windows(1.0)
                yield self._fp8, [replace(window, ratio=more) for window in found]
        run.close()

    @contextmanager
    def _engine(self, kind: type, longest: int, **settings: str) -> Iterator[StockLLM]:
        """Start an engine for requests of ``longest`` tokens, and stop it after the block."""
        llm = kind(
            model=self._model,
            dtype=self._dtype,
            block_size=self._block_size,
            max_model_len=longest + self._block_size,
            max_num_batched_tokens=max(STEP_TOKENS, longest),
            kv_cache_memory_bytes=1 << 30,
            enforce_eager=True,
            logits_processors=[ForcedDecoding],
            **settings,
        )
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
