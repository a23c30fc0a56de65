"""The presets under configs/, read by the real parser."""

from pathlib import Path

import pytest
import yaml

from mikv_vllm.server.cli import parse
from mikv_vllm.server.refusals import check_flags
from mikv_vllm.tiers.plan import largest_ratio

PRESETS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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
