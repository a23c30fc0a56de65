"""Prometheus metrics of the two tiers, in vLLM's own ``/metrics``."""

import os
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from mikv_vllm.config import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.metrics.stats import SchedulerStats

GAUGES = {
    "pages": (
        "mikv_kv_cache_pages",
        "state",
        "Pages of vLLM's block pool, by what they hold (pages). Free ones may still serve the "
        "prefix cache.",
    ),
    "tokens": ("mikv_kv_cache_tokens", "tier", "Tokens in the KV cache, by tier (tokens)."),
    "bytes": (
        "mikv_kv_cache_bytes",
        "tier",
        "Pages of compressed requests, by what their bytes hold, over all layers (bytes).",
    ),
    "requests": (
        "mikv_requests",
        "tier",
        "Running requests: native ones are untouched, tiered ones compressed (requests).",
    ),
}
"""Name, label and help text of a gauge, by section of the scheduler's statistics."""

OPERATIONS = (
    "mikv_operations_total",
    "kind",
    "Operations since the engine's start, by kind (operations).",
)


class TierMetrics(AggregateStatLoggerBase):
    """Turns the statistics that the scheduler sends with each step into metrics.

    They come in ``SchedulerStats.kv_connector_stats``. vLLM's own loggers take those for a KV
    connector's and fail if there is none, so this logger must come before them: it takes the
    statistics out.
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
        self._operations = _Operations()
        self._engine_indexes = engine_indexes

    def record(
        self,
        scheduler_stats: "SchedulerStats | None",
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Take the statistics of one step of one engine."""
        if scheduler_stats is None or not scheduler_stats.kv_connector_stats:
            return
        stats = scheduler_stats.kv_connector_stats.pop(ADDITIONAL_CONFIG_KEY, None)
        scheduler_stats.kv_connector_stats = scheduler_stats.kv_connector_stats or None
        if stats is None:
            return
        engine = str(engine_idx)
        for section, gauge in self._gauges.items():
            for key, value in stats[section].items():
                if key != "total":  # the sum of the others
                    gauge.labels(self._model, engine, key).set(value)
        for kind, total in stats["operations"].items():
            self._operations.set(self._model, engine, kind, total)

    def log_engine_initialized(self) -> None:
        """Nothing to say at start-up."""


class _Operations:
    """A counter that follows totals counted elsewhere.

    With several API servers each sees only some of the totals, and Prometheus' multiprocess mode
    sums counters over processes; there it is a gauge that shows the latest total.
    """

    def __init__(self) -> None:
        name, label, text = OPERATIONS
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
    """Forget the metrics of an earlier engine in this process, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("mikv_"):
            REGISTRY.unregister(collector)


def install_metrics(manager: "StatLoggerManager | None", vllm_config: "VllmConfig") -> None:
    """Put :class:`TierMetrics` before vLLM's own loggers; without statistics there are none.

    An entry point of ``vllm.stat_logger_plugins`` would do the same, but would also switch
    statistics on in every stock vLLM that runs with ``--disable-log-stats`` beside this package.
    """
    if manager is not None:
        manager.stat_loggers.insert(0, TierMetrics(vllm_config, manager.engine_indexes))
