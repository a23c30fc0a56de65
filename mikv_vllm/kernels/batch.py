"""The compressed rows of one decode step, in the form that all kernels read."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import LINE_BYTES, LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierSizes

DecodeRow = tuple[int, Any, TierSizes, AppendStep, LowFormat]
"""Row of q, k, v and out; block table (page ids, a list or an integer array); sizes before the
step; the step; low format."""

ROW_FIELDS = 11
(
    TOKEN,
    PAGES,
    HIGH,
    LOW,
    LOW_END_LINE,
    MOVED,
    DEMOTED,
    NEXT_LOW_END_LINE,
    KEY_CODE,
    VALUE_BITS,
    NEW_TOKENS,
) = range(ROW_FIELDS)
"""Fields of a row: row of q, k, v and out; pages of the stream; high tokens, low records and low end
before the step; moved low records; demoted low records; low end after the step; key code; value
bits; new tokens. Low ends are in lines.

A row is one block. The blocks of a request are consecutive rows with the same token; the last one
takes the new token, the others are only read and have no new tokens.
"""


def row_numbers(
    token: int, before: TierSizes, step: AppendStep | TailStep, low_format: LowFormat
) -> tuple[int, ...]:
    """Return the :data:`ROW_FIELDS` fields of a row."""
    return (
        token,
        step.after.pages,
        before.high_tokens,
        before.low_records,
        before.low_end_bytes // LINE_BYTES,
        step.moved_records,
        step.demoted_records,
        step.after.low_end_bytes // LINE_BYTES,
        low_format.key_code,
        low_format.value_bits,
        step.new_tokens,
    )


def describe_rows(rows: Sequence[DecodeRow]) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, int32 ``[rows, ROW_FIELDS]``, and their block tables, int32
    ``[rows, max_pages]``."""
    numbers = np.empty((len(rows), ROW_FIELDS), np.int32)
    max_pages = max((row[3].after.pages for row in rows), default=0)
    tables = np.zeros((len(rows), max_pages), np.int32)
    for i, (token, table, before, step, low_format) in enumerate(rows):
        num_pages = step.after.pages
        pages = np.asarray(table)[:num_pages]
        assert len(pages) == num_pages, (
            f"the table has {len(pages)} pages, the step needs {num_pages}"
        )
        tables[i, :num_pages] = pages
        numbers[i] = row_numbers(token, before, step, low_format)
    return numbers, tables
