"""The tier operations as Triton kernels, on the bytes that ``tiers/formats.py`` lays out."""

from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.layer import LayerOps
from mikv_vllm.kernels.triton.scratch import Scratch
from mikv_vllm.kernels.triton.setup import HEAD_DIMS

__all__ = ["HEAD_DIMS", "DecodeBatch", "LayerOps", "Scratch"]
