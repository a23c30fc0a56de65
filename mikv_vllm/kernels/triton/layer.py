"""The tier operations of one attention layer on a GPU."""

from mikv_vllm.kernels import layer_ops
from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.compress_ops import CompressOps
from mikv_vllm.kernels.triton.decode_ops import DecodeOps
from mikv_vllm.kernels.triton.extend_ops import ExtendOps


class LayerOps(DecodeOps, CompressOps, ExtendOps, layer_ops.LayerOps[DecodeBatch]):
    """The operations of :class:`~mikv_vllm.kernels.layer_ops.LayerOps` in Triton.

    Native pages are ``[pages, kv_heads, block_size, 2 * head_dim]``, keys before values, with any
    strides and contiguous channels. If native and tiered pages overlap, ``compress`` needs a copy
    of the native pages.

    Args:
        head_dim: one of :data:`~mikv_vllm.kernels.triton.layer_setup.HEAD_DIMS`.
        scratch: temporary memory, shared with the other layers.
        programs: splits of a decode step, by default the number that the device computes in two
            turns.

    Other parameters are described in :class:`~mikv_vllm.kernels.layer_ops.LayerOps`.

    Raises:
        ValueError: the kernels do not support a parameter.
    """
