"""Pages and tokens add up, whatever arrives, stops or is preempted."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mikv_vllm.config import CompressionConfig

from .simulation import Simulation, engine_config, make_scheduler, write_model_config

CONFIGS = {
    "window": CompressionConfig(min_tokens=128, recent=8, native_share=1.0),
    "h2o": CompressionConfig(min_tokens=128, recent=8, importance="h2o"),
    "two ranks": CompressionConfig(min_tokens=128, recent=8, native_share=0.2),
}
ENGINE_ARGS = {"two ranks": {"tensor_parallel_size": 2}}


class Configs:
    """vLLM's configurations by name; hypothesis cannot print them."""

    def __init__(self, by_name) -> None:
        self._by_name = by_name

    def __getitem__(self, name):
        return self._by_name[name]

    def __repr__(self) -> str:
        return "Configs"


@pytest.fixture(scope="module")
def vllm_configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model_config(folder)
    return Configs(
        {
            name: engine_config(folder, config, **ENGINE_ARGS.get(name, {}))
            for name, config in CONFIGS.items()
        }
    )


REQUEST = st.fixed_dictionaries(
    {
        "arrival": st.integers(0, 20),
        "prefix": st.integers(0, 2),
        "prefix_tokens": st.sampled_from([0, 64, 200]),
        "own_tokens": st.integers(1, 500),
        "more_if_compressed": st.sampled_from([0, 0, 700]),
        "max_tokens": st.integers(1, 100),
        "ratio": st.sampled_from([1.0, 1.0, 1.5, 2.0, 3.3, 4.0, 5.0, 6.1]),
        "abort_after": st.none() | st.integers(0, 60),
    }
)


@pytest.mark.parametrize("name", CONFIGS)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=10),
    num_pages=st.integers(26, 60),
    depth=st.sampled_from([1, 2]),
)
def test_pages_add_up(vllm_configs, name, requests, num_pages, depth):
    config = CONFIGS[name]
    scheduler = make_scheduler(vllm_configs[name], config, num_pages, depth > 1)
    simulation = Simulation(scheduler, depth)
    aborts: dict[int, list[str]] = {}
    for i, request in enumerate(requests):
        if request["abort_after"] is not None:
            when = request["arrival"] + request["abort_after"]
            aborts.setdefault(when, []).append(f"r{i}")
    for now in range(101):
        for i, request in enumerate(requests):
            if request["arrival"] == now:
                # Prefixes are shared by some requests and not by others.
                prefix = [request["prefix"]] * request["prefix_tokens"]
                own_tokens = request["own_tokens"]
                if request["ratio"] > 3:
                    own_tokens += request["more_if_compressed"]
                prompt = prefix + [100 + i] * own_tokens
                simulation.add(f"r{i}", prompt, request["max_tokens"], request["ratio"])
        for request_id in aborts.get(now, ()):
            simulation.abort(request_id)
        if simulation.scheduler.has_requests():
            simulation.step()
    simulation.run()
    assert simulation.pool.get_num_free_blocks() == num_pages
    scheduler, context = simulation.scheduler, simulation.context
    manager, store = scheduler.manager, scheduler.store
    left = (store.requests, store.ratios, manager.req_to_blocks, scheduler.planner._scoring)
    assert not any((*left, context.tiers, context.scores))


def test_more_requests_run_at_once_compressed(vllm_configs):
    """The point of it: the same pool, more requests, nobody preempted."""
    most = {}
    for ratio in (1.0, 4.0):
        config = vllm_configs["window"]
        simulation = Simulation(make_scheduler(config, CONFIGS["window"], 100))
        for i in range(6):
            simulation.add(f"r{i}", [100 + i] * 900, 40, ratio)
        simulation.run()
        most[ratio] = simulation.most_running
        assert len(simulation.reports) == 6
    assert most[1.0] == 3
    assert most[4.0] == 6


def test_a_full_pool_compresses_in_place(vllm_configs):
    """With too few free pages for a copy the request's own pages take the tiers."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 32))
    simulation.add("r", list(range(900)), 100, 4.0)
    simulation.run()
    assert simulation.scheduler.store.operations["compress_in_place"] == 1
    assert simulation.reports["r"]["low_tokens"] > 800


def test_a_short_prompt_is_compressed_once_it_is_long_enough(vllm_configs):
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 60))
    simulation.add("r", [1] * 50, 900, 4.0)
    simulation.run()
    report = simulation.reports["r"]
    assert report["kv_tokens"] == 949
    assert report["high_tokens"] + report["low_tokens"] == 949
    assert report["achieved_ratio"] > 3.2


def test_shared_pages_are_not_compressed_in_place(vllm_configs):
    """Too few free pages, and the request's own are shared: it waits until they are not."""
    simulation = Simulation(make_scheduler(vllm_configs["window"], CONFIGS["window"], 26))
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
