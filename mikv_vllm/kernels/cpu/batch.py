"""The compressed rows of one decode step, as the CPU kernels read them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mikv_vllm.kernels.batch import (
    ACCEPTED,
    BLOCKS,
    HIGH,
    QUERIES,
    SLOT,
    DecodeRow,
    describe_rows,
)


@dataclass(frozen=True)
class DecodeBatch:
    """Built once per step, and read by every layer.

    Args:
        rows: int32 ``[rows, ROW_FIELDS]``. Each row is a C++ ``Row``.
        tables: int32 ``[rows, max_pages]``, page ids.
        addresses: address of ``rows``, number of rows, address of ``tables``, and pages per row of
            ``tables``.
        drafts: slots, drafts of a request, and high tokens of a tail that draft weights need; None
            if no request has drafts or had accepted ones.
    """

    rows: np.ndarray
    tables: np.ndarray
    addresses: tuple[int, int, int, int]
    drafts: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, rows: np.ndarray, tables: np.ndarray) -> "DecodeBatch":
        """Return a batch of the results of :func:`~mikv_vllm.kernels.batch.describe_rows`."""
        rows, tables = np.ascontiguousarray(rows), np.ascontiguousarray(tables)
        addresses = (rows.ctypes.data, len(rows), tables.ctypes.data, tables.shape[1])
        tails = rows[rows[:, BLOCKS] > 0]
        drafts = int(np.maximum(tails[:, QUERIES] - 1, tails[:, ACCEPTED]).max(initial=0))
        if not drafts:
            return cls(rows, tables, addresses)
        high = int((tails[:, HIGH] + tails[:, QUERIES]).max())
        return cls(rows, tables, addresses, (int(tails[:, SLOT].max()) + 1, drafts, high))

    @classmethod
    def build(cls, rows: Iterable[DecodeRow]) -> "DecodeBatch":
        """Describe the compressed rows of a step."""
        return cls.of(*describe_rows(list(rows)))
