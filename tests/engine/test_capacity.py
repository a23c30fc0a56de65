"""How many requests fit into the same pages: the real scheduler decides, without preempting."""

from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu_worker import Worker

from mikv_vllm.config import CompressionConfig
from mikv_vllm.engine.gpu_worker import TieredGPUWorker

from .simulation import Simulation, engine_config, make_scheduler, write_model_config

SETTINGS = CompressionConfig()
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model_config(folder)
    return engine_config(folder, SETTINGS, 64, max_num_seqs=256, batched_tokens=2048)


def run_at_once(vllm_config, num_pages: int, tokens: int, ratio: float, count: int) -> bool:
    """Whether ``count`` requests of ``tokens`` tokens all run together and none is preempted."""
    simulation = Simulation(make_scheduler(vllm_config, SETTINGS, num_pages))
    # The last to be admitted still needs the first: they run as long as it takes to prefill all.
    steps = count * -(-tokens // 2048)
    new_tokens = NEW_TOKENS + steps
    for i in range(count):
        simulation.add(f"r{i}", [i] * (tokens - new_tokens), new_tokens, ratio)
    simulation.run()
    return simulation.most_running == count and not simulation.preemptions


@pytest.mark.parametrize(("tokens", "stock", "times"), [(2048, 20, 3.3), (8192, 12, 3.5)])
def test_ratio_four_multiplies_concurrency(vllm_config, tokens, stock, times):
    num_pages = stock * tokens // 64
    assert run_at_once(vllm_config, num_pages, tokens, 1.0, stock)
    assert not run_at_once(vllm_config, num_pages, tokens, 1.0, stock + 1)
    assert run_at_once(vllm_config, num_pages, tokens, 4.0, -(-int(10 * times * stock) // 10))


@pytest.mark.parametrize("chosen", [None, 1 << 30])
def test_a_gpu_worker_leaves_memory_for_the_tiers(vllm_config, monkeypatch, chosen):
    monkeypatch.setattr(Worker, "determine_available_memory", lambda _: 1 << 30)
    worker = object.__new__(TieredGPUWorker)
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=chosen)
    worker.model_config = SimpleNamespace(max_model_len=100_000)
    spec = make_scheduler(vllm_config, SETTINGS, 8).kv_cache_config.kv_cache_groups[0].kv_cache_spec
    worker.get_kv_cache_spec = lambda: {"layer.0": spec, "layer.1": spec, "other": object()}
    left = worker.determine_available_memory()
    # A workspace and the kernels' scratch, for one layer at a time.
    layer = 100_000 * spec.page_size_bytes / spec.block_size
    assert left == 1 << 30 if chosen else 2.2 * layer <= (1 << 30) - left <= 3.01 * layer
