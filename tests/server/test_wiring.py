"""What MiKV sets in vLLM's engine arguments and environment."""

import os
from importlib.metadata import entry_points

import pytest

from mikv_vllm.config import CompressionConfig
from mikv_vllm.server import wiring
from mikv_vllm.server.memory import EMBEDDED_LIMIT, GIB, cpu_cache_bytes
from mikv_vllm.server.refusals import Refusal
from mikv_vllm.server.wiring import CPU_BLOCK_SIZE, allow_plugin, wire


@pytest.fixture(autouse=True)
def plenty_of_memory(monkeypatch):
    monkeypatch.setattr(wiring, "available_bytes", lambda: 64 * GIB)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def test_settings_travel_in_the_additional_config():
    config = CompressionConfig(ratio=3.0)
    wired = wire({"additional_config": {"other": 1}}, config, "cpu")
    assert wired["additional_config"]["other"] == 1
    assert CompressionConfig.from_additional_config(wired["additional_config"]) == config


def test_settings_by_hand_are_refused():
    with pytest.raises(Refusal, match="--additional-config"):
        wire({"additional_config": {"mikv": {}}}, CompressionConfig(), "cpu")


def test_device_without_kernels_is_refused():
    with pytest.raises(Refusal, match="device 'tpu'"):
        wire({}, CompressionConfig(), "tpu")


@pytest.mark.parametrize("flag", ["distributed_executor_backend", "data_parallel_backend"])
def test_ray_is_refused_where_vllm_does_not_run_on_it(flag):
    with pytest.raises(Refusal, match=f"--{flag.replace('_', '-')} ray"):
        wire({flag: "ray"}, CompressionConfig(), "cpu")


def test_page_size_is_ours_unless_given():
    assert wire({}, CompressionConfig(), "cpu")["block_size"] == CPU_BLOCK_SIZE
    assert "block_size" not in wire({"block_size": 128}, CompressionConfig(), "cpu")


def test_embedded_model_is_eager_unless_told_otherwise():
    given: dict = {"enforce_eager": None}
    assert wire(given, CompressionConfig(), "cpu", embedded=True)["enforce_eager"] is True
    assert "enforce_eager" not in wire(given, CompressionConfig(), "cpu")
    given = {"enforce_eager": False}
    assert "enforce_eager" not in wire(given, CompressionConfig(), "cpu", embedded=True)


def test_cache_is_a_quarter_of_the_free_memory():
    assert cpu_cache_bytes({}, 64 * GIB) == 16 * GIB
    assert cpu_cache_bytes({"tensor_parallel_size": 2}, 64 * GIB) == 8 * GIB
    assert cpu_cache_bytes({}, 64 * GIB, EMBEDDED_LIMIT) == 4 * GIB


def test_cache_size_of_the_user_stands(monkeypatch):
    assert cpu_cache_bytes({"kv_cache_memory_bytes": 1}, 64 * GIB) is None
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    assert cpu_cache_bytes({}, 64 * GIB) is None


def test_unset_allow_list_keeps_all_plugins(monkeypatch):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    allow_plugin()
    names = os.environ["VLLM_PLUGINS"].split(",")
    assert {"mikv", "lora_filesystem_resolver"} <= set(names)
    assert "lora_hf_hub_resolver" not in names  # naming it switches it on


@pytest.mark.parametrize(
    ("before", "after"), [("", "mikv"), ("a,b", "a,b,mikv"), ("mikv,a", "mikv,a")]
)
def test_allow_list_of_the_user_is_kept(monkeypatch, before, after):
    monkeypatch.setenv("VLLM_PLUGINS", before)
    allow_plugin()
    assert os.environ["VLLM_PLUGINS"] == after


def test_entry_point_can_be_loaded():
    (entry_point,) = entry_points(group="vllm.endpoint_plugins", name=wiring.PLUGIN)
    assert entry_point.load().name == wiring.PLUGIN
