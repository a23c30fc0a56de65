"""The compressed rows of one decode step, as the CPU kernels read them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mikv_vllm.kernels.batch import DecodeRow, describe_rows


@dataclass(frozen=True)
class DecodeBatch:
    """Built once per step and read by every layer.

    Args:
        rows: int32 ``[rows, ROW_FIELDS]``, one C++ ``Row`` each.
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
        numbers, tables = describe_rows(rows)
        addresses = (numbers.ctypes.data, len(rows), tables.ctypes.data, tables.shape[1])
        return cls(numbers, tables, addresses, max((row[0] for row in rows), default=-1))
