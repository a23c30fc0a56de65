"""A layer with CPU kernels, as the tests set it up."""

from mikv_vllm.kernels import cpu

from .tiered_cache import permutation

RECENT, DECAY = 16, 0.9


def layer(shape, index=None, **kwargs):
    """The kernels for native pages with layout ``index``, by default that of vLLM."""
    key_index, value_index = index or permutation(shape, None)
    parameters = {"scale": shape.head_dim**-0.5, "softcap": 0.0, "sinks": None}
    return cpu.LayerOps(
        shape.head_dim,
        shape.heads,
        shape.kv_heads,
        shape.block_size,
        shape.high_bits,
        shape.dtype,
        decay=DECAY,
        recent=RECENT,
        key_index=key_index,
        value_index=value_index,
        **parameters | kwargs,
    )
