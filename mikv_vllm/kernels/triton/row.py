"""One row of a decode step, as ``kernels/batch.py`` describes it."""

from typing import NamedTuple

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.constants import (
    DEMOTED,
    HIGH,
    KEY_CODE,
    LOW,
    LOW_END_LINE,
    LOW_RECORD_TOKENS,
    MOVED,
    NEXT_LOW_END_LINE,
    ROW_FIELDS,
    TOKEN,
    VALUE_BITS,
)


class Row(NamedTuple):
    """Sizes of a request in a decode step: after the step, unless the name ends in ``_before``."""

    token: object
    """Row of q, k, v and out; negative if the row has no request."""
    high_before: object
    low_records_before: object
    low_end_line_before: object
    moved_records: object
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
    return Row(
        tl.load(row + TOKEN),
        high,
        low,
        tl.load(row + LOW_END_LINE),
        tl.load(row + MOVED),
        demoted,
        high - LOW_RECORD_TOKENS * demoted + 1,
        low + demoted,
        tl.load(row + NEXT_LOW_END_LINE),
        tl.load(row + KEY_CODE),
        tl.load(row + VALUE_BITS),
    )
