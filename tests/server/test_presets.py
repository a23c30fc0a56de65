"""The presets in configs/, read by the real parser."""

from pathlib import Path

import pytest
import yaml
from vllm.engine.arg_utils import AsyncEngineArgs

from mikv_vllm.server import wiring
from mikv_vllm.server.cli import parse, prepare
from mikv_vllm.server.memory import GIB
from mikv_vllm.server.refusals import check_flags
from mikv_vllm.tiers.plan import largest_ratio

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Path:
    """A folder with the configuration of Llama 3.1 8B, without weights."""
    import transformers

    folder = tmp_path_factory.mktemp("stand-in")
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        hidden_size=4096,
        head_dim=128,
        max_position_embeddings=131072,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return folder


def test_there_are_presets():
    assert len(PRESETS) >= 6


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_is_accepted(preset):
    args, config = parse(["--config", str(preset)])
    check_flags(vars(args))
    assert 1.0 < config.ratio <= largest_ratio(128, config.high_bits)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_sets_what_it_says(preset):
    args, _ = parse(["--config", str(preset)])
    for key, value in yaml.safe_load(preset.read_text()).items():
        assert getattr(args, key.replace("-", "_")) == value


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_preset_starts_up_to_the_configuration_of_the_engine(preset, stand_in, monkeypatch):
    monkeypatch.setattr(wiring, "available_bytes", lambda: 64 * GIB)
    args, config = parse(["--config", str(preset), "--model", str(stand_in), "--port", "0"])
    prepare(args, config)
    vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert vllm_config.scheduler_config.scheduler_cls == wiring.SCHEDULER_CLS
    assert vllm_config.additional_config["mikv"]["ratio"] == config.ratio
    wanted = yaml.safe_load(preset.read_text())
    if "max-model-len" in wanted:
        assert vllm_config.model_config.max_model_len == wanted["max-model-len"]
