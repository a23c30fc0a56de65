"""How many requests fit into the same pages: the real scheduler decides, without preempting."""

import pytest

from mikv_vllm.config import CompressionConfig

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


@pytest.mark.parametrize(("tokens", "stock", "times"), [(2048, 20, 3.3), (8192, 12, 3.6)])
def test_ratio_four_multiplies_concurrency(vllm_config, tokens, stock, times):
    num_pages = stock * tokens // 64
    assert run_at_once(vllm_config, num_pages, tokens, 1.0, stock)
    assert not run_at_once(vllm_config, num_pages, tokens, 1.0, stock + 1)
    assert run_at_once(vllm_config, num_pages, tokens, 4.0, -(-int(10 * times * stock) // 10))
