"""``mikv-eval curve --quick`` on the embedded model."""

import csv
import json

import pytest

from mikv_vllm.evaluation import cli, lab
from mikv_vllm.evaluation.reference_model import ReferenceModel
from mikv_vllm.evaluation.tasks import TASKS, windows_of

METHODS = ["MiKV for vLLM", "H2O", "per-token"]


@pytest.fixture(scope="module")
def model(model_path):
    return ReferenceModel(model_path)


@pytest.fixture(scope="module")
def quick(model_path, tmp_path_factory):
    """The folder of a quick run, its command, and its summaries by task and method."""
    out = tmp_path_factory.mktemp("curve")
    command = ["curve", "--quick", "--out", str(out), "--ratios", "4", "--model", str(model_path)]
    assert cli.main([*command, "--methods", *METHODS, "--tasks", "text", "copying"]) == 0
    summaries = {(s.task, s.family, s.setting): s for s in lab.summarize(lab.load(out))}
    return out, command, summaries


def test_a_quick_run_writes_every_report(quick):
    out, _, summaries = quick
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert len(rows) == len(summaries) == 2 * (1 + 1 + 1 + 3)
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert page.count("<table>") == page.count("</table>") == 2
    assert all(name in page and name in (out / "report.md").read_text() for name in METHODS)
    assert (out / "chart.svg").stat().st_size > 10_000


def test_an_interrupted_run_continues(quick, capsys):
    out, command, _ = quick
    path = out / "results.jsonl"
    whole = path.read_text()
    lines = whole.splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    assert cli.main([*command, "--methods", *METHODS, "--tasks", "text", "copying"]) == 0
    again = [json.loads(line) for line in path.read_text().splitlines()]
    for mine, theirs in zip(again, map(json.loads, lines), strict=True):
        assert mine["family"] == theirs["family"]
        assert mine["divergence"] == pytest.approx(theirs["divergence"], rel=1e-4, abs=1e-9)


def test_keeping_all_tokens_is_better_than_eviction(quick):
    _, _, summaries = quick
    for task in ("text", "copying"):
        ours = summaries[task, "MiKV for vLLM", "ratio 4"]
        dropped = summaries[task, "H2O", "ratio 4"]
        assert ours.divergence < 0.2 * dropped.divergence
    uncompressed = summaries["copying", lab.UNCOMPRESSED, ""]
    assert uncompressed.accuracy > 0.8
    assert summaries["copying", "MiKV for vLLM", "ratio 4"].accuracy > uncompressed.accuracy - 0.1
    assert summaries["copying", "H2O", "ratio 4"].accuracy < 0.5


def test_an_untouched_cache_gives_the_predictions_of_the_model(model):
    (window,) = windows_of("text", model.tokenizer, 1, 200, 20)
    prefill = model.prefill(window.prompt)
    tokens = window.inputs
    ours = model.continue_with(prefill, tokens, None).log_probs
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = plain(torch.tensor([window.prompt + window.continuation[:-1]])).logits[0]
    expected = logits[len(window.prompt) - 1 :].log_softmax(-1)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_windows_are_the_same_every_time(model, task):
    first, again = (windows_of(task, model.tokenizer, 3, 400, 32) for _ in range(2))
    assert first == again
    assert [len(window.prompts[-1]) for window in first] == [400] * 3
    assert len({tuple(window.prompts[-1]) for window in first}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ratios", "9"], "--ratios: 9 is out of range; give ratios above 1, up to 6.7"),
        (["--ratios", "1"], "--ratios: 1 is out of range"),
        (["--methods", "magic"], "--methods: unknown names magic; choose from "),
        (["--prompt", "90000"], "8 windows of 90000 + 256 tokens do not fit into a text of "),
        (["--tasks", "copying", "--prompt", "50"], "a prompt of 50 tokens cannot hold"),
        (
            ["--tasks", "magic"],
            "--tasks: magic is neither a file nor one of the tasks text, passkey, ",
        ),
    ],
)
def test_wrong_arguments_get_a_sentence(model_path, tmp_path, capsys, arguments, message):
    command = ["curve", "--model", str(model_path), "--out", str(tmp_path / "out"), *arguments]
    assert cli.main(command) == 2
    assert message in capsys.readouterr().err


def test_a_task_can_be_a_file(model, tmp_path):
    path = tmp_path / "capitals.jsonl"
    path.write_text('{"prompt": "The capital of France is", "answer": " Paris"}\n' * 2)
    windows = windows_of(str(path), model.tokenizer, 2, 0, 0)
    assert model.tokenizer.decode(windows[1].prompt) == "The capital of France is"
    assert model.tokenizer.decode(windows[1].continuation) == " Paris"
    assert len(windows_of(str(path), model.tokenizer, 8, 0, 0)) == 2
    path.write_text('{"prompt": "The capital of France is"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .* is not"):
        windows_of(str(path), model.tokenizer, 1, 0, 0)
