"""The command line of mikv-serve."""

import pytest

from mikv_vllm.config import CompressionConfig
from mikv_vllm.server.cli import parse
from mikv_vllm.server.options import FLAGS
from mikv_vllm.server.parser import make_parser


def test_every_setting_has_a_flag():
    assert set(FLAGS) == set(CompressionConfig.model_fields)


def test_without_flags_the_settings_are_the_defaults():
    args, config = parse([])
    assert config == CompressionConfig()
    assert args.model is None
    assert args.enforce_eager is None


def test_flags_set_the_settings():
    flags = (
        "--kv-compression-ratio 4 --kv-importance h2o --kv-importance-window 16 "
        "--kv-recent-tokens 8 --kv-importance-decay 0.5 --kv-high-bits 16 --kv-min-tokens 128 "
        "--kv-codec channel"
    )
    _, config = parse(flags.split())
    assert config == CompressionConfig(
        ratio=4.0, importance="h2o", window=16, recent=8, decay=0.5, high_bits=16, min_tokens=128
    )


def test_underscores_and_vllm_flags_work_too():
    args, config = parse(["some/model", "--kv_compression_ratio=3", "--max_model_len", "1k"])
    assert (args.model_tag, config.ratio, args.max_model_len) == ("some/model", 3.0, 1000)


@pytest.mark.parametrize("joined", [False, True])
def test_command_line_wins_over_the_file(tmp_path, joined):
    file = tmp_path / "flags.yaml"
    file.write_text("kv-compression-ratio: 4.0\nkv_high_bits: 16\nport: 9000\nenforce-eager: true")
    flag = [f"--config={file}"] if joined else ["--config", str(file)]
    args, config = parse(["m", *flag, "--kv-compression-ratio", "2"])
    assert (config.ratio, config.high_bits) == (2.0, 16)
    assert (args.port, args.enforce_eager) == (9000, True)


def test_file_of_comments_is_fine(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("# nothing\n\n")
    assert parse(["--config", str(file)])[1] == CompressionConfig()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--kv-compression-ratio abc", "--kv-compression-ratio: 'abc' is not allowed; give a numb"),
        ("--kv-compression-ratio 0.9", "--kv-compression-ratio: '0.9' is not allowed"),
        ("--kv-compression-ratio nan", "--kv-compression-ratio: 'nan' is not allowed"),
        ("--kv-high-bits 12", "--kv-high-bits: '12' is not allowed; give 8 or 16"),
        ("--kv-importance all", "--kv-importance: 'all' is not allowed; give window or h2o"),
        ("--kv-recent-tokens 0", "give a whole number from 1 to 1024"),
        ("--kv-recent-tokens 256", "Recent is 256, but must be below min_tokens (256)."),
        ("--config /nowhere.yaml", "/nowhere.yaml"),
        ("--config flags.json", "flags.json"),
        ("--enable-auto-tool-choice", "--enable-auto-tool-choice requires --tool-call-parser"),
    ],
)
def test_wrong_flag_is_one_sentence_and_code_2(capsys, flags, said):
    with pytest.raises(SystemExit) as end:
        parse(flags.split())
    *usage, last = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert last.startswith("mikv-serve: error: ")
    assert said in last
    assert len(usage) <= 1


def test_wrong_value_in_the_file_is_named_by_its_flag(tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    file.write_text("kv-compression-ratio: .inf\n")
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    assert "--kv-compression-ratio: 'inf' is not allowed" in capsys.readouterr().err


def test_help_shows_our_options_in_their_own_group():
    text = make_parser().format_help()
    ours = text.partition("\nMiKV:\n")[2]
    assert all(flag in ours for flag in FLAGS.values())
    assert "--port" not in ours
