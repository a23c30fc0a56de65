"""CPU kernels: C++ for AVX-512, AVX2 and any other machine, the best one chosen at run time.

``MIKV_CPU_ISA`` (``avx512``, ``avx2`` or ``scalar``) forces a lower one. Threads are OpenMP's, as
many as torch uses.
"""

# torch first: the kernels then share its OpenMP runtime, and with it vLLM's thread binding.
import torch  # noqa: F401  isort: skip

from mikv_vllm.kernels.cpu._C import isa, isas, set_isa
from mikv_vllm.kernels.cpu.batch import DecodeBatch, DecodeRow
from mikv_vllm.kernels.cpu.layer import HEAD_DIMS, LayerOps

__all__ = ["HEAD_DIMS", "DecodeBatch", "DecodeRow", "LayerOps", "isa", "isas", "set_isa"]
