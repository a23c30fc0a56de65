"""What tests of several layers share."""

import os
import sys
from pathlib import Path

import pytest
import torch

# Models come from the cache: a test must not wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# vLLM's plugin in this folder is found here and in the engines that tests start.
PLUGINS = str(Path(__file__).parent / "plugins")
sys.path.append(PLUGINS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), PLUGINS]))

if (worker := int(os.environ.get("PYTEST_XDIST_WORKER", "gw-1")[2:])) >= 0:
    # Processes of tests side by side, and the engines that they start: each has its own CPUs.
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cpus = sorted(os.sched_getaffinity(0))
    share = cpus[worker * len(cpus) // count : (worker + 1) * len(cpus) // count]
    if share:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, share))
        os.environ["OMP_NUM_THREADS"] = str(len(share))
        torch.set_num_threads(len(share))

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        # Kernels run in Triton's interpreter. It is chosen when a function is decorated, Triton's
        # own among them: so before anyone imports it. Engines that tests start do not see this.
        patch.setenv("TRITON_INTERPRET", "1")
        import mikv_vllm.kernels.triton  # noqa: F401


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Folder of the embedded model, made on first use."""
    from mikv_vllm.models import embedded_model

    return embedded_model()
