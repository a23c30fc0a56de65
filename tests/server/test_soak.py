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


def test_mixed_requests_in_a_small_pool_leave_nothing_behind(server):
    soak = Soak(server.url, server.process.pid)
    outcome = asyncio.run(soak.run(seed=1, count=80, concurrency=24, seconds=240))
    print(outcome.summary())
    assert not outcome.violations
    # It is no soak unless what the pool's size should bring about came about. Preemptions are too
    # few among so few requests to count on one.
    assert outcome.finished
    assert outcome.refused
    assert outcome.disconnected
    assert outcome.operations["compress"] > outcome.operations["compress_in_place"] > 0
    assert outcome.operations["demote"]
