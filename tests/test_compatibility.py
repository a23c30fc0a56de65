"""A change of vLLM is reported at start-up, and the list of vLLM APIs is complete."""

import ast
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest

from mikv_vllm import compatibility
from mikv_vllm.vllm_api import MOVED, VLLM_API

from .sources import Function
from .vllm_usage import missing, unused, uses

VLLM = Path(find_spec("vllm").submodule_search_locations[0])
PACKAGE = Path(compatibility.__file__).parent


@pytest.fixture
def copied(tmp_path):
    """A copy of the files of vLLM that are in the list, for tests to change."""
    files = (*VLLM_API, *MOVED.values(), "_version.py")
    for file in (file for file in files if (VLLM / file).exists()):
        (tmp_path / "vllm" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(VLLM / file, tmp_path / "vllm" / file)
    return tmp_path / "vllm"


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_installed_vllm_has_all_listed_apis(copied):
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
def test_a_changed_api_is_named_in_one_sentence(copied, file, old, new, named):
    edit(copied / file, old, new)
    edit(copied / "_version.py", "version = '", "version = '9.")
    with pytest.raises(compatibility.Incompatible) as error:
        compatibility.check(copied)
    assert named in str(error.value)
    assert f"this is vLLM 9.{compatibility.version(VLLM)}" in str(error.value)
    assert f"install vLLM {compatibility.SUPPORTED}" in str(error.value)


@pytest.mark.parametrize(
    ("parameter", "is_change"),
    [("more: int = 0", False), ("*, more: int = 0", False), ("*, more: int", True)],
)
def test_only_a_parameter_without_a_default_is_a_change(copied, parameter, is_change):
    edit(
        copied / "v1/core/sched/scheduler.py",
        "throttle_prefills: bool = False",
        f"throttle_prefills: bool = False, {parameter}",
    )
    found = list(compatibility.changes(copied))
    assert found == ["v1/core/sched/scheduler.py: Scheduler.schedule"] * is_change


@pytest.mark.skipif(not (VLLM / min(MOVED)).exists(), reason="this vLLM has moved them")
def test_files_that_vllm_moved_in_0_33_are_found(copied):
    for old, new in MOVED.items():
        (copied / new).parent.mkdir(parents=True, exist_ok=True)
        (copied / old).rename(copied / new)
    compatibility.check(copied)


def test_a_missing_file_is_named(copied):
    file = "v1/worker/cpu_worker.py"
    (copied / file).unlink()
    assert list(compatibility.changes(copied)) == [f"{file}: {name}" for name in VLLM_API[file]]


@pytest.mark.parametrize(
    "command", [["-m", "mikv_vllm.server.cli"], ["-c", "from mikv_vllm import LLM"]]
)
def test_a_start_with_an_incompatible_vllm_ends_with_one_sentence(copied, command):
    edit(copied / "v1/core/block_pool.py", "class BlockPool", "class PagePool")
    # This vLLM precedes the installed one. It has only a few files, so importing it would fail.
    result = subprocess.run(
        [sys.executable, *command],
        env={"PYTHONPATH": f"{copied.parent}:{Path(__file__).parent.parent}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "v1/core/block_pool.py: BlockPool.evict_blocks (and 7 more) is missing" in last
    if "cli" in command[-1]:
        assert result.stderr.count("\n") == 1


def test_every_api_that_the_package_uses_is_listed():
    found = "\n".join(f"{file}: {name}" for file, name in missing(PACKAGE, VLLM, VLLM_API))
    assert not found, (
        "Add to mikv_vllm/vllm_api.py. If a method is replaced on an object of an unknown class, "
        f"annotate the parameter that is the object with its class.\n{found}"
    )


def test_every_listed_api_is_used():
    found = "\n".join(f"{file}: {name}" for file, name in unused(PACKAGE, VLLM, VLLM_API))
    assert not found, f"Remove from mikv_vllm/vllm_api.py:\n{found}"


def test_every_listed_function_has_parameters():
    without = []
    for file, names in VLLM_API.items():
        found = compatibility.definitions_in(VLLM, file)
        for name, parameters in names.items():
            node = found[name]
            if parameters is None and isinstance(node, Function):
                decorators = map(ast.unparse, node.decorator_list)
                if not any("property" in decorator for decorator in decorators):
                    without.append(f"{file}: {name}")
    assert without == []


MADE_UP = {
    "vllm/__init__.py": "from vllm.core import Base",
    "vllm/core.py": """
        class Root:
            limit: int = 0
            def run(self): ...
        class Base(Root):
            def __init__(self, pool: "Pool"):
                self.pool = pool
            def step(self, x): ...
        class Fast(Root):
            def step(self, x): ...
        class Pool:
            def take(self, n): ...
        def helper(a): ...
        """,
    "mikv_vllm/__init__.py": "",
    "mikv_vllm/uses.py": """
        from typing import TYPE_CHECKING
        from vllm import Base
        from vllm.core import Fast
        if TYPE_CHECKING:
            from vllm.core import Pool
        class Mixin:
            def step(self, x):
                return super().step(x)
        class TieredBase(Mixin, Base):
            limit = 1
            def grow(self):
                return self.pool.take(1)
        class TieredFast(Mixin, Fast):
            pass
        def late():
            from vllm import core
            return core.helper(1)
        """,
    "mikv_vllm/vllm_hooks.py": """
        from vllm.core import Pool
        from elsewhere import App
        def hook(pool: "Pool | None", other, app: App) -> None:
            def take(n): ...
            pool.take = take
            other.take = take
            app.take = take
        """,
}


@pytest.fixture
def made_up(tmp_path):
    """A small package and a small vLLM."""
    for file, text in MADE_UP.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(textwrap.dedent(text))
    return tmp_path / "mikv_vllm", tmp_path / "vllm"


def test_imports_overrides_replacements_and_calls_are_collected(made_up):
    assert uses(*made_up) == {
        ("__init__.py", "Base"),  # imported through a re-export, and where it is defined
        ("core.py", "Base"),
        ("core.py", "Fast"),
        ("core.py", "Pool"),  # imported for annotations only
        ("core.py", "helper"),  # imported inside a function, as a member of a module
        ("core.py", "Base.step"),  # overridden by a mixin
        ("core.py", "Fast.step"),
        ("core.py", "Root.limit"),  # overridden in a base of the base
        ("core.py", "Base.pool"),  # read
        ("core.py", "Pool.take"),  # called, and replaced
        ("method of an unknown class", "mikv_vllm.vllm_hooks: other.take"),
    }


def test_an_unlisted_and_an_unused_api_are_found(made_up):
    listed = {
        "__init__.py": {"Base": None},
        "core.py": dict.fromkeys(
            ("Base.step", "Base.pool", "Fast.step", "Root.limit", "Root.run", "helper")
        ),
    }
    assert missing(*made_up, listed) == [
        ("core.py", "Pool"),
        ("core.py", "Pool.take"),
        ("method of an unknown class", "mikv_vllm.vllm_hooks: other.take"),
    ]
    assert unused(*made_up, listed) == [("core.py", "Root.run")]
