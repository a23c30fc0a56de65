"""The compressed rows of one decode step, in the form that all kernels read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import LINE_BYTES, LowFormat
from mikv_vllm.tiers.plan import TierSizes

DecodeRow = tuple[int, Any, TierSizes, TailStep, LowFormat]
"""Row of q, k, v and out; block table (page ids, a list or an integer array); sizes before the
step; the step; low format."""

ROW_FIELDS = 12
(
    TOKEN,
    PAGES,
    HIGH,
    LOW,
    LOW_END_LINE,
    DEMOTED,
    KEY_CODE,
    VALUE_BITS,
    BLOCKS,
    QUERIES,
    ACCEPTED,
    SLOT,
) = range(ROW_FIELDS)
"""Fields of a row: row of q, k, v and out; pages of the stream; high tokens and low records before
the step; low end, in lines; demoted low records; key code; value bits; blocks of the request; its
new tokens; drafts of its last step that were accepted; index of its draft weights.

A row is one block. The blocks of a request are consecutive rows with the same token. The new tokens
join the last one. The others are only read, and their number of blocks is 0.

The new tokens of a request are consecutive rows of q, k, v and out. All but the first one are
drafts: each attends to the tokens before it, and changes no score until it is accepted.
"""


def round_up(number: int, multiple: int) -> int:
    """Return the least multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


def row_numbers(
    token: int,
    before: TierSizes,
    step: TailStep,
    low_format: LowFormat,
    blocks: int = 1,
    accepted: int = 0,
    slot: int = 0,
) -> tuple[int, ...]:
    """Return the :data:`ROW_FIELDS` fields of a row."""
    return (
        token,
        step.after.pages,
        before.high_tokens,
        before.low_records,
        before.low_end_bytes // LINE_BYTES,
        step.demoted_records,
        low_format.key_code,
        low_format.value_bits,
        blocks,
        step.new_tokens,
        accepted,
        slot,
    )


def describe_rows(rows: Sequence[DecodeRow]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, int32 ``[rows, ROW_FIELDS]``, and their block tables, int32
    ``[rows, max_pages]``."""
    numbers = np.empty((len(rows), ROW_FIELDS), np.int32)
    max_pages = max((row[3].after.pages for row in rows), default=0)
    tables = np.zeros((len(rows), max_pages), np.int32)
    first = 0
    for i, (token, table, before, step, low_format) in enumerate(rows):
        first = first if i and rows[i - 1][0] == token else i
        num_pages = step.after.pages
        pages = np.asarray(table)[:num_pages]
        assert len(pages) == num_pages, (
            f"the table has {len(pages)} pages, the step needs {num_pages}"
        )
        tables[i, :num_pages] = pages
        blocks = i - first + 1 if step.new_tokens else 0
        numbers[i] = row_numbers(token, before, step, low_format, blocks)
    return numbers, tables
