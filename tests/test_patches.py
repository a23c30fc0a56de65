"""The patches fit the supported vLLM."""

import py_compile
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

PATCHES = sorted((Path(__file__).parent.parent / "patches").glob("*.patch"))
VLLM = Path(find_spec("vllm").submodule_search_locations[0])


@pytest.mark.skipif(shutil.which("git") is None, reason="git applies the patches")
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patch_applies_and_compiles(patch, tmp_path):
    paths = re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(), re.MULTILINE)
    assert paths
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(VLLM.parent / path, tmp_path / path)
    before = {path: (tmp_path / path).read_text() for path in paths}
    result = subprocess.run(
        ["git", "apply", "--verbose", patch],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "offset" not in result.stderr, f"made against another vLLM: {result.stderr}"
    for path in paths:
        assert (tmp_path / path).read_text() != before[path]
        py_compile.compile(str(tmp_path / path), doraise=True)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patch_says_why(patch):
    header, _, _ = patch.read_text().partition("--- a/")
    assert "The gap: " in header
    assert "With it: " in header
    for path in re.findall(r"mikv_vllm/\S+\.py", header):
        assert (Path(__file__).parent.parent / path).exists()
    assert patch.stem in (patch.parent / "README.md").read_text()
