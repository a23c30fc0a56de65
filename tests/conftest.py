"""Fixtures that tests of several layers share."""

import os
from pathlib import Path

import pytest

# Models come from the cache: a test must not wait for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def model_path() -> Path:
    """Folder of the embedded model, made on first use."""
    from mikv_vllm.models import embedded_model

    return embedded_model()
