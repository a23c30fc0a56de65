"""What tests of several layers share."""

import os
from pathlib import Path

import pytest
import torch

# Models come from the cache: a test must not wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
