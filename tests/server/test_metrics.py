"""Prometheus metrics from the scheduler's statistics."""

from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.stats import SchedulerStats

from mikv_vllm.server.metrics import TierMetrics, install_metrics

STATS = {
    "pages": {"total": 9, "free": 4, "native": 3, "tiered": 2},
    "tokens": {"native": 100, "high": 10, "low": 90},
    "bytes": {"high": 1000, "low": 2000, "unused": 30},
    "blocks": {"sealed": 3, "tail": 2, "kept": 8},
    "operations": {"compress": 5, "demote": 7},
    "reused_tokens": {"adopt": 512, "compress": 1024},
    "requests": {"native": 1, "tiered": 2},
}


@pytest.fixture
def metrics():
    model = SimpleNamespace(served_model_name="m")
    return TierMetrics(SimpleNamespace(model_config=model), [0])


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "0"} | labels)


def scheduler_stats(stats: dict | None = STATS, **more) -> SchedulerStats:
    carried = None if stats is None else {"mikv": stats}
    return SchedulerStats(kv_connector_stats=carried, **more)


def test_gauges_show_the_latest_statistics(metrics):
    metrics.record(scheduler_stats(), None)
    assert value("mikv_kv_cache_pages", state="free") == 4
    assert value("mikv_kv_cache_pages", state="total") is None
    assert value("mikv_kv_cache_tokens", tier="low") == 90
    assert value("mikv_kv_cache_bytes", tier="high") == 1000
    assert value("mikv_blocks", state="kept") == 8
    assert value("mikv_requests", tier="tiered") == 2
    metrics.record(scheduler_stats(STATS | {"requests": {"native": 0, "tiered": 0}}), None)
    assert value("mikv_requests", tier="tiered") == 0


def test_counters_follow_the_totals(metrics):
    metrics.record(scheduler_stats(), None)
    metrics.record(scheduler_stats(STATS | {"operations": {"compress": 6, "demote": 7}}), None)
    assert value("mikv_operations_total", kind="compress") == 6
    assert value("mikv_operations_total", kind="demote") == 7
    assert value("mikv_reused_tokens_total", kind="adopt") == 512


def test_stock_statistics_pass_unchanged(metrics):
    metrics.record(None, None)
    metrics.record(scheduler_stats(None), None)
    assert value("mikv_requests", tier="tiered") is None


def test_statistics_are_removed_before_other_loggers_receive_them(metrics):
    stats = scheduler_stats()
    metrics.record(stats, None)
    assert stats.kv_connector_stats is None


def test_the_logger_is_first_and_exists_only_with_statistics():
    manager = SimpleNamespace(stat_loggers=["vllm's own"], engine_indexes=[0])
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="m"))
    install_metrics(manager, config)
    assert isinstance(manager.stat_loggers[0], TierMetrics)
    install_metrics(None, config)
