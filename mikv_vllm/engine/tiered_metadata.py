"""Splits the batch of a step into rows for vLLM's kernel and rows for the tier kernels."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from mikv_vllm.engine.step_plan import (
    BlockTable,
    CompressStep,
    DecodeStep,
    ExtendStep,
    ScoreStep,
)
from mikv_vllm.engine.worker_context import WorkerContext
from mikv_vllm.kernels.batch import BLOCKS, QUERIES
from mikv_vllm.tiers.formats import LowFormat, TierGeometry
from mikv_vllm.tiers.plan import TierSizes


@dataclass(frozen=True)
class BlockRow:
    """A block of a request, with its table where the kernels read it."""

    first_token: int
    table: torch.Tensor
    """Page ids, int32 ``[pages]``."""
    sizes: TierSizes
    low_format: LowFormat

    @classmethod
    def of_request(cls, blocks: Sequence[BlockTable], device: torch.device) -> list[Self]:
        """The blocks of one request."""
        rows, first_token = [], 0
        for block in blocks:
            table = torch.tensor(block.pages, dtype=torch.int32, device=device)
            rows.append(cls(first_token, table, block.sizes, block.low_format))
            first_token += block.sizes.num_tokens
        return rows


@dataclass(frozen=True)
class ChangeRow:
    """Tokens of a chunk that join one block."""

    first_token: int
    """First token of the block."""
    step: DecodeStep
    table: torch.Tensor
    """Page ids, int32 ``[pages]``; the step's new ones included."""
    source: int | None
    """First page of the block before, if this one begins."""
    target: int
    """First page of this block."""


@dataclass(frozen=True)
class SealedRow:
    """A tail that a decode step fills, and the block that it is written anew as."""

    tail: BlockRow
    block: BlockRow

    @classmethod
    def of_step(cls, tail: BlockTable, step: DecodeStep, device: torch.device) -> Self:
        """The last block of a request in a decode step that seals it."""
        assert step.sealed is not None
        full = BlockTable(tail.pages, step.append.after, tail.low_format)
        return cls(*(BlockRow.of_request([one], device)[0] for one in (full, step.sealed)))


@dataclass(frozen=True)
class ScoredRow:
    """A native row whose tokens are scored after attention. It can be compressed then."""

    queries: slice
    """Tokens of the batch whose queries score the tokens of the request."""
    native_pages: torch.Tensor
    """int32 ``[pages]``."""
    score: ScoreStep
    compress: CompressStep | None
    blocks: list[BlockRow]
    """Blocks to compress into, with ``compress``."""
    scores: dict[str, torch.Tensor]
    """Importance scores of the request, by layer name: float32 ``[kv_heads, capacity]``."""


@dataclass(frozen=True)
class ExtendedRow:
    """A row of a compressed request with the next chunk of its prompt."""

    row: int
    tokens: slice
    """Tokens of the batch."""
    blocks: list[BlockRow]
    """Blocks before the step."""
    changes: list[ChangeRow]
    """Changes of the last of them, and of new blocks."""
    step: ExtendStep


