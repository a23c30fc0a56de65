"""Pytest plugin: runs vLLM's tests of the scheduler with MiKV's scheduler, and records outcomes.

Environment:
    MIKV_PEER_RATIO: default ratio of every request, or ``stock`` for vLLM's own scheduler.
    MIKV_PEER_OUTCOMES: file that receives the outcome of every test, as JSON.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

RATIO = os.environ["MIKV_PEER_RATIO"]
HEAD_DIM = 64
"""The head size of vLLM's tests is 1, which cannot be compressed."""
MIN_TOKENS, RECENT = 64, 16
"""Smallest values of the settings: prompts in these tests are short."""

MOST_PAGES = 1000
"""Larger pools are checked only when no request is left: a check reads all pages."""

outcomes: dict[str, dict[str, str]] = {}


def pytest_configure(config: pytest.Config) -> None:
    """Replace the schedulers before a test module imports them."""
    for mark in ("cpu_test", "skip_global_cleanup"):
        config.addinivalue_line("markers", f"{mark}: of vLLM")
    if RATIO != "stock":
        _replace_schedulers(float(RATIO))


def _replace_schedulers(ratio: float) -> None:
    import vllm.v1.core.sched.async_scheduler
    import vllm.v1.core.sched.diffusion_scheduler  # derives from vLLM's own scheduler
    import vllm.v1.core.sched.scheduler as sync
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from mikv_vllm.config import CompressionConfig
    from mikv_vllm.engine.scheduler import TieredAsyncScheduler, TieredScheduler
    from mikv_vllm.engine.spec import tiered_spec

    settings = CompressionConfig(ratio=ratio, min_tokens=MIN_TOKENS, recent=RECENT)
    start, update = TieredScheduler.__init__, TieredScheduler.update_from_output

    def start_tiered(self, vllm_config, kv_cache_config, *args, **kwargs) -> None:
        vllm_config.additional_config = settings.to_additional_config()
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            spec = group.kv_cache_spec
            if type(spec) is FullAttentionSpec:
                spec = replace(spec, head_size=HEAD_DIM, head_size_v=HEAD_DIM, dtype=torch.float16)
                kv_cache_config.kv_cache_groups[index] = replace(
                    group, kv_cache_spec=tiered_spec(spec, settings)
                )
        start(self, vllm_config, kv_cache_config, *args, **kwargs)

    def update_and_check(self, *args, **kwargs):
        outputs = update(self, *args, **kwargs)
        if not self.requests or len(self.kv_cache_manager.block_pool.blocks) <= MOST_PAGES:
            check_pool(self)
        return outputs

    TieredScheduler.__init__ = start_tiered
    TieredScheduler.update_from_output = update_and_check
    sync.Scheduler = TieredScheduler
    vllm.v1.core.sched.async_scheduler.AsyncScheduler = TieredAsyncScheduler


class PoolError(Exception):
    """The block pool lost or duplicated a page."""


def check_pool(scheduler) -> None:
    """Raise an error unless exactly the pages without a holder are free."""
    pool = scheduler.kv_cache_manager.block_pool
    free = [block for block in pool.blocks if block.ref_cnt == 0 and not block.is_null]
    queue = pool.free_block_queue.get_all_free_blocks()
    if {block.block_id for block in free} != {block.block_id for block in queue}:
        raise PoolError("the free queue is not the set of pages without a holder")
    if len(queue) != pool.free_block_queue.num_free_blocks:
        raise PoolError("the length of the free queue is wrong")
    if not scheduler.requests and len(free) != len(pool.blocks) - 1:
        raise PoolError(f"{len(pool.blocks) - 1 - len(free)} pages leaked")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Record the outcome of a test, and where it failed."""
    report = yield
    name = report.nodeid.removeprefix("tests/v1/core/")
    if report.when == "call" or report.outcome != "passed":
        entry = {"outcome": report.outcome, "at": "", "error": ""}
        if call.excinfo is not None:
            entry["at"] = str(call.excinfo.traceback[-1].path)
            entry["error"] = call.excinfo.exconly()[:300]
        if outcomes.get(name, {}).get("outcome") != "failed":
            outcomes[name] = entry
    return report


def pytest_sessionfinish() -> None:
    """Write the outcomes."""
    Path(os.environ["MIKV_PEER_OUTCOMES"]).write_text(json.dumps(outcomes))
