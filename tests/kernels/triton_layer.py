"""A layer with Triton kernels, and batches, as the tests set them up."""

import torch

from mikv_vllm.kernels import triton as kernels
from mikv_vllm.kernels.batch import ROW_FIELDS, TOKEN, describe_rows
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS

RECENT, DECAY = 16, 0.9


def layer(shape, device, **kwargs):
    parameters = {"scale": shape.head_dim**-0.5, "softcap": 0.0, "sinks": None, "programs": 32}
    return kernels.LayerOps(
        shape.head_dim,
        shape.heads,
        shape.kv_heads,
        shape.block_size,
        shape.high_bits,
        decay=DECAY,
        recent=RECENT,
        scratch=kernels.Scratch(device),
        **parameters | kwargs,
    )


def empty_batch(rows, max_pages, low_formats, max_high, device):
    """A batch of rows without requests, with space for ``max_high`` high tokens in each."""
    numbers = torch.full((rows, ROW_FIELDS), -1, dtype=torch.int32, device=device)
    tables = torch.zeros(rows, max_pages, dtype=torch.int32, device=device)
    space = -(-max_high // LOW_RECORD_TOKENS) * LOW_RECORD_TOKENS
    starts = torch.arange(0, rows * space, space, dtype=torch.int32, device=device)
    low_formats = tuple(low_formats)
    return kernels.DecodeBatch(numbers, tables, starts, rows * space, (low_formats,), low_formats)


def fill_batch(batch, rows):
    """Replace the requests of a batch, whose tensors stay where they are."""
    numbers, tables = describe_rows(rows)
    batch.rows[:, TOKEN] = -1
    batch.rows[: len(rows)].copy_(torch.from_numpy(numbers))
    batch.tables[: len(rows), : tables.shape[1]].copy_(torch.from_numpy(tables))
