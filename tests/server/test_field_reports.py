"""Inputs that users sent and that showed a fault, each with what has to happen."""

import json
import socket
from pathlib import Path

import pytest

from mikv_vllm.config import RatioError, parse_ratio
from mikv_vllm.server import wiring
from mikv_vllm.server.cli import parse, prepare
from mikv_vllm.server.llm import make_config
from mikv_vllm.server.memory import GIB
from mikv_vllm.server.refusals import Refusal
from mikv_vllm.server.request_body import take_ratio

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize("value", ["4", "4.0", " 4 ", "4e0"])
def test_a_string_that_contains_a_number_is_a_ratio(value):
    assert parse_ratio(value, 6.0) == 4.0
    for body in ({"kv_compression_ratio": value}, {"vllm_xargs": {"kv_compression_ratio": value}}):
        assert take_ratio(json.dumps(body).encode(), None, 6.0).ratio == 4.0


@pytest.mark.parametrize("value", ["four", "", "nan", "inf", "0.5", "4,0"])
def test_other_strings_are_refused_with_one_sentence(value):
    with pytest.raises(RatioError, match=r"^kv_compression_ratio is .*; allowed is .* to 6\.$"):
        parse_ratio(value, 6.0)


def test_a_string_in_a_config_file_is_a_ratio(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: a-model\nkv-compression-ratio: '4'\n")
    _, config = parse(["--config", str(file)])
    assert config.ratio == 4.0


@pytest.mark.parametrize(
    "name", ["kv_compresion_ratio", "kv_compression", "kv_ratio", "kv-compression-ratio"]
)
def test_a_misspelt_field_is_refused_with_the_right_name(name):
    for body, prefix in (({name: 4}, ""), ({"vllm_xargs": {name: 4}}, "vllm_xargs.")):
        expected = f"unknown field {prefix}{name}; did you mean {prefix}kv_compression_ratio"
        with pytest.raises(RatioError, match=expected.replace(".", r"\.")):
            take_ratio(json.dumps(body).encode(), None, 6.0)


def test_fields_of_vllm_pass():
    body = json.dumps({"kv_transfer_params": {"a": 1}, "prompt": "kv_compresion_ratio"}).encode()
    assert take_ratio(body, None, 6.0).body is body
    body = json.dumps({"vllm_xargs": {"kv_cache_report_mode": "full"}}).encode()
    assert take_ratio(body, None, 6.0).body is body


def test_a_missing_file_of_low_formats_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["--kv-low-formats", "missing.json"])
    assert "there is no file missing.json" in capsys.readouterr().err
    with pytest.raises(Refusal, match=r"there is no file missing\.json"):
        make_config({"low_formats": "missing.json"})


def test_a_broken_file_of_low_formats_is_named(tmp_path, capsys):
    file = tmp_path / "broken.json"
    file.write_text("{")
    with pytest.raises(SystemExit):
        parse(["--kv-low-formats", str(file)])
    assert f"{file} is not a file of `mikv-eval calibrate`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [("- a\n- b\n", "holds a list"), ("text\n", "holds a single value"), ("a: [\n", "cannot read")],
)
def test_a_config_file_that_is_not_a_map_is_refused_with_one_sentence(
    tmp_path, capsys, text, reason
):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    printed = capsys.readouterr().err.strip()
    assert reason in printed
    assert str(file) in printed
    assert "it should hold one flag per line" in printed
    assert "\n" not in printed


def test_a_missing_config_file_is_named(capsys):
    with pytest.raises(SystemExit):
        parse(["--config", "missing.yaml"])
    assert "there is no file missing.yaml" in capsys.readouterr().err


def test_the_presets_do_not_say_that_gpus_are_refused():
    for path in CONFIGS.glob("*.yaml"):
        assert "CPUs only" not in path.read_text()


def leave_at_start(flags: list[str], capsys) -> str:
    """Prepare a server with these flags, which has to fail, and return what it prints."""
    args, config = parse(flags)
    with pytest.raises(SystemExit):
        prepare(args, config)
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("model", [[], ["a-model-that-is-never-read"]])
def test_a_port_in_use_is_one_sentence_before_the_model_is_read(model, capsys, monkeypatch):
    monkeypatch.setattr(wiring, "available_bytes", lambda: 64 * GIB)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = leave_at_start([*model, "--host", "127.0.0.1", "--port", str(port)], capsys)
    assert said == (
        f"mikv-serve: error: --host 127.0.0.1 --port {port}: another process listens on "
        f"127.0.0.1:{port}; stop it, or set another --port."
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--host", "192.0.2.1"], "192.0.2.1 is not an address of this machine"),
        (["--host", "no such host"], "no such host is not an address of this machine"),
        (["--port", "70000"], "--port 70000 is not allowed; give a number from 0 to 65535."),
    ],
)
def test_a_wrong_address_is_one_sentence(flags, said, capsys, monkeypatch):
    monkeypatch.setattr(wiring, "available_bytes", lambda: 64 * GIB)
    printed = leave_at_start(["a-model-that-is-never-read", *flags], capsys)
    assert said in printed
    assert "\n" not in printed


@pytest.mark.parametrize("size", ["8", "16", "48"])
def test_a_page_size_that_the_cpu_kernels_do_not_support_is_one_sentence(size, capsys):
    assert leave_at_start(["--block-size", size], capsys) == (
        f"mikv-serve: error: --block-size {size} is not supported by the attention kernels for the "
        "device 'cpu'; use a multiple of 32."
    )
    with pytest.raises(Refusal, match=f"--block-size {size}"):
        wiring.wire({"block_size": int(size)}, parse([])[1], "cpu")


def test_the_page_sizes_are_those_of_vllm():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    (multiple,) = CPUAttentionBackend.get_supported_kernel_block_sizes()
    assert wiring.BLOCK_SIZE_MULTIPLE["cpu"] == multiple.base
