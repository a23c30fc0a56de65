"""Development tools have one version each, and the build takes what it needs from where it says."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DEV = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
    "dev"
]
HOOKS = {
    repo["repo"].rpartition("/")[2]: repo.get("rev", "")
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
}


@pytest.mark.parametrize(
    ("tool", "hook"), [("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")]
)
def test_a_tool_has_one_version(tool, hook):
    (pinned,) = [line.partition("==")[2] for line in DEV if line.startswith(f"{tool}==")]
    assert HOOKS[hook] == f"v{pinned}"


def test_the_format_of_cpp_names_its_version():
    first = (ROOT / ".clang-format").read_text().splitlines()[0]
    assert first.removeprefix("# ") in DEV


def test_ci_runs_the_linters_and_the_tests():
    script = (ROOT / ".ci/run").read_text()
    assert "make lint" in script
    assert "make test" in script
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert {"make lint", "make test", "python -m build"} <= set(commands)


def test_scripts_that_the_makefile_names_exist():
    for path in re.findall(r"scripts/\w+\.py", (ROOT / "Makefile").read_text()):
        assert (ROOT / path).exists()
