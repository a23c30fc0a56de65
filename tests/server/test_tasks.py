"""``mikv-eval tasks`` against real servers with the embedded model."""

import csv
import json

import pytest

from mikv_vllm.evaluation import cli
from mikv_vllm.evaluation.served_tasks.results import FILE

from .serving import RunningServer

pytestmark = pytest.mark.engine

FLAGS = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(400 << 20), "--enforce-eager"]
TASKS = ["needles", "documents", "json", "instructions", "long-answers"]
"""Those that need no data of other packages."""


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with RunningServer([*FLAGS, "--enable-prompt-tokens-details"], log) as running:
        yield running


@pytest.fixture(scope="module")
def quick(server, tmp_path_factory):
    """The folder of a quick run, and its command."""
    out = tmp_path_factory.mktemp("tasks")
    command = ["tasks", "--url", server.url, "--quick", "--ratios", "4", "1", "--out", str(out)]
    command += ["--tasks", *TASKS]
    assert cli.main(command) == 0
    return out, command


def lines(out) -> list[dict]:
    return [json.loads(line) for line in (out / FILE).read_text().splitlines()]


def test_every_question_is_answered_at_every_ratio(quick):
    out, _ = quick
    counted = {(task, ratio): 0 for task in TASKS for ratio in (1.0, 4.0)}
    for line in lines(out):
        counted[line["task"], line["ratio"]] += 1
    assert counted == {key: 1 if key[0] == "long-answers" else 3 for key in counted}
    for line in lines(out):
        assert line["report"]["requested_ratio"] == line["ratio"]
        assert 0.0 <= line["accuracy"] <= 1.0
        assert line["text"]


def test_the_report_has_ratios_bytes_intervals_and_differences(quick):
    out, _ = quick
    report = (out / "report.md").read_text()
    assert "## Long answers" in report
    assert "## Kinds of questions" in report
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert {row["task"] for row in rows} == {*TASKS, "all tasks"}
    for row in rows:
        assert float(row["accuracy_low"]) <= float(row["accuracy"]) <= float(row["accuracy_high"])
        if row["ratio"] == "1.0":
            assert (float(row["achieved"]), row["difference"]) == (1.0, "")
        else:
            low, high = float(row["difference_low"]), float(row["difference_high"])
            assert low < high
    (needles,) = [r for r in rows if (r["task"], r["kind"], r["ratio"]) == ("needles", "", "4.0")]
    assert float(needles["achieved"]) > 2.5


def test_structured_output_is_always_valid(quick):
    out, _ = quick
    structured = [line for line in lines(out) if line["kind"] == "structured output"]
    assert {line["ratio"] for line in structured} == {1.0, 4.0}
    assert all(line["valid"] for line in structured)


def test_questions_about_a_document_read_blocks_that_were_there_before(quick):
    out, _ = quick
    for line in lines(out):
        if line["task"] == "documents" and line["ratio"] == 4.0:
            assert line["report"]["reused_tokens"] > 0.9 * line["prompt_tokens"]


def test_other_questions_compress_their_own_prompt(quick):
    out, _ = quick
    for line in lines(out):
        if line["task"] != "documents":
            assert line["report"]["reused_tokens"] == 0


def test_an_interrupted_run_continues(quick, capsys):
    out, command = quick
    path = out / FILE
    before = path.read_text().splitlines()
    report = (out / "report.md").read_text()
    path.write_text("\n".join(before[:-2]) + "\n" + before[-2][:40])
    assert cli.main(command) == 0
    again = path.read_text().splitlines()
    assert len(again) == len(before)
    assert again[:-2] == before[:-2]
    assert cli.main(command) == 0
    assert path.read_text().splitlines() == again
    assert (out / "report.md").read_text().count("\n") == report.count("\n")
    assert "| needles | 3 | 4 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ratios", "0.5"], "--ratios: 0.5 is out of range; give ratios from 1 on"),
        (["--ratios", "99"], "which is out of range; allowed is a number from 1.0"),
        (
            ["--lengths", "9000"],
            "--lengths: a prompt of 9000 tokens does not fit into the server's",
        ),
        (["--tasks", "code"], "--tasks code runs code that the model writes; add --run-generated"),
        (["--served-model-name", "other"], "--served-model-name: other is not served; choose from"),
        (
            ["--url", "http://127.0.0.1:9"],
            "--url: the server at http://127.0.0.1:9 does not answer",
        ),
    ],
)
def test_wrong_arguments_get_a_sentence(server, tmp_path, capsys, flags, message):
    command = ["tasks", "--url", server.url, "--tasks", "needles", "--count", "1"]
    command += ["--lengths", "512", "--out", str(tmp_path)]
    assert cli.main([*command, *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_model_is_served_for_the_run_and_stopped_after_it(tmp_path, model_path, capsys):
    command = ["tasks", "--model", str(model_path), "--tasks", "needles", "--count", "1"]
    command += ["--lengths", "512", "--ratios", "1", "4", "--out", str(tmp_path)]
    memory = str(200 << 20)
    flags = f"--enforce-eager --kv-cache-memory-bytes {memory}"
    assert cli.main([*command, "--server-flags", flags]) == 0
    assert "| needles | 1 | 4 |" in capsys.readouterr().out
    assert "Application shutdown complete" in (tmp_path / "server.log").read_text()


def test_a_server_that_does_not_start_shows_the_end_of_its_log(tmp_path, capsys):
    command = ["tasks", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path)]
    assert cli.main([*command, "--tasks", "needles"]) == 2
    error = capsys.readouterr().err
    assert "mikv-serve did not start" in error
    assert "nothing" in error
