"""A layer's Triton kernels, as the tests of them set one up."""

from mikv_vllm.kernels import triton as kernels

RECENT, DECAY = 16, 0.9


def layer(shape, device, **kwargs):
    parameters = {"scale": shape.head_dim**-0.5, "softcap": 0.0, "sinks": None, "programs": 32}
    return kernels.LayerOps(
        shape.head_dim,
        shape.heads,
        shape.kv_heads,
        shape.block_size,
        shape.high_bits,
        decay=DECAY,
        recent=RECENT,
        scratch=kernels.Scratch(device),
        **parameters | kwargs,
    )