@dataclass(frozen=True)
class BatchSplit:
    """The batch of one step, split by the kernels that compute each row."""

    starts: np.ndarray
    """First token of each row, int32 ``[rows]``."""
    native_rows: np.ndarray
    """Ascending, int64 ``[rows]``."""
    native_ends: np.ndarray
    """End of the tokens of each row that vLLM's kernel computes, if it is native, ``[rows]``."""
    rows: np.ndarray
    """Indices of the compressed rows that decode, int64 ``[rows]``."""
    decode: tuple[np.ndarray, np.ndarray]
    """Rows and tables of their blocks, as the kernels read them."""
    begun: tuple[list[int], list[int]] = ([], [])
    """First pages of the blocks before new tails, and of the new tails."""
    sealed: Sequence[SealedRow] = ()
    extended: Sequence[ExtendedRow] = ()
    scored: Sequence[ScoredRow] = ()
    joined: tuple[np.ndarray, np.ndarray] | None = None
    """Rows and tables of tokens that join after those of ``decode``; see
    :func:`split_first_draft_pass`."""
    skipped_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Tokens of draft layers whose output is 0, int64 ``[tokens]``."""


def split_batch(
    context: WorkerContext, starts: np.ndarray, ends: np.ndarray, block_table: torch.Tensor
) -> BatchSplit:
    """Split a batch according to the plan.

    Args:
        starts: first token of each row, ``[rows]``.
        ends: end of the tokens of the step in each row, ``[rows]``.
        block_table: vLLM's block table, int32 ``[rows, pages]``; valid for native rows only.
    """
    plan, tiers = context.plan, context.tiers
    request_ids = context.request_ids()[: len(starts)]
    slots = tiers.slots(request_ids)
    native = slots < 0
    extended, scored = [], []
    if plan.extend or plan.score:
        device = block_table.device
        rows = {request_id: row for row, request_id in enumerate(request_ids)}
        for request_id, extend in plan.extend.items():
            row = rows[request_id]
            slots[row] = -1
            span = slice(int(starts[row]), int(ends[row]))
            known = tiers.blocks(request_id)
            blocks = BlockRow.of_request(known, device)
            changes = changed_blocks(known, extend, device)
            extended.append(ExtendedRow(row, span, blocks, changes, extend))
        for request_id, score in plan.score.items():
            row = rows[request_id]
            end = int(ends[row])
            compress = plan.compress.get(request_id)
            blocks = BlockRow.of_request(compress.blocks if compress else (), device)
            queries = slice(end - score.num_queries, end)
            scores = context.scores[request_id]
            scored.append(ScoredRow(queries, block_table[row], score, compress, blocks, scores))
    begun = tiers.begun(request_id for request_id, step in plan.decode.items() if step.begins)
    sealed = [
        SealedRow.of_step(tiers.blocks(request_id)[-1], step, block_table.device)
        for request_id, step in plan.decode.items()
        if step.sealed
    ]
    tiered = np.flatnonzero(slots >= 0)
    tokens = starts[tiered]
    decode = tiers.rows(slots[tiered], tokens)
    counts = decode[0][decode[0][:, BLOCKS] > 0, QUERIES]
    assert (ends[tiered] == tokens + counts).all(), "a row has other tokens than planned"
    return BatchSplit(
        starts, np.flatnonzero(native), ends, tiered, decode, begun, sealed, extended, scored
    )


def split_first_draft_pass(
    context: WorkerContext, batch: CommonAttentionMetadata, geometry: TierGeometry
) -> BatchSplit:
    """Split the batch of the first pass of a draft model, and end the step.

    The pass computes the tokens of the step and one more token of each row. If drafts were
    rejected, the sampled token takes the place of the first of them, and the row ends with padding.
    Otherwise the row ends with the sampled token, which joins the tail as in a later pass.
    """
    starts = batch.query_start_loc_cpu.numpy()
    last = starts[1:] - 1
    split = split_batch(context, starts[:-1], last, batch.block_table_tensor)
    context.end_step()
    is_padding = batch.slot_mapping.numpy()[last] < 0
    candidates = split.rows[~is_padding[split.rows]]
    rows, joined = _join_tails(context, batch, candidates, last[candidates], geometry)
    # Native rows that the step compresses are among them: there is no page for one more token.
    tiered = np.flatnonzero(context.tiers.slots(context.request_ids()[: batch.num_reqs]) >= 0)
    native_ends = last + 1
    native_ends[tiered] = last[tiered]
    skipped = last[np.setdiff1d(tiered, rows)]
    return replace(split, native_ends=native_ends, joined=joined, skipped_tokens=skipped)


def split_draft_pass(
    context: WorkerContext, batch: CommonAttentionMetadata, geometry: TierGeometry
) -> BatchSplit:
    """Split the batch of a later pass of draft layers, which proposes one more token a request.

    The drafted token joins the tail if the request decodes, so that its last block is not shared,
    and the tail's pages have room. Otherwise the row is skipped: its further drafts are arbitrary,
    and the model rejects them.
    """
    starts = batch.query_start_loc_cpu.numpy()
    slots = context.tiers.slots(context.request_ids()[: batch.num_reqs])
    native, tiered = np.flatnonzero(slots < 0), np.flatnonzero(slots >= 0)
    rows, decode = _join_tails(context, batch, tiered, starts[tiered], geometry)
    skipped = starts[np.setdiff1d(tiered, rows)]
    return BatchSplit(starts[:-1], native, starts[1:], rows, decode, skipped_tokens=skipped)


def _join_tails(
    context: WorkerContext,
    batch: CommonAttentionMetadata,
    rows: np.ndarray,
    tokens: np.ndarray,
    geometry: TierGeometry,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Let the last token of some rows join their tails, after the step.

    Args:
        rows: compressed rows, int64 ``[rows]``.
        tokens: the token of each of them in the batch, ``[rows]``.

    Returns:
        The rows whose token can join; and the rows and tables of their blocks, as the kernels read
        them.
    """
    slots = context.tiers.slots(context.request_ids()[: batch.num_reqs])[rows]
    lengths = (batch.seq_lens.numpy()[rows] - 1) * np.isin(slots, context.decoded)
    numbers, tables, has_room = context.tiers.draft_rows(slots, tokens, lengths, geometry)
    return rows[has_room], (numbers, tables)


