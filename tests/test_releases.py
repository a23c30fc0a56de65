"""The scripts that compare a release of vLLM with MiKV's list, and that run tests on it."""

import io
import os
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from mikv_vllm.vllm_api import MOVED, VLLM_API

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
VLLM = Path(find_spec("vllm").submodule_search_locations[0])
BINDINGS = """
ops.def("rotary_embedding(Tensor positions, Tensor! query) -> ()");
ops.def(
    "made_up(Tensor! out, str kind=\\"plain\\", "
    "int size) -> Tensor");
"""


def sdist(folder: Path, files: dict[str, str]) -> Path:
    """A source distribution of a made-up release."""
    path = folder / "vllm-99.0.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"vllm-99.0.0/{name}")
            entry.size = len(text.encode())
            tar.addfile(entry, io.BytesIO(text.encode()))
    return path


def run(script: str, folder: Path, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, SCRIPTS / script, "99.0.0", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def listed() -> dict[str, str]:
    """The files of vLLM that are in the list, by name."""
    files = [file for file in (*VLLM_API, *MOVED.values()) if (VLLM / file).exists()]
    return {f"vllm/{file}": (VLLM / file).read_text() for file in files}


def test_a_made_up_change_of_vllm_is_named(listed, tmp_path):
    pool = listed["vllm/v1/core/block_pool.py"]
    scheduler = listed["vllm/v1/core/sched/scheduler.py"]
    changed = {
        "vllm/v1/core/block_pool.py": pool.replace("def evict_blocks(", "def drop_blocks("),
        "vllm/v1/core/evicting.py": "class BlockPool:\n    def evict_blocks(self): ...\n",
        "vllm/v1/core/sched/scheduler.py": scheduler.replace(
            "throttle_prefills: bool = False", "throttle_prefills: bool = True"
        ),
    }
    archive = sdist(tmp_path, listed | changed)
    result = run("vllm_release.py", tmp_path, "--sdist", str(archive))
    assert result.returncode == 1, result.stderr
    missing, *_, summary = result.stdout.splitlines()
    assert missing == (
        "missing or other parameters: v1/core/block_pool.py: BlockPool.evict_blocks; "
        "defined in: v1/core/evicting.py"
    )
    assert "   2 lines differ: v1/core/sched/scheduler.py: Scheduler.schedule(" in result.stdout
    assert "1 are missing or have other parameters" in summary


def test_an_unchanged_release_has_no_difference(listed, tmp_path):
    result = run("vllm_release.py", tmp_path, "--sdist", str(sdist(tmp_path, listed)))
    assert result.returncode == 0, result.stdout
    assert "0 are missing or have other parameters; the code of 0 differs" in result.stdout


def test_tests_run_on_the_python_of_a_release_and_see_its_version(tmp_path):
    files = {"vllm/__init__.py": "MADE_UP = 'release'", "csrc/cpu/torch_bindings.cpp": BINDINGS}
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_import.py").write_text(
        "from importlib.metadata import entry_points, version\n"
        "from pathlib import Path\n"
        "import vllm\n"
        "def test_import():\n"
        "    assert vllm.MADE_UP == 'release'\n"
        "    assert version('vllm') == '99.0.0+cpu'\n"
        "    assert entry_points(group='vllm.general_plugins')\n"
        "    assert list(Path(vllm.__file__).parent.glob('*.so'))\n"
    )
    archive = sdist(tmp_path, files)
    result = run("release_tests.py", tmp_path, "--sdist", str(archive), "tests/test_import.py")
    assert "1 passed" in result.stdout, result.stdout + result.stderr
    assert "Operators that they lack, some of other processors: made_up." in result.stdout
    assert "Operators with other parameters: rotary_embedding." in result.stdout
