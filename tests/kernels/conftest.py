"""Fixtures of the kernel tests."""

import pytest
import torch


def pytest_generate_tests(metafunc):
    """Run a test that uses ``isa`` once for each instruction set of this machine."""
    if "isa" in metafunc.fixturenames:
        # Imported here, because the Triton tests also run without compiled CPU kernels.
        from mikv_vllm.kernels import cpu

        metafunc.parametrize("isa", cpu.isas(), indirect=True)


@pytest.fixture
def isa(request):
    """The instruction set that the CPU kernels use."""
    from mikv_vllm.kernels import cpu

    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(cpu.isas()[0])


@pytest.fixture(params=[1, 2])
def threads(request):
    """Number of threads of torch and the CPU kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture
def device(monkeypatch):
    """Device of the Triton kernels: a GPU if there is one, else the CPU with the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
