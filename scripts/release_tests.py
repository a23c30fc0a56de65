"""Run tests on a release of vLLM for which there is no CPU build.

For example ``python scripts/release_tests.py 0.33.0 tests/engine/test_requests.py``. The Python
files are those of the release's source distribution; the compiled parts are those of the vLLM that
is installed. Engines and servers of the tests import this vLLM. Nothing is installed.

First it prints the operators of the release's CPU build that the compiled parts lack or take with
other parameters: models that need them cannot run. Without tests, it runs ``TESTS``. With
``--peer-tests`` it runs ``scripts/peer_tests`` instead.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

from vllm_source import FOLDER, unpacked

TESTS = (
    "tests/test_compatibility.py",
    *(
        f"tests/engine/test_{name}.py"
        for name in (
            "requests",
            "stock",
            "settings",
            "speculation",
            "block_statistics",
            "accounting",
        )
    ),
    *(f"tests/server/test_{name}.py" for name in ("wiring", "http", "clients")),
)
BINDINGS = "csrc/cpu/torch_bindings.cpp"
LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')
DEFINITION = re.compile(rf"ops\.def\(\s*((?:{LITERAL.pattern}\s*)+)")
"""A definition of an operator in C++, whose signature is one or more string literals."""


def installed_vllm() -> Path:
    """Return the folder of the installed vLLM."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("vLLM is not installed.")
    return Path(spec.submodule_search_locations[0])


def assembled(release: str, installed: Path, archive: Path | None = None) -> Path:
    """Return a folder for ``PYTHONPATH`` with the release as the distribution ``vllm``.

    Args:
        release: version of vLLM.
        installed: folder of the vLLM that has the compiled parts.
        archive: source distribution of the release; None to download it, once.
    """
    folder = (FOLDER / f"{release}-cpu").resolve()
    if folder.exists():
        return folder
    source = unpacked(release, "vllm", archive) / "vllm"
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial / "vllm")
    for path in installed.rglob("*.so"):
        shutil.copy(path, partial / "vllm" / path.relative_to(installed))
    # vLLM chooses its CPU platform by this version.
    described = partial / f"vllm-{release}.dist-info"
    described.mkdir()
    described.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.4\nName: vllm\nVersion: {release}+cpu\n"
    )
    (name, *_) = packages_distributions()["vllm"]
    entry_points = distribution(name).read_text("entry_points.txt")
    described.joinpath("entry_points.txt").write_text(entry_points or "")
    return partial.rename(folder)


def signatures(bindings: str) -> list[str]:
    """Return the signatures of the operators that a C++ file defines."""
    found = []
    for match in DEFINITION.finditer(bindings):
        found.append("".join(LITERAL.findall(match[1])).replace("\\", ""))
    return found


def differing_operators(wanted: list[str]) -> tuple[list[str], list[str]]:
    """Compare operators with those of the installed vLLM.

    Args:
        wanted: signatures of the release's operators.

    Returns:
        Names that are not compiled, and names that take other parameters.
    """
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    absent, other = [], []
    for signature in wanted:
        name = signature.partition("(")[0]
        operator = getattr(torch.ops._C, name, None)
        if operator is None:
            absent.append(name)
        elif operator.default._schema != torch._C.parse_schema(f"_C::{signature}"):
            other.append(name)
    return sorted(set(absent)), sorted(set(other))


def main() -> int:
    """Assemble the release, print what its compiled parts lack, and run tests."""
    parser = argparse.ArgumentParser(prog="release_tests", description=__doc__)
    parser.add_argument("release", help="version of vLLM")
    parser.add_argument("--sdist", type=Path, help="source distribution (default: download it)")
    parser.add_argument("--peer-tests", action="store_true", help="run vLLM's own tests")
    args, others = parser.parse_known_args()

    installed = installed_vllm()
    folder = assembled(args.release, installed, args.sdist)
    bindings = (unpacked(args.release, "csrc/cpu", args.sdist) / BINDINGS).read_text()
    absent, other = differing_operators(signatures(bindings))
    print(f"vLLM {args.release}, compiled parts of {installed}.")
    print(f"Operators that they lack, some of other processors: {', '.join(absent) or 'none'}.")
    print(f"Operators with other parameters: {', '.join(other) or 'none'}.", flush=True)

    if args.peer_tests:
        command = [sys.executable, "scripts/peer_tests", *others]
    elif any(argument.startswith("tests") for argument in others):
        command = [sys.executable, "-m", "pytest", *others]
    else:
        command = [sys.executable, "-m", "pytest", *TESTS, *others]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=os.environ | settings, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
