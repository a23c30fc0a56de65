"""Calibration of low formats, and its text, which evaluation does not use."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from mikv_vllm.config import CompressionConfig
from mikv_vllm.evaluation import cli
from mikv_vllm.evaluation.calibration import (
    KEY_BITS,
    VALUE_BITS,
    Point,
    RatioPoint,
    frontier,
    write,
)
from mikv_vllm.evaluation.windows import calibration_text, topics_text, word_runs
from mikv_vllm.server.start import calibrated
from mikv_vllm.tiers.calibrations import Calibration, ModelShape, find, known
from mikv_vllm.tiers.formats import LADDERS, TierGeometry


def test_calibration_and_evaluation_use_different_texts():
    assert not word_runs(calibration_text()) & word_runs(topics_text())
    assert min(len(word_runs(text)) for text in (calibration_text(), topics_text())) > 10_000


def test_more_bytes_give_less_divergence_along_a_ladder():
    of_keys = {bits: 0.4 / 4 ** (sum(bits) / 4) for bits in KEY_BITS}
    of_values = {bits: 0.004 / 4**bits for bits in VALUE_BITS}
    ladder = frontier(64, of_keys, of_values)
    sizes = [TierGeometry(64, 32).low(low_format).num_bytes for low_format in ladder]
    found = [of_keys[one.key_bits] + of_values[one.value_bits] for one in ladder]
    assert len(ladder) > 4
    assert all(before >= 1.07 * after for before, after in pairwise(sizes))
    assert found == sorted(found)
    # Keys matter a hundred times more, so values get more bits only after keys have all bits.
    assert all(one.value_bits == 2 for one in ladder if one.key_bits != KEY_BITS[0])


def test_formats_with_a_large_divergence_are_left_out():
    of_keys = {bits: 1.0 / 4 ** (sum(bits) / 4) for bits in KEY_BITS}
    ladder = frontier(64, of_keys, dict.fromkeys(VALUE_BITS, 0.0))
    assert all(of_keys[one.key_bits] <= 0.05 for one in ladder)


def test_a_format_that_is_worse_at_more_bytes_is_left_out():
    of_keys = dict.fromkeys(KEY_BITS, 0.01)
    ladder = frontier(128, of_keys, {bits: 1.0 / 4**bits for bits in VALUE_BITS})
    assert {one.key_bits for one in ladder} == {KEY_BITS[-1]}


def test_a_server_reads_the_file_that_is_written(tmp_path):
    path = tmp_path / "low-formats.json"
    points = [Point("K6433V4", 3.5, 0.0003), Point("K4222V2", 5.8, 0.01)]
    shape = ModelShape(28, 1536, 12, 2, 128, 151936)
    by_ratio = [RatioPoint(2.0, 2.03, 0.0001), RatioPoint(4.0, 3.95, 0.00056)]
    write(points, by_ratio, "a model", shape, path)
    config = CompressionConfig(low_formats=str(path))
    assert config.low_formats == ("K6433V4", "K4222V2")
    found = Calibration.read(path.read_text())
    assert (found.model, found.shape) == ("a model", shape)
    assert found.low_formats == config.low_formats
    assert found.describe() == "0.00010 at ratio 2.0, 0.00056 at ratio 4.0"


def llama(**differs):
    return LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        **differs,
    )


def test_a_calibration_is_found_by_the_shape_of_the_model():
    found = find(ModelShape.of_config(llama()))
    assert found.model == "SmolLM2-135M-Instruct"
    assert found.low_formats == tuple(one.name for one in LADDERS["channel"])
    assert find(ModelShape.of_config(llama(head_dim=96))) is None
    assert ModelShape.of_config(object()) is None


def test_calibrations_of_the_package_differ_in_shape_and_can_be_served():
    assert len({one.shape for one in known()}) == len(known()) >= 1
    for one in known():
        assert CompressionConfig(low_formats=one.low_formats).low_formats == one.low_formats
        assert list(one.divergences.values()) == sorted(one.divergences.values())


def test_a_server_uses_the_low_formats_of_its_model(caplog):
    caplog.set_level("INFO", "vllm.mikv")
    known_model = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=llama()))
    other = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=llama(head_dim=96)))
    found = find(ModelShape.of_config(llama()))
    assert calibrated(known_model, CompressionConfig()).low_formats == found.low_formats
    assert f"low formats of {found.model}. Its mean KL divergence" in caplog.text
    assert found.describe() in caplog.text
    caplog.clear()
    for config in (CompressionConfig(low_formats="K6433V4"), CompressionConfig(codec="balanced")):
        assert calibrated(known_model, config) is config
    assert not caplog.text
    assert calibrated(other, CompressionConfig()).low_formats is None
    assert "no calibration for a model of this shape" in caplog.text


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("K4222V2, K6433V4,K4222V2", ("K6433V4", "K4222V2")),
        (("K4222V2",), ("K4222V2",)),
    ],
)
def test_low_formats_are_sorted_richest_first(given, names):
    config = CompressionConfig(low_formats=given)
    assert config.low_formats == names
    assert tuple(low_format.name for low_format in config.ladder) == names


@pytest.mark.parametrize("codec", LADDERS)
def test_a_codec_has_its_own_low_formats(codec):
    assert CompressionConfig(codec=codec).ladder == LADDERS[codec]
    (other,) = set(LADDERS) - {codec}
    name = LADDERS[other][0].name
    with pytest.raises(ValueError, match=f"low_formats has {name}, which is not of codec {codec}"):
        CompressionConfig(codec=codec, low_formats=name)


@pytest.mark.parametrize(
    "given", ["K4V4", "K2345V2", "K7222V2", "K4222V1", "B7V2", "", (), "no.json"]
)
def test_low_formats_that_do_not_exist_are_refused(given):
    with pytest.raises(ValueError, match="low_formats"):
        CompressionConfig(low_formats=given)


def test_calibrate_writes_a_ladder(model_path, tmp_path):
    path = tmp_path / "low-formats.json"
    command = ["calibrate", "--model", str(model_path), "--out", str(path), "--windows", "1"]
    assert cli.main([*command, "--prompt", "512", "--continuation", "64"]) == 0
    written = json.loads(path.read_text())
    measured = written["measured"]
    ratios = [point["ratio"] for point in measured]
    assert len(measured) > 4
    assert ratios == sorted(ratios)
    assert measured[-1]["divergence"] > 10 * measured[0]["divergence"]
    assert [point["ratio"] for point in written["by_ratio"]][:4] == [2.0, 3.0, 4.0, 5.0]
    assert written["shape"]["layers"] == 30
