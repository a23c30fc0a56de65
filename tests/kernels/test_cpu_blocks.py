"""The fused decode step on the CPU over requests of several blocks, compared with the oracle."""

import pytest
import torch

from mikv_vllm.kernels import cpu

from .block_requests import REQUESTS, BlockStep
from .cpu_layer import DECAY, RECENT, layer
from .test_cpu_decode import assert_close_attention
from .tiered_cache import Shape

pytestmark = pytest.mark.usefixtures("isa")


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        (Shape(), {}),
        (Shape(64, queries_per_kv_head=8, kv_heads=1, dtype=torch.float16), {"sinks": True}),
        (Shape(80, queries_per_kv_head=5, block_size=32), {"softcap": 8.0}),
        (Shape(128, queries_per_kv_head=6, kv_heads=1, high_bits=16), {}),
    ],
)
@pytest.mark.parametrize(
    "requests", [REQUESTS, REQUESTS[:1], REQUESTS[2:3], [REQUESTS[0], REQUESTS[0]]]
)
def test_a_request_of_several_blocks(shape, kwargs, requests, threads):
    kwargs = dict(kwargs)
    if kwargs.get("sinks"):
        kwargs["sinks"] = 2 * torch.randn(shape.heads)
    step = BlockStep(shape, requests)
    out = torch.full_like(step.q, 7.0)
    batch = cpu.DecodeBatch.build(step.rows)
    layer(shape, **kwargs).decode(step.pages, batch, step.q, step.k, step.v, out)
    assert (out[0] == 7.0).all()

    def assert_close(ours, expected):
        assert_close_attention(ours, expected, shape.dtype)

    step.check(out, assert_close, DECAY, RECENT, **kwargs)
