"""A vLLM that moved is found before it does harm."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mikv_vllm import compatibility

VLLM = Path(find_spec("vllm").submodule_search_locations[0])


@pytest.fixture
def copied(tmp_path):
    """A folder like vLLM's with the files that are relied on, to change."""
    for file in (*compatibility.RELIED_ON, "_version.py"):
        (tmp_path / "vllm" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(VLLM / file, tmp_path / "vllm" / file)
    (tmp_path / "vllm/__init__.py").touch()
    return tmp_path / "vllm"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_installed_vllm_has_all_that_is_relied_on(copied):
    compatibility.check()
    compatibility.check(copied)


@pytest.mark.parametrize(
    ("file", "old", "new", "named"),
    [
        (
            "v1/core/sched/scheduler.py",
            "def _reserve_prefill_lookahead(",
            "def _reserve_lookahead(",
            "Scheduler._reserve_prefill_lookahead",
        ),
        (
            "v1/core/sched/scheduler.py",
            "throttle_prefills: bool = False",
            "budget: int, throttle_prefills: bool = False",
            "Scheduler.schedule",
        ),
        ("v1/metrics/stats.py", "kv_connector_stats:", "other_stats:", "kv_connector_stats"),
        ("v1/core/block_pool.py", "class BlockPool", "class PagePool", "BlockPool.evict_blocks"),
    ],
)
def test_what_moved_is_named_in_one_sentence(copied, file, old, new, named):
    edit(copied / file, old, new)
    edit(copied / "_version.py", "version = '", "version = '9.")
    with pytest.raises(compatibility.Incompatible) as error:
        compatibility.check(copied)
    assert named in str(error.value)
    assert "this is 9.0.32.0" in str(error.value)
    assert f"install vLLM {compatibility.SUPPORTED}.x" in str(error.value)


def test_a_parameter_with_a_default_is_no_change(copied):
    edit(
        copied / "v1/core/sched/scheduler.py",
        "throttle_prefills: bool = False",
        "throttle_prefills: bool = False, more: int = 0",
    )
    compatibility.check(copied)


def test_a_missing_file_is_named(copied):
    (copied / "v1/worker/cpu_worker.py").unlink()
    assert list(compatibility.changes(copied)) == ["v1/worker/cpu_worker.py: CPUWorker.init_device"]


@pytest.mark.parametrize(
    "command", [["-m", "mikv_vllm.server.cli"], ["-c", "from mikv_vllm import LLM"]]
)
def test_a_start_with_another_vllm_ends_with_the_sentence(copied, command):
    edit(copied / "v1/core/block_pool.py", "class BlockPool", "class PagePool")
    # In front of the installed one; importing it would fail, it is a few files.
    result = subprocess.run(
        [sys.executable, *command],
        env={"PYTHONPATH": f"{copied.parent}:{Path(__file__).parent.parent}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "v1/core/block_pool.py: BlockPool.evict_blocks (and 3 more) is missing" in last
    if "cli" in command[-1]:
        assert result.stderr.count("\n") == 1
