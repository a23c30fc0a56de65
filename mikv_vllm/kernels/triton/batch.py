"""The compressed rows of one decode step, in device memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mikv_vllm.kernels.batch import (
    BLOCKS,
    DEMOTED,
    HIGH,
    KEY_CODE,
    VALUE_BITS,
    DecodeRow,
    describe_rows,
)
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS, LowFormat

FAMILY = 3
"""Low formats in one kernel of attention. The time to compile it grows with their square."""


def _high_space(numbers: np.ndarray) -> np.ndarray:
    """Positions for the high tokens of each tail, before a demotion, in multiples of 32."""
    space = -(-(numbers[:, HIGH] + 1) // LOW_RECORD_TOKENS) * LOW_RECORD_TOKENS
    return np.where(numbers[:, BLOCKS] > 0, space, 0)


def high_starts(numbers: np.ndarray) -> np.ndarray:
    """First position of the high tokens of each row in scratch, int32 ``[rows]``."""
    space = _high_space(numbers)
    return (space.cumsum() - space).astype(np.int32)


@cache
def families_of(ladder: tuple[LowFormat, ...]) -> tuple[tuple[LowFormat, ...], ...]:
    """Split a ladder into neighbours that one kernel of attention computes."""
    return tuple(tuple(ladder[first : first + FAMILY]) for first in range(0, len(ladder), FAMILY))


@dataclass(frozen=True)
class DecodeBatch:
    """Built once per step, and read by every layer.

    Args:
        rows: int32 ``[rows, ROW_FIELDS]``. A row without a request has token -1.
        tables: int32 ``[rows, max_pages]``, page ids.
        starts: int32 ``[rows]``, result of :func:`high_starts`.
        num_high: number of positions for the high tokens of all tails in scratch.
        families: low formats that rows can have, in tuples. Each tuple costs a launch of attention,
            whose programs of other rows return at once.
        changing: low formats of the rows that can demote. Each one costs a launch, whose programs
            of other rows return at once.
    """

    rows: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    num_high: int
    families: tuple[tuple[LowFormat, ...], ...]
    changing: tuple[LowFormat, ...]

    @classmethod
    def of(
        cls,
        rows: torch.Tensor,
        tables: torch.Tensor,
        starts: torch.Tensor,
        numbers: np.ndarray,
        ladder: Sequence[LowFormat],
    ) -> "DecodeBatch":
        """Return a batch of tensors that are already on the device.

        Args:
            rows, tables: results of :func:`~mikv_vllm.kernels.batch.describe_rows`.
            starts: result of :func:`high_starts`.
            numbers: ``rows`` on the host.
            ladder: low formats that rows can have.
        """
        known = {(f.key_code, f.value_bits): f for f in ladder}
        found = {tuple(bits) for bits in numbers[:, [KEY_CODE, VALUE_BITS]].tolist()}
        assert found <= set(known), "a row has a low format that is not in the ladder"
        families = tuple(
            family
            for family in families_of(tuple(ladder))
            if any((one.key_code, one.value_bits) in found for one in family)
        )
        demoting = numbers[numbers[:, DEMOTED] > 0]
        bits = {tuple(bits) for bits in demoting[:, [KEY_CODE, VALUE_BITS]].tolist()}
        changing = tuple(known[one] for one in sorted(bits))
        return cls(rows, tables, starts, int(_high_space(numbers).sum()), families, changing)

    @classmethod
    def build(
        cls,
        rows: Sequence[DecodeRow],
        device: torch.device | str,
        ladder: Sequence[LowFormat] = (),
    ) -> "DecodeBatch":
        """Describe the compressed rows of a step and copy them to the device.

        Args:
            ladder: as in :meth:`of`; without it, the low formats of the rows.
        """
        numbers, tables = describe_rows(rows)
        arrays = (numbers, tables, high_starts(numbers))
        on_device = [torch.from_numpy(array).to(device) for array in arrays]
        low_formats = ladder or sorted({row[4] for row in rows})
        return cls.of(on_device[0], on_device[1], on_device[2], numbers, low_formats)
