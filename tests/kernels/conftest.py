"""What all kernel tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def device(monkeypatch):
    """Where Triton's kernels run: on a GPU where there is one, else in the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
