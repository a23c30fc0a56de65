"""One row of a decode step, as ``kernels/batch.py`` describes it."""

from typing import NamedTuple

import triton
import triton.language as tl

from mikv_vllm.kernels.batch import ROW_FIELDS as _ROW_FIELDS
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS as _LOW_RECORD_TOKENS

ROW_FIELDS = tl.constexpr(_ROW_FIELDS)
CHUNK = tl.constexpr(_LOW_RECORD_TOKENS)


class Row(NamedTuple):
    """Sizes after the step, but for those named otherwise; lines of the stream."""

    token: object
    """Row of q, k, v and out; negative where there is no request."""
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
    """Read row ``index`` of int32 ``[rows, ROW_FIELDS]``."""
    row = rows + index * ROW_FIELDS
    high, chunks, demoted = tl.load(row + 2), tl.load(row + 3), tl.load(row + 6)
    return Row(
        tl.load(row),
        high,
        chunks,
        tl.load(row + 4),
        tl.load(row + 5),
        demoted,
        high - CHUNK * demoted + 1,
        chunks + demoted,
        tl.load(row + 7),
        tl.load(row + 8),
        tl.load(row + 9),
    )
