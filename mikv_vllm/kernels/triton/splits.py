"""How decode attention over a request is divided into splits.

Each split is computed by one program, and reads blocks of 32 tokens of one tier. The first splits
of a request read its low tier, the others its high tier.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 16
"""Splits per multiprocessor: it computes 8 at a time, in two turns."""
INTERPRETED_PROGRAMS = 4
"""Splits in Triton's interpreter, which computes them one by one."""
LEAST_SPLITS = 2
"""Least splits of a request: one for each tier."""
MOST_SPLITS = tl.constexpr(256)
"""Most splits of a request."""
LOW_COST, HIGH_COST = tl.constexpr(4), tl.constexpr(3)
"""Costs of a block of 32 tokens, in proportion to its instructions."""
LEAST_COST = tl.constexpr(16)
"""Least cost of a split. A shorter split would save less time than its merge takes."""


def programs_on(device: torch.device) -> int:
    """Number of splits that a device computes in two turns."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def most_splits(programs: int, requests_and_heads: int) -> int:
    """Most splits of one request and KV head, if ``programs`` splits are divided equally."""
    return min(max(programs // requests_and_heads, LEAST_SPLITS), MOST_SPLITS.value)


@triton.jit
def splits_of(low_records, high_blocks, most):
    """Return the number of splits of a request, and how many of them read the low tier.

    Args:
        low_records: blocks of the low tier; high_blocks: blocks of the high tier.
        most: most splits.
    """
    low_cost = LOW_COST * low_records
    cost = low_cost + HIGH_COST * high_blocks
    splits = tl.minimum(most, tl.cdiv(cost, LEAST_COST) + 1)
    # Rounded up, because a single split with the whole low tier would take longer than the others.
    low_splits = tl.minimum(tl.cdiv(low_cost * splits, cost), splits - 1)
    return splits, tl.where(low_records > 0, low_splits, 0)
