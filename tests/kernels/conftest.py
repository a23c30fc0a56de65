"""What all kernel tests share."""

import pytest
import torch


def pytest_generate_tests(metafunc):
    """A test that uses ``isa`` runs once for each that this machine has."""
    if "isa" in metafunc.fixturenames:
        # Not at the top: Triton's tests also run where the CPU kernels are not compiled.
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
    """How many threads torch and the CPU kernels use."""
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
    """Where Triton's kernels run: on a GPU where there is one, else in the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"
