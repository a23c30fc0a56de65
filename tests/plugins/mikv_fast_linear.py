"""A plugin of vLLM that makes linear layers fast on CPUs without 16-bit instructions.

oneDNN has no 16-bit matrix products for CPUs with AVX2 only. vLLM then calls
``torch.nn.functional.linear``, which is much slower in 16 bits than in float32. The plugin
multiplies in float32 and rounds the result. It keeps a float32 copy of every weight.

vLLM loads it in every process if this folder is in ``PYTHONPATH``, for stock vLLM and for MiKV
alike. On other CPUs it does nothing.
"""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

MOST_BYTES = 4 << 30
"""Most memory for copies of weights in one process."""


def register() -> None:
    """Replace ``torch.nn.functional.linear``, once for each process."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported() or hasattr(
        torch.nn.functional.linear, "copies"
    ):
        return
    linear = torch.nn.functional.linear
    copies = WeakTensorKeyDictionary()
    copied_bytes = 0

    def fast_linear(x, weight, bias=None):
        nonlocal copied_bytes
        if (
            x.dtype not in (torch.bfloat16, torch.float16)
            or x.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return linear(x, weight, bias)
        copy = copies.get(weight)
        if copy is None:
            if copied_bytes + 4 * weight.numel() > MOST_BYTES:
                return linear(x, weight, bias)
            copy = copies[weight] = weight.detach().as_subclass(torch.Tensor).float()
            copied_bytes += 4 * weight.numel()
        return linear(x.float(), copy, None if bias is None else bias.float()).to(x.dtype)

    fast_linear.copies = copies
    torch.nn.functional.linear = fast_linear
