"""Prometheus metrics of the two tiers, exported by vLLM's ``/metrics``."""

import os
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from mikv_vllm.config import ADDITIONAL_CONFIG_KEY
from mikv_vllm.server.vllm_hooks import insert_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

GAUGES = {
    "pages": (
        "mikv_kv_cache_pages",
        "state",
        "Pages of vLLM's block pool, by content (pages). Free pages may still be in the prefix "
        "cache.",
    ),
    "tokens": ("mikv_kv_cache_tokens", "tier", "Tokens in the KV cache, by tier (tokens)."),
    "bytes": (
        "mikv_kv_cache_bytes",
        "tier",
        "Bytes of the pages of compressed requests, by content, in all layers (bytes).",
    ),
    "blocks": (
        "mikv_blocks",
        "state",
        "Tiered blocks: sealed ones and tails of running requests, and kept ones, which no request "
        "holds but the prefix cache still finds (blocks).",
    ),
    "requests": (
        "mikv_requests",
        "tier",
        "Running requests: native ones are uncompressed, tiered ones compressed (requests).",
    ),
}
"""Name, label and help text of each gauge, by section of the scheduler's statistics."""

COUNTERS = {
    "operations": (
        "mikv_operations_total",
        "kind",
        "Operations since the engine started, by kind (operations).",
    ),
    "reused_tokens": (
        "mikv_reused_tokens_total",
        "kind",
        "Tokens in tiered blocks that requests took from the prefix cache since the engine "
        "started: instead of computing them (adopt) or of compressing them (compress) (tokens).",
    ),
}
"""Name, label and help text of each counter, by section of the scheduler's statistics."""


class TierMetrics(AggregateStatLoggerBase):
    """Converts the statistics that the scheduler sends with each step into Prometheus metrics.

    They arrive in ``SchedulerStats.kv_connector_stats``. vLLM's own loggers expect the statistics
    of a KV connector there, and fail if no connector is configured. This logger must therefore run
    before them; it removes the statistics.
    """

    def __init__(self, vllm_config: "VllmConfig", engine_indexes: list[int]) -> None:
        _unregister()
        self._model = vllm_config.model_config.served_model_name
        self._gauges = {
            section: Gauge(
                name,
                text,
                labelnames=["model_name", "engine", label],
                multiprocess_mode="mostrecent",
            )
            for section, (name, label, text) in GAUGES.items()
        }
        self._counters = {section: _Total(*texts) for section, texts in COUNTERS.items()}
        self._engine_indexes = engine_indexes

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Update the metrics from one step of one engine, and remove MiKV's statistics from it."""
        if scheduler_stats is None or not scheduler_stats.kv_connector_stats:
            return
        stats = scheduler_stats.kv_connector_stats.pop(ADDITIONAL_CONFIG_KEY, None)
        scheduler_stats.kv_connector_stats = scheduler_stats.kv_connector_stats or None
        if stats is None:
            return
        engine = str(engine_idx)
        for section, gauge in self._gauges.items():
            for key, value in stats[section].items():
                if key != "total":  # the sum of the other values
                    gauge.labels(self._model, engine, key).set(value)
        for section, counter in self._counters.items():
            for kind, total in stats[section].items():
                counter.set(self._model, engine, kind, total)

    def log_engine_initialized(self) -> None:
        """Do nothing; vLLM requires the method."""


class _Total:
    """A counter whose totals are counted in the engine.

    With several API servers each process receives only some of the totals, and Prometheus'
    multiprocess mode adds counters of all processes. There the metric is a gauge with the latest
    total instead.
    """

    def __init__(self, name: str, label: str, text: str) -> None:
        labels = ["model_name", "engine", label]
        self._counter = self._gauge = None
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            self._gauge = Gauge(name, text, labelnames=labels, multiprocess_mode="mostrecent")
        else:
            self._counter = Counter(name, text, labelnames=labels)
        self._last: dict[tuple[str, str], int] = {}

    def set(self, model: str, engine: str, kind: str, total: int) -> None:
        if self._gauge is not None:
            self._gauge.labels(model, engine, kind).set(total)
        elif self._counter is not None:
            done = total - self._last.get((engine, kind), 0)
            self._counter.labels(model, engine, kind).inc(done)
            self._last[engine, kind] = total


def _unregister() -> None:
    """Remove the metrics of an earlier engine in this process, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("mikv_"):
            REGISTRY.unregister(collector)


def install_metrics(manager: "StatLoggerManager | None", vllm_config: "VllmConfig") -> None:
    """Add :class:`TierMetrics` before vLLM's own loggers.

    Args:
        manager: changed in place; None if statistics are disabled, and then there are no metrics.
    """
    if manager is not None:
        insert_logger(manager, TierMetrics(vllm_config, manager.engine_indexes))
