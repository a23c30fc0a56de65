"""One row of a decode step, as ``kernels/batch.py`` describes it."""

from typing import NamedTuple

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import (
    BLOCKS,
    DEMOTED,
    HIGH,
    KEY_CODE,
    LOW,
    LOW_END_LINE,
    LOW_RECORD_TOKENS,
    ROW_FIELDS,
    TOKEN,
    VALUE_BITS,
)


class Row(NamedTuple):
    """Sizes of a block in a decode step: after the step, unless the name ends in ``_before``."""

    token: object
    """Row of q, k, v and out; negative if the row has no request."""
    blocks: object
    """Blocks of the request if this is its tail, which the new token joins; else 0."""
    high_before: object
    low_records_before: object
    demoted_records: object
    high_tokens: object
    low_records: object
    low_end_line: object
    key_code: object
    value_bits: object


@triton.jit
def load_row(rows, index):
    """Return row ``index`` of int32 ``[rows, ROW_FIELDS]`` as a :class:`Row`."""
    row = rows + index * ROW_FIELDS
    high, low, demoted = tl.load(row + HIGH), tl.load(row + LOW), tl.load(row + DEMOTED)
    blocks = tl.load(row + BLOCKS)
    return Row(
        tl.load(row + TOKEN),
        blocks,
        high,
        low,
        demoted,
        high - LOW_RECORD_TOKENS * demoted + (blocks > 0).to(tl.int32),
        low + demoted,
        tl.load(row + LOW_END_LINE),
        tl.load(row + KEY_CODE),
        tl.load(row + VALUE_BITS),
    )