def changed_blocks(
    blocks: list[BlockTable], step: ExtendStep, device: torch.device
) -> list[ChangeRow]:
    """The changes of an extended request's blocks, with their tables."""
    changes: list[ChangeRow] = []
    previous = blocks[-1].pages
    first_token = step.first_token - blocks[-1].sizes.num_tokens
    for change in step.changes:
        table = change.append.insert(() if change.begins else previous, change.new_pages)
        if change.sealed:
            table = [*change.sealed.pages]
        source = previous[0] if change.begins else None
        if change.begins:
            first_token = step.first_token + sum(c.step.append.new_tokens for c in changes)
        tensor = torch.tensor(table, dtype=torch.int32, device=device)
        changes.append(ChangeRow(first_token, change, tensor, source, table[0]))
        previous = tuple(table)
    return changes


def native_selection(split: BatchSplit) -> slice | torch.Tensor:
    """Return the tokens of native rows: a slice if they are consecutive, else an int64 index."""
    rows = split.native_rows
    starts, ends = split.starts[rows], split.native_ends[rows]
    if (starts[1:] == ends[:-1]).all():
        return slice(int(starts[0]), int(ends[-1]))
    spans = zip(starts, ends, strict=True)
    return torch.from_numpy(np.concatenate([np.arange(*span) for span in spans]))


def native_part(batch: CommonAttentionMetadata, split: BatchSplit) -> CommonAttentionMetadata:
    """Return vLLM's metadata for a batch that contains only the native rows of ``batch``."""
    rows = split.native_rows
    lengths = split.native_ends[rows] - split.starts[rows]
    left_out = batch.query_start_loc_cpu.numpy()[1:][rows] - split.native_ends[rows]
    starts = torch.zeros(len(rows) + 1, dtype=batch.query_start_loc.dtype)
    starts[1:] = torch.from_numpy(lengths.cumsum())
    index = torch.from_numpy(rows)
    part = copy(batch)
    part.num_reqs = len(rows)
    part.num_actual_tokens = int(starts[-1])
    part.max_query_len = int(lengths.max())
    part.query_start_loc = part.query_start_loc_cpu = starts
    part.seq_lens = batch.seq_lens[index] - torch.from_numpy(left_out)
    part.max_seq_len = int(part.seq_lens.max())
    part.block_table_tensor = batch.block_table_tensor[index]
    return part


def restored_part(
    batch: CommonAttentionMetadata, row: ExtendedRow, block_size: int
) -> CommonAttentionMetadata:
    """Return vLLM's metadata for one extended row, whose tokens are in native pages 0, 1, …."""
    first = row.step.first_token
    num_tokens = first + row.step.num_tokens
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
