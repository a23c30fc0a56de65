"""Benchmarks and evaluation harnesses against one real server: each sets a ratio for all requests.

They keep no report, so the server's statistics show whether requests were compressed.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from .client_calls import MODEL, QUESTION
from .serving import RunningServer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SAID = "kv_compression_ratio is 99, which is out of range"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
"""
"""What ``vllm bench serve`` runs. The command itself needs a distribution named ``vllm``."""
TASK = """
task: foxes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: jumps
generation_kwargs: {{until: ["unused"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


class Run(NamedTuple):
    """One run of a harness with two requests."""

    output: str
    returncode: int
    compressed: int
    """Requests that the server compressed."""
    texts: list[str]
    """Generated texts, for harnesses that store them."""


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    flags = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(300 << 20)]
    with RunningServer(flags, log) as running:
        yield running


def run(server: RunningServer, command: list[str], folder: Path, texts=lambda: []) -> Run:
    def compressed() -> int:
        return server.client.get("/mikv/stats").json()["operations"]["compress"]

    before = compressed()
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | OFFLINE,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    output = result.stdout + result.stderr
    return Run(output, result.returncode, compressed() - before, texts())


def bench_serve(server: RunningServer, model_path: Path, folder: Path, ratio: dict) -> Run:
    command = ["-c", BENCH_SERVE, "--base-url", server.url, "--model", MODEL]
    command += ["--tokenizer", str(model_path), "--dataset-name", "random", "--num-prompts", "2"]
    command += ["--random-input-len", "600", "--random-output-len", "4"]
    return run(server, [*command, "--extra-body", json.dumps(ratio)], folder)


def guidellm(server: RunningServer, model_path: Path, folder: Path, ratio: dict) -> Run:
    backend = {"kind": "openai_http", "target": server.url, "model": MODEL}
    backend |= {"request_format": "/v1/completions", "extras": {"body": ratio}}
    command = ["-m", "guidellm", "run", "--backend", json.dumps(backend), "--disable-progress"]
    command += ["--profile", "kind=synchronous", "--constraint", "kind=max_requests,count=2"]
    command += ["--tokenizer", f"kind=hf_auto,model={model_path}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=600,output_tokens=4"]
    command += ["--output", f"kind=json,path={folder / 'report.json'}"]

    def texts() -> list[str]:
        (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
        return [request["output"] for request in benchmark["requests"]["successful"]]

    return run(server, command, folder, texts)


def lm_eval(server: RunningServer, model_path: Path, folder: Path, ratio: dict, kind: str) -> Run:
    rows = [{"question": f"{row}. {QUESTION}"} for row in range(2)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "foxes.yaml").write_text(TASK.format(data=data))
    route = "chat/completions" if "chat" in kind else "completions"
    model = f"model={MODEL},base_url={server.url}/v1/{route},max_retries=1"
    model += f",tokenizer_backend=huggingface,tokenizer={model_path},tokenized_requests=False"
    command = ["-m", "lm_eval", "--model", kind, "--model_args", model]
    command += ["--tasks", "foxes", "--include_path", str(folder), "--log_samples"]
    command += ["--output_path", str(folder / "out"), "--gen_kwargs"]
    command.append(",".join(f"{name}={value}" for name, value in ratio.items()) or "seed=1234")
    command += ["--apply_chat_template"] * ("chat" in kind)

    def texts() -> list[str]:
        samples = [path.read_text() for path in folder.rglob("samples_foxes_*.jsonl")]
        return [json.loads(line)["resps"][0][0] for text in samples for line in text.splitlines()]

    return run(server, command, folder, texts)


def lm_eval_completions(*args) -> Run:
    return lm_eval(*args, "local-completions")


def lm_eval_chat(*args) -> Run:
    return lm_eval(*args, "local-chat-completions")


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


HARNESSES = pytest.mark.parametrize(
    "harness",
    [
        bench_serve,
        pytest.param(guidellm, marks=needs("guidellm")),
        pytest.param(lm_eval_completions, marks=needs("lm_eval")),
        pytest.param(lm_eval_chat, marks=needs("lm_eval")),
    ],
)


@HARNESSES
def test_it_sets_a_ratio(server, model_path, tmp_path, harness):
    result = harness(server, model_path, tmp_path, {"kv_compression_ratio": 4})
    assert result.returncode == 0, result.output
    assert result.compressed >= 2


@HARNESSES
def test_it_shows_that_a_wrong_ratio_is_refused(server, model_path, tmp_path, harness):
    result = harness(server, model_path, tmp_path, {"kv_compression_ratio": 99})
    assert result.compressed == 0
    assert result.texts == []
    if harness is guidellm:
        assert "400 Bad Request" in (tmp_path / "report.json").read_text()
    elif harness is bench_serve:
        assert "Bad Request" in result.output
    else:
        assert SAID in result.output


@HARNESSES
def test_ratio_1_changes_nothing(server, model_path, tmp_path, harness):
    (tmp_path / "unset").mkdir()
    (tmp_path / "set").mkdir()
    unset = harness(server, model_path, tmp_path / "unset", {})
    same = harness(server, model_path, tmp_path / "set", {"kv_compression_ratio": 1})
    assert unset.returncode == same.returncode == 0, unset.output + same.output
    assert unset.compressed == same.compressed == 0
    assert same.texts == unset.texts
