"""The decode step in Triton over requests of several blocks, compared with the oracle."""

import pytest
import torch

from mikv_vllm.kernels import triton as kernels

from .block_requests import SHORT_REQUESTS, BlockStep
from .tiered_cache import Shape
from .triton_layer import DECAY, RECENT, empty_batch, fill_batch, layer


def assert_close(ours, expected):
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-3


def decode(step, ops, batch, device):
    """Run the step on ``step.pages``, and return the output."""
    # float32, because the interpreter truncates sums to bf16.
    out = torch.full(step.q.shape, 7.0, device=device)
    pages = step.pages.to(device)
    ops.decode(pages, batch, *(part.to(device) for part in (step.q, step.k, step.v)), out)
    step.pages.copy_(pages)
    return out.cpu()


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        (Shape(), {}),
        (Shape(64, queries_per_kv_head=8, kv_heads=1, dtype=torch.float16), {"sinks": True}),
        (Shape(80, queries_per_kv_head=5, kv_heads=1, block_size=32), {"softcap": 8.0}),
        (Shape(128, queries_per_kv_head=2, kv_heads=1, high_bits=16), {"programs": 4}),
    ],
)
@pytest.mark.parametrize("requests", [SHORT_REQUESTS, [SHORT_REQUESTS[0], SHORT_REQUESTS[0]]])
def test_a_request_of_several_blocks(shape, kwargs, requests, device):
    kwargs = dict(kwargs)
    if kwargs.get("sinks"):
        kwargs["sinks"] = 2 * torch.randn(shape.heads)
    step = BlockStep(shape, requests)
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in kwargs.items()
    }
    ops = layer(shape, device, **on_device)
    out = decode(step, ops, kernels.DecodeBatch.build(step.rows, device), device)
    assert (out[0] == 7.0).all()
    kwargs.pop("programs", None)
    step.check(out, assert_close, DECAY, RECENT, **kwargs)


def test_a_batch_with_rows_that_have_no_request(device):
    step = BlockStep(Shape(), SHORT_REQUESTS)
    formats = sorted({row[4] for row in step.rows})
    batch = empty_batch(len(step.rows) + 3, 40, formats, 600, device)
    fill_batch(batch, step.rows)
    out = decode(step, layer(step.shape, device), batch, device)
    step.check(out, assert_close, DECAY, RECENT)
