"""A short soak; ``python -m benchmarks.soak`` is the long one."""

import asyncio

import pytest

from benchmarks.soak import SMALL_POOL_FLAGS, Soak

from .serving import RunningServer

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def server(tmp_path_factory, model_path):
    with RunningServer(SMALL_POOL_FLAGS, tmp_path_factory.mktemp("soak") / "log.txt") as running:
        yield running


@pytest.mark.slow
def test_mixed_requests_in_a_small_pool_leave_no_pages_allocated(server):
    soak = Soak(server.url, server.process.pid)
    outcome = asyncio.run(soak.run(seed=1, count=80, concurrency=24, seconds=240))
    print(outcome.summary())
    assert not outcome.violations
    # The test is only meaningful if the small pool caused these operations. Preemptions are not
    # checked: they are too rare among so few requests.
    assert outcome.finished
    assert outcome.refused
    assert outcome.disconnected
    assert outcome.operations["compress"] > outcome.operations["compress_in_place"] > 0
    assert outcome.operations["demote"]
