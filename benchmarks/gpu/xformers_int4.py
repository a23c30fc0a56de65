"""xformers' split-K decode attention on int4 keys and values, which are about as small as ours."""

import torch
import triton

try:
    import xformers
    from xformers.ops.fmha import Inputs
    from xformers.ops.fmha.triton_splitk import FwOp
except ImportError:
    xformers = None


def pack_rows(x: torch.Tensor) -> torch.Tensor:
    """Quantize rows to 4 bits, as ``FwOp`` in ``xformers/ops/fmha/triton_splitk.py`` reads them.

    An integer ``n`` of a row means ``scale * n + shift``. The first word of a row has the fp16
    scale in its lower half and the fp16 shift in its upper half. Every other word has 8 integers,
    the first one in the lowest bits.

    Args:
        x: ``[..., head_dim]``.

    Returns:
        int32 ``[..., 1 + head_dim / 8]``.
    """
    x = x.float()
    shift = x.amin(-1, keepdim=True).half()
    scale = ((x.amax(-1, keepdim=True) - shift) / 15).half()
    numbers = ((x - shift) / scale).round().clamp(0, 15).to(torch.uint8)
    words = (numbers[..., ::2] | numbers[..., 1::2] << 4).view(torch.int32)
    return torch.cat([torch.cat([scale, shift], -1).view(torch.int32), words], -1)


def decode(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Compute attention of one token of each sequence. xformers chooses the number of splits.

    Args:
        q: ``[batch, kv_heads, queries_per_kv_head, head_dim]``, fp16 or bf16.
        keys, values: :func:`pack_rows` of ``[batch, tokens, kv_heads, head_dim]``.

    Returns:
        The output, shaped like ``q``.
    """
    shared = [rows[..., None, :].expand(-1, -1, -1, q.shape[2], -1) for rows in (keys, values)]
    out, _ = FwOp.apply(Inputs(q[:, None], *shared), needs_gradient=False)
    return out[:, 0]


def obstacle(device: str) -> str | None:
    """Return a sentence that says why xformers cannot be measured, or None if it can."""
    if xformers is None:
        return "xformers is not installed; its int4 attention is not measured."
    q = torch.randn(1, 2, 4, 64, dtype=torch.float16, device=device)
    rows = pack_rows(torch.randn(1, 128, 2, 64, device=device))
    try:
        decode(q, rows, rows)
    except Exception as error:  # its kernel may not support this version of Triton
        name = type(error).__name__
        return (
            f"xformers {xformers.__version__} fails with Triton {triton.__version__} ({name}); "
            "its int4 attention is not measured."
        )
    return None
