"""Blocks, and what the prefix cache finds of them, are counted: the real scheduler decides."""

import pytest

from mikv_vllm.engine.statistics import tier_stats
from mikv_vllm.tiers.blocks import block_tokens

from .loads import CONFIGS, Configs
from .simulation import Simulation, make_scheduler

BLOCK = block_tokens(16)


@pytest.fixture(scope="module")
def vllm_configs(tmp_path_factory):
    return Configs(tmp_path_factory.mktemp("model"))


@pytest.fixture
def simulation(vllm_configs):
    """With a pool of 100 pages, 1,600 native tokens."""
    return Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 100))


def stats(simulation):
    return tier_stats(simulation.scheduler.store, simulation.scheduler.running, heads=2)


def test_blocks_of_running_requests_are_sealed_or_tails_and_kept_afterwards(simulation):
    simulation.add("r", list(range(1200)), 20, 4.0)
    while simulation.scheduler.has_requests():
        simulation.step()
        if simulation.scheduler.store.requests:
            assert stats(simulation).blocks == {"sealed": 1, "tail": 1, "kept": 0}
    done = stats(simulation)
    assert done.blocks == {"sealed": 0, "tail": 0, "kept": 2}
    assert done.pages["tiered"] == 0
    assert done.pages["free"] == done.pages["total"]


def test_a_later_turn_finds_its_history(simulation):
    simulation.add("r", list(range(1200)), 20, 4.0)
    simulation.run()
    simulation.add("next", simulation.tokens["r"] + [7] * 60, 20, 4.0)
    simulation.run()
    found = 1200 + 20 - 1  # the last new token was never cached
    assert simulation.reports["next"]["reused_tokens"] == found
    done = stats(simulation)
    assert done.reused_tokens == {"adopt": found, "compress": 0}
    assert (done.operations["reuse"], done.operations["copy"]) == (1, 1)
    # The history's blocks, its tail and the tail of the turn.
    assert done.blocks["kept"] == 3
    assert simulation.prefix_hits == found


def test_requests_that_start_together_share_blocks_when_they_are_compressed(simulation):
    for name in ("a", "b", "c"):
        simulation.add(name, [*range(BLOCK + 88), *name.encode()], 20, 4.0)
    simulation.run()
    assert stats(simulation).reused_tokens == {"adopt": 0, "compress": 2 * BLOCK}
    assert stats(simulation).operations["reuse"] == 2
    reports = simulation.reports.values()
    assert sorted(report["reused_tokens"] for report in reports) == [0, BLOCK, BLOCK]
    assert any(report["shared_kv_bytes"] for report in reports)


def test_blocks_whose_pages_are_allocated_again_are_evicted(simulation):
    simulation.add("kept", list(range(1200)), 20, 4.0)
    simulation.run()
    assert stats(simulation).operations["evict"] == 0
    simulation.add("native", list(range(5000, 6500)), 20, 1.0)
    simulation.run()
    done = stats(simulation)
    assert done.operations["evict"] == 2
    assert done.blocks["kept"] == 0


def test_a_reset_of_the_prefix_cache_forgets_kept_blocks(simulation):
    simulation.add("r", list(range(1200)), 20, 4.0)
    simulation.run()
    assert simulation.scheduler.reset_prefix_cache()
    assert stats(simulation).blocks["kept"] == stats(simulation).operations["evict"] == 0
    simulation.add("again", list(range(1200)), 20, 4.0)
    simulation.run()
    assert simulation.reports["again"]["reused_tokens"] == 0
