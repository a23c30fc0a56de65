"""The compressed rows of one decode step, as the kernels read them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mikv_vllm.tiers.formats import LINE_BYTES, LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierState

DecodeRow = tuple[int, Any, TierState, AppendStep, LowFormat]
"""Row of q, k, v and out; block table (page ids, a list or an integer array); sizes before the
step; what the step does; low format."""


@dataclass(frozen=True)
class DecodeBatch:
    """Built once per step and read by every layer.

    Args:
        rows: int32 ``[rows, 10]``, one C++ ``Row`` each.
        tables: int32 ``[rows, max_pages]``, page ids.
    """

    rows: np.ndarray
    tables: np.ndarray
    addresses: tuple[int, int, int, int]
    """Rows' address, number of rows, tables' address, pages per table row."""
    last_token: int
    """Largest row of q, k, v and out."""

    @classmethod
    def build(cls, rows: Iterable[DecodeRow]) -> "DecodeBatch":
        """Describe the compressed rows of a step."""
        rows = list(rows)
        numbers = np.empty((len(rows), 10), np.int32)
        max_pages = max((row[3].state.pages for row in rows), default=0)
        tables = np.zeros((len(rows), max_pages), np.int32)
        for i, (token, table, before, step, low_format) in enumerate(rows):
            after = step.state
            pages = np.asarray(table)[: after.pages]
            assert len(pages) == after.pages, (
                f"the table has {len(pages)} pages, the step needs {after.pages}"
            )
            tables[i, : after.pages] = pages
            numbers[i] = (
                token,
                after.pages,
                before.high_tokens,
                before.low_chunks,
                before.low_end // LINE_BYTES,
                step.moved_chunks,
                step.demoted_chunks,
                after.low_end // LINE_BYTES,
                low_format.key_bits,
                low_format.value_bits,
            )
        addresses = (numbers.ctypes.data, len(rows), tables.ctypes.data, max_pages)
        return cls(numbers, tables, addresses, max((row[0] for row in rows), default=-1))
