"""The patches apply to the supported vLLM."""

import py_compile
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
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
    assert "offset" not in result.stderr, f"the patch was made for another vLLM: {result.stderr}"
    for path in paths:
        assert (tmp_path / path).read_text() != before[path]
        py_compile.compile(str(tmp_path / path), doraise=True)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_patch_states_the_gap_and_what_it_makes_unnecessary(patch):
    header, _, _ = patch.read_text().partition("--- a/")
    assert "The gap: " in header
    assert "With it: " in header
    for path in re.findall(r"mikv_vllm/\S+\.py", header):
        assert (ROOT / path).exists()
    assert f"`{patch.stem}`" in (ROOT / "patches/README.md").read_text()


def test_patches_that_hooks_name_exist():
    hooks = ROOT.glob("mikv_vllm/*/vllm_hooks.py")
    named = {name for path in hooks for name in re.findall(r"\b0\d{3}-[\w-]+", path.read_text())}
    assert named
    assert named <= {patch.stem for patch in PATCHES}
