"""Size of the page pools of engines that are alive at the same time."""

import json
import math

from mikv_vllm.models import embedded_model

GIB = 1 << 30
ENGINE_BYTES = 2 * GIB
"""Memory of an engine besides its pool: its process, the weights and the caches of its kernels."""
SPARE = 1.6
"""Bytes of a default pool relative to the uncompressed tokens of the largest batch. Native pages of
the prompts stay in the prefix cache while compressed requests use other pages."""


def token_bytes() -> int:
    """Return the bytes of one token in the uncompressed 16-bit KV cache of the embedded model."""
    config = json.loads((embedded_model() / "config.json").read_text())
    numbers = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return 2 * 2 * numbers


def pool_bytes(tokens: int, engines: int, available: int, gib: float | None = None) -> int:
    """Return the bytes of the pool of each engine.

    Args:
        tokens: uncompressed tokens that a pool has to hold at least.
        engines: number of engines that are alive at the same time.
        available: bytes of memory that are available to all engines together.
        gib: ``--pool-gib``, or None to choose.

    Raises:
        ValueError: the pools do not fit into the memory, or a pool cannot hold ``tokens``.
    """
    least = tokens * token_bytes()
    most = max(0, available // engines - ENGINE_BYTES)
    size = min(round(SPARE * least), most) if gib is None else int(gib * GIB)
    if size > most or least > most:
        raise ValueError(
            f"{engines} engines with pools of {_gib_up(max(size, least))} GiB do not fit into "
            f"{available / GIB:.1f} GiB of available memory, because each engine also needs "
            f"{ENGINE_BYTES / GIB:g} GiB; give smaller --contexts, --sequences or --pool-gib, or "
            f"free some memory"
        )
    if size < least:
        raise ValueError(
            f"--pool-gib {gib:g} is too small for {tokens} uncompressed tokens; give "
            f"--pool-gib {_gib_up(least)} or more, or smaller --contexts or --sequences"
        )
    return size


def _gib_up(size: int) -> str:
    """Bytes in GiB, rounded up to two decimals."""
    return f"{math.ceil(100 * size / GIB) / 100:g}"
