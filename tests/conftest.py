"""Triton's kernels run in its interpreter where there is no GPU."""

import pytest
import torch

if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        # Read when a function is decorated, Triton's own among them: so before anyone imports it.
        # Engines that tests start do not see it.
        patch.setenv("TRITON_INTERPRET", "1")
        import mikv_vllm.kernels.triton  # noqa: F401
