"""The compressed rows of one decode step, in device memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mikv_vllm.kernels.batch import (
    DEMOTED,
    HIGH,
    KEY_CODE,
    MOVED,
    ROW_FIELDS,
    VALUE_BITS,
    DecodeRow,
    describe_rows,
)
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS, LowFormat


def _high_room(numbers: np.ndarray) -> np.ndarray:
    """Whole chunks of high tokens, in tokens, before each row's step demotes any."""
    return -(-(numbers[:, HIGH] + 1) // LOW_RECORD_TOKENS) * LOW_RECORD_TOKENS


def high_starts(numbers: np.ndarray) -> np.ndarray:
    """Where each row's high tokens begin if they lie one row after the other, int32 ``[rows]``."""
    room = _high_room(numbers)
    return (room.cumsum() - room).astype(np.int32)


@dataclass(frozen=True)
class DecodeBatch:
    """Read by every layer of a step. Its capacity is fixed, so that a CUDA graph can keep it.

    Args:
        rows: int32 ``[capacity, ROW_FIELDS]``; a row without a request has token -1.
        tables: int32 ``[capacity, max_pages]``, page ids.
        starts: int32 ``[capacity]``, where the high tokens of each row begin in scratch that holds
            those of all rows.
        num_high: their number, each row's in whole chunks.
        low_formats: what rows may have; each costs a launch, its other rows return at once.
        changes: a row may move chunks or demote, which costs another launch for each format.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    num_high: int
    low_formats: tuple[LowFormat, ...]
    changes: bool = True

    @classmethod
    def empty(
        cls,
        capacity: int,
        max_pages: int,
        low_formats: Sequence[LowFormat],
        max_high: int,
        device: torch.device | str,
    ) -> "DecodeBatch":
        """A batch without requests, with room for as many high tokens in every row."""
        rows = torch.full((capacity, ROW_FIELDS), -1, dtype=torch.int32, device=device)
        tables = torch.zeros(capacity, max_pages, dtype=torch.int32, device=device)
        each = -(-max_high // LOW_RECORD_TOKENS) * LOW_RECORD_TOKENS
        starts = torch.arange(0, capacity * each, each, dtype=torch.int32, device=device)
        return cls(rows, tables, starts, capacity * each, tuple(low_formats))

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        tables: torch.Tensor,
        starts: torch.Tensor,
        numbers: np.ndarray,
        ladder: Sequence[LowFormat],
    ) -> "DecodeBatch":
        """A batch of what :func:`~mikv_vllm.kernels.batch.describe_rows` returns, on the device.

        Args:
            starts: of :func:`high_starts`.
            numbers: ``rows`` on the host.
            ladder: formats that rows may have.
        """
        found = {tuple(bits) for bits in numbers[:, [KEY_CODE, VALUE_BITS]].tolist()}
        low_formats = tuple(f for f in ladder if (f.key_code, f.value_bits) in found)
        assert len(low_formats) == len(found), "a row has a low format that is not of the ladder"
        changes = bool(numbers[:, [MOVED, DEMOTED]].any())
        return cls(rows, tables, starts, int(_high_room(numbers).sum()), low_formats, changes)

    @classmethod
    def build(cls, rows: Sequence[DecodeRow], device: torch.device | str) -> "DecodeBatch":
        """Describe the compressed rows of one step, with no room for more."""
        numbers, tables = describe_rows(rows)
        arrays = (numbers, tables, high_starts(numbers))
        on_device = [torch.from_numpy(array).to(device) for array in arrays]
        low_formats = sorted({row[4] for row in rows})
        return cls.of(on_device[0], on_device[1], on_device[2], numbers, low_formats)

    def update(self, rows: Sequence[DecodeRow]) -> None:
        """Replace the requests by those of another step.

        Raises:
            ValueError: more or larger rows than there is room for, or another low format.
        """
        numbers, tables = describe_rows(rows)
        high = max((max(row[2].high_tokens, row[3].after.high_tokens) for row in rows), default=0)
        for what, value, most in (
            ("rows", len(rows), len(self.rows)),
            ("pages", tables.shape[1], self.tables.shape[1]),
            ("high tokens", high, self.num_high // len(self.rows)),
        ):
            if value > most:
                raise ValueError(f"the step has {value} {what}, the batch has room for {most}")
        if foreign := {row[4] for row in rows} - set(self.low_formats):
            raise ValueError(f"the batch is not made for {', '.join(f.name for f in foreign)}")
        self.rows[:, 0] = -1
        self.rows[: len(rows)].copy_(torch.from_numpy(numbers), non_blocking=True)
        self.tables[: len(rows), : tables.shape[1]].copy_(
            torch.from_numpy(tables), non_blocking=True
        )
