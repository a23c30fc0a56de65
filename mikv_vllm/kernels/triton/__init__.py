"""The tier operations as Triton kernels, on the bytes that ``tiers/formats.py`` lays out."""

from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.layer import LayerOps
from mikv_vllm.kernels.triton.layer_setup import HEAD_DIMS
from mikv_vllm.kernels.triton.scratch import Scratch

__all__ = ["HEAD_DIMS", "DecodeBatch", "LayerOps", "Scratch"]
