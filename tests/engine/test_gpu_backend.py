"""The GPU backend, its metadata builder and both model runners of vLLM, on CPU tensors.

Triton's interpreter runs vLLM's kernels and ours. The results are compared with the CPU backend.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from .generated import save_model

pytestmark = pytest.mark.engine

SAME = 1e-4
"""Largest KL divergence, in nats, that rounding alone causes."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128}
    return save_model(folder, "Llama", num_hidden_layers=2, **shape)


@pytest.fixture(scope="module")
def predict(model, tmp_path_factory):
    """A function that returns the predictions of an engine for a batch. Each engine runs once."""
    folder, known = tmp_path_factory.mktemp("predicted"), {}

    def run(backend, runner, batch):
        if (key := (backend, runner, batch)) not in known:
            known[key] = run_module("interpreted", model, *key, folder / "-".join(key))
        return known[key]

    return run


def run_module(name, *arguments):
    """Run a module of this folder, and return the JSON that it writes to its last argument."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.engine.{name}", *arguments],
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(arguments[-1].read_text())


def divergences(run, reference):
    """Mean KL divergence of each request, up to the first token that differs."""
    for one, expected in zip(run["requests"], reference["requests"], strict=True):
        pairs = list(zip(one["tokens"], expected["tokens"], strict=True))
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs) - 1)
        p, q = (np.array(r["log_probs"][: same + 1]) for r in (expected, one))
        assert same >= len(pairs) // 2
        yield (np.exp(p) * (p - q)).sum(1).mean()


@pytest.mark.parametrize(
    ("runner", "batch"),
    [
        pytest.param("1", "in place", marks=pytest.mark.slow),
        ("2", "in place"),
        ("2", "long"),
        pytest.param("1", "blocks", marks=pytest.mark.slow),
    ],
)
def test_gpu_backend_predicts_like_the_cpu_backend(predict, runner, batch):
    run, reference = predict("triton", runner, batch), predict("cpu", "1", batch)
    assert run["operations"] == reference["operations"]
    assert bool(run["operations"]["compress_in_place"]) == (batch == "in place")
    assert run["operations"]["demote"] or batch == "blocks"
    assert [r["report"] for r in run["requests"]] == [r["report"] for r in reference["requests"]]
    assert all(r["report"]["low_tokens"] for r in run["requests"][1:])
    assert max(divergences(run, reference)) < SAME


@pytest.mark.slow
def test_v2_model_runner_predicts_like_the_v1_runner(predict):
    run, reference = predict("cpu", "2", "many"), predict("cpu", "1", "many")
    assert run["operations"] == reference["operations"]
    assert run["operations"]["demote"]
    assert max(divergences(run, reference)) < SAME


def test_the_warm_up_compiles_every_kernel_that_is_launched_later(model, tmp_path):
    counts = run_module("launched", model, tmp_path / "counts.json")
    assert len(counts["warm_up"]) == 16
    assert set(counts["warm_up"].values()) == {1}
    assert counts["later"].keys().isdisjoint(counts["warm_up"])
    # The others are of the prefix cache and launch no kernel.
    launched = ("compress", "compress_in_place", "demote")
    assert all(counts["operations"][name] for name in launched)
