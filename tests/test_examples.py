"""Every example, and the README's own, runs and prints what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.serving import RunningServer

pytestmark = pytest.mark.engine

FOLDER = Path(__file__).parent.parent / "examples"
FLAGS = ["--max-model-len", "4096", "--kv-cache-memory-bytes", str(200 << 20), "--enforce-eager"]
EXPECTED = {
    "http_client.py": ["'requested_ratio': 4.0"],
    "streaming.py": ["'requested_ratio': 3.0"],
    "tools_and_json.py": ["tool call: weather ", "JSON: {'city': '"],
    "ratio_by_request.py": ["requested  achieved  tokens  bytes", "      4.0 "],
    "quality_check.py": ["| 4"],
    "langchain_client.py": ["'requested_ratio': 4.0"],
    "litellm_client.py": ["'requested_ratio': 4.0"],
}
"""What each script prints, beside other things; all of them but ``offline.py`` need a server."""


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    flags = [*FLAGS, "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with RunningServer(flags, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


def run(name: str, **env: str) -> str:
    """What an example prints."""
    result = subprocess.run(
        [sys.executable, FOLDER / name],
        env=os.environ | env,
        cwd=FOLDER.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_with_a_server(server, name):
    printed = run(name, MIKV_URL=f"{server.url}/v1")
    for expected in EXPECTED[name]:
        assert expected in printed


def test_the_offline_example(model_path):
    printed = run("offline.py")
    assert "ratio 1:" in printed
    assert "ratio 4:" in printed


def blocks_of_the_readme(language: str) -> list[str]:
    text = (FOLDER.parent / "README.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_curl_of_the_readme_returns_the_report_that_it_shows(server):
    (command,) = [code for code in blocks_of_the_readme("bash") if code.startswith("curl")]
    command = command.replace("http://localhost:8000", server.url)
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    report = json.loads(result.stdout)["kv_compression"]
    (shown,) = blocks_of_the_readme("json")
    assert json.loads(shown) == {name: report[name] for name in json.loads(shown)}


def test_the_python_of_the_readme(tmp_path, model_path):
    (code,) = blocks_of_the_readme("python")
    script = tmp_path / "readme.py"
    script.write_text(code.replace("LLM(", "LLM(enforce_eager=True, max_model_len=4096, "))
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "'requested_ratio': 4.0" in result.stdout


def test_every_example_is_run_and_described():
    names = {path.name for path in FOLDER.glob("*.py")}
    assert names == {*EXPECTED, "offline.py"}
    readme = (FOLDER / "README.md").read_text()
    assert all(f"[`{name}`]({name})" in readme for name in names)
