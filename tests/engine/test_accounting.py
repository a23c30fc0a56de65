"""Pages and tokens add up, whatever arrives, stops or is preempted."""

import pytest
from hypothesis import HealthCheck, given, settings

from .loads import CONFIGS, DEPTH, DRAFTS, NUM_PAGES, REQUESTS, Configs, run_load
from .simulation import Simulation, make_scheduler

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def vllm_configs(tmp_path_factory):
    return Configs(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", CONFIGS)
@EXAMPLES
@given(requests=REQUESTS, num_pages=NUM_PAGES, depth=DEPTH)
def test_pages_add_up(vllm_configs, name, requests, num_pages, depth):
    run_load(vllm_configs, name, requests, num_pages, depth)


@pytest.mark.parametrize("name", ["window", "h2o"])
@EXAMPLES
@given(requests=REQUESTS, num_pages=NUM_PAGES, drafts=DRAFTS)
def test_pages_add_up_with_drafts(vllm_configs, name, requests, num_pages, drafts):
    run_load(vllm_configs, name, requests, num_pages, drafts=drafts)


def test_drafts_change_neither_tiers_nor_reports(vllm_configs):
    """Sizes are those of the same tokens without drafts, and most drafts are used."""
    reports = []
    for drafts in (0, 3):
        scheduler = make_scheduler(vllm_configs["window"], CONFIGS["window"], 120)
        simulation = Simulation(scheduler, drafts=drafts)
        simulation.add("r", [1] * 300, 1000, 4.0)
        simulation.run()
        reports.append(simulation.reports["r"])
    assert reports[0] == reports[1]
    assert simulation.workers.accepted > 400
    assert simulation.workers.rejected > 50


def test_more_requests_run_at_once_compressed(vllm_configs):
    """The point of it: the same pool, more requests, nobody preempted."""
    most = {}
    for ratio in (1.0, 4.0):
        config = vllm_configs["window"]
        simulation = Simulation(make_scheduler(config, CONFIGS["window"], 200))
        for i in range(6):
            simulation.add(f"r{i}", [100 + i] * 900, 40, ratio)
        simulation.run()
        most[ratio] = simulation.most_running
        assert len(simulation.reports) == 6
    assert most[1.0] == 3
    assert most[4.0] == 6


def test_admission_leaves_running_requests_their_next_pages(vllm_configs):
    """More requests than the pool holds, each of which grows by a few pages."""
    scheduler = make_scheduler(vllm_configs["window"], CONFIGS["window"], 48)
    simulation = Simulation(scheduler)
    for i in range(8):
        simulation.add(str(i), [i] * 350, 200, 4.0)
    simulation.run()
    assert simulation.most_running == 5
    assert simulation.preemptions == 0


def test_a_full_pool_compresses_in_place(vllm_configs):
    """With too few free pages for a copy the request's own pages take the tiers."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 64))
    simulation.add("other", [1] * 160, 60, 1.0)
    simulation.add("r", list(range(800)), 100, 4.0)
    simulation.run()
    assert simulation.scheduler.store.operations["compress_in_place"] == 1
    assert simulation.reports["r"]["low_tokens"] > 700


def test_a_short_prompt_is_compressed_once_it_is_long_enough(vllm_configs):
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 120))
    simulation.add("r", [1] * 50, 900, 4.0)
    simulation.run()
    report = simulation.reports["r"]
    assert report["kv_tokens"] == 949
    assert report["high_tokens"] + report["low_tokens"] == 949
    assert report["achieved_ratio"] > 3.2


def test_questions_about_a_document_share_its_blocks(vllm_configs):
    """The second one seals a short block at the document's end, and the later ones find it."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 120))
    store = simulation.scheduler.store
    document = list(range(1205))
    for i in range(4):
        simulation.add(f"r{i}", [*document, *[2000 + i] * 60], 20, 4.0)
        simulation.run()
    # A document of 1,205 tokens has 1,200 tokens in whole pages, 1,024 of them in a whole block.
    reused = [simulation.reports[f"r{i}"]["reused_tokens"] for i in range(4)]
    assert reused == [0, 1024, 1200, 1200]
    for i in range(4, 8):
        simulation.add(f"r{i}", [*document, *[2000 + i] * 60], 20, 4.0)
    for _ in range(10):
        simulation.step()
    assert len(store.requests) == 4
    assert (store.totals.blocks, store.totals.sealed) == (6, 2)
    simulation.run()


def test_native_pages_do_not_evict_the_blocks_of_conversations(vllm_configs):
    """The pool holds eight conversations compressed, but only three of them uncompressed."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 180))
    histories = {i: [i] * 800 for i in range(8)}
    found = total = 0
    for turn in range(3):
        for i, history in histories.items():
            request_id, prompt = f"r{turn}.{i}", [*history, *[100 + turn] * 40]
            simulation.add(request_id, prompt, 20, 4.0)
            simulation.run()
            histories[i] = simulation.tokens[request_id]
            if turn:
                found += simulation.reports[request_id]["reused_tokens"]
                total += len(prompt)
    assert found / total > 0.95  # all but the questions


def test_a_long_prompt_does_not_evict_kept_blocks(vllm_configs):
    """It is compressed while it is computed instead."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 190))
    for i in range(6):
        simulation.add(f"r{i}", [i] * 1050, 20, 4.0)
        simulation.run()
    simulation.add("long", [9] * 1500, 20, 4.0)
    simulation.run()
    assert simulation.scheduler.store.operations["evict"] == 0
    assert simulation.scheduler.store.cache.num_kept == 6 * 2 + 2


def test_shared_pages_are_not_compressed_in_place(vllm_configs):
    """Too few free pages, and the request's own are shared: it waits until they are not."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 52))
    simulation.add("reader", [7] * 640 + [1] * 20, 25, 1.0)
    for _ in range(6):
        simulation.step()
    simulation.add("compressed", [7] * 640 + [2] * 20, 100, 3.3)
    for _ in range(10):
        simulation.step()
    assert simulation.most_running == 2
    assert not simulation.scheduler.store.requests
    simulation.run()
    assert simulation.preemptions == 0
    assert simulation.reports["compressed"]["low_tokens"] > 300
