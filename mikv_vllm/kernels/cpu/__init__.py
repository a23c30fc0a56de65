"""CPU kernels in C++, compiled for several instruction sets.

The instruction sets are ``amx`` (AMX tiles with AVX-512), ``avx512``, ``avx2`` and ``scalar`` (any
machine). The first one that the machine supports is used. The environment variable ``MIKV_CPU_ISA``
selects another one that the machine supports, for example to compare them.

The kernels run on OpenMP threads, as many as torch uses.
"""

# torch is imported first, so that the kernels share its OpenMP runtime and thus vLLM's binding of
# threads to cores.
import torch  # noqa: F401  isort: skip

from mikv_vllm.kernels.cpu._C import isa, isas, set_isa
from mikv_vllm.kernels.cpu.batch import DecodeBatch, DecodeRow
from mikv_vllm.kernels.cpu.layer import HEAD_DIMS, LayerOps

__all__ = ["HEAD_DIMS", "DecodeBatch", "DecodeRow", "LayerOps", "isa", "isas", "set_isa"]
