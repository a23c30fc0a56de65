"""Splits the batch of a step into rows for vLLM's kernel and rows for the tier kernels."""

from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from mikv_vllm.engine.step_plan import CompressStep, ExtendStep, ScoreStep
from mikv_vllm.engine.worker_context import WorkerContext


@dataclass(frozen=True)
class ScoredRow:
    """A native row whose tokens are scored after attention. It can be compressed then."""

    request_id: str
    queries: slice
    """Tokens of the batch whose queries score the tokens of the request."""
    native_pages: torch.Tensor
    """int32 ``[pages]``."""
    score: ScoreStep
    compress: CompressStep | None
    tiered_pages: torch.Tensor | None
    """int32 ``[pages]``, with ``compress``."""


@dataclass(frozen=True)
class ExtendedRow:
    """A row of a compressed request with the next chunk of its prompt."""

    row: int
    tokens: slice
    """Tokens of the batch."""
    table: Any
    """Page ids, int32 ``[pages]``: an array, or on a GPU a tensor."""
    step: ExtendStep


@dataclass(frozen=True)
class BatchSplit:
    """The batch of one step, split by the kernels that compute each row."""

    rows: np.ndarray
    """Indices of the compressed rows with one token, int64 ``[rows]``."""
    decode: tuple[np.ndarray, np.ndarray]
    """Rows and tables of these requests, as the kernels read them."""
    extended: list[ExtendedRow]
    scored: list[ScoredRow]
    native_rows: np.ndarray
    """Ascending, int64 ``[rows]``."""


def split_batch(
    context: WorkerContext, query_start_loc: np.ndarray, block_table: torch.Tensor
) -> BatchSplit:
    """Split a batch according to the plan.

    Args:
        query_start_loc: first token of each row, and the end of the last row.
        block_table: vLLM's block table, int32 ``[rows, pages]``; valid for native rows only.
    """
    plan, tiers, starts = context.plan, context.tiers, query_start_loc
    request_ids = context.request_ids()[: len(starts) - 1]
    slots = tiers.slots(request_ids)
    native = slots < 0
    extended, scored = [], []
    if plan.extend or plan.score:
        rows = {request_id: row for row, request_id in enumerate(request_ids)}
        for request_id, extend in plan.extend.items():
            row = rows[request_id]
            slots[row] = -1
            span = slice(int(starts[row]), int(starts[row + 1]))
            extended.append(ExtendedRow(row, span, tiers.table(request_id), extend))
        for request_id, score in plan.score.items():
            row = rows[request_id]
            end = int(starts[row + 1])
            compress = plan.compress.get(request_id)
            scored.append(
                ScoredRow(
                    request_id,
                    slice(end - score.num_queries, end),
                    block_table[row],
                    score,
                    compress,
                    torch.tensor(
                        compress.tiered_pages, dtype=torch.int32, device=block_table.device
                    )
                    if compress
                    else None,
                )
            )
    tiered = np.flatnonzero(slots >= 0)
    tokens = starts[tiered]
    assert (starts[tiered + 1] == tokens + 1).all(), "a compressed row has one token"
    decode = tiers.rows(slots[tiered], tokens)
    return BatchSplit(tiered, decode, extended, scored, np.flatnonzero(native))


def token_selection(rows: np.ndarray, query_start_loc: np.ndarray) -> slice | torch.Tensor:
    """Return the tokens of ``rows``: a slice if they are consecutive, else an int64 index."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(query_start_loc[rows[0]]), int(query_start_loc[rows[-1] + 1]))
    chosen = np.zeros(len(query_start_loc) - 1, bool)
    chosen[rows] = True
    return torch.from_numpy(np.flatnonzero(chosen.repeat(np.diff(query_start_loc))))


def native_part(
    batch: CommonAttentionMetadata, rows: np.ndarray, query_start_loc: np.ndarray
) -> CommonAttentionMetadata:
    """Return vLLM's metadata for a batch that contains only ``rows``."""
    lengths = np.diff(query_start_loc)[rows]
    starts = torch.zeros(len(rows) + 1, dtype=batch.query_start_loc.dtype)
    starts[1:] = torch.from_numpy(lengths.cumsum())
    index = torch.from_numpy(rows)
    part = copy(batch)
    part.num_reqs = len(rows)
    part.num_actual_tokens = int(starts[-1])
    part.max_query_len = int(lengths.max())
    part.query_start_loc = part.query_start_loc_cpu = starts
    part.seq_lens = batch.seq_lens[index]
    part.max_seq_len = int(part.seq_lens.max())
    part.block_table_tensor = batch.block_table_tensor[index]
    return part


def restored_part(
    batch: CommonAttentionMetadata, row: ExtendedRow, block_size: int
) -> CommonAttentionMetadata:
    """Return vLLM's metadata for one extended row, whose tokens are in native pages 0, 1, …."""
    first, num_tokens = row.step.before.num_tokens, row.step.append.after.num_tokens
    device = batch.seq_lens.device
    part = copy(batch)
    part.num_reqs = 1
    part.num_actual_tokens = part.max_query_len = num_tokens - first
    part.query_start_loc_cpu = torch.tensor([0, num_tokens - first], dtype=torch.int32)
    part.query_start_loc = part.query_start_loc_cpu.to(device, non_blocking=True)
    part.seq_lens = torch.full((1,), num_tokens, dtype=torch.int32, device=device)
    part.max_seq_len = num_tokens
    pages = -(-num_tokens // block_size)
    part.block_table_tensor = torch.arange(pages, dtype=torch.int32, device=device)[None]
    part.slot_mapping = torch.arange(
        first, num_tokens, dtype=batch.slot_mapping.dtype, device=device
    )
    return part
