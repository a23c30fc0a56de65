"""One step's batch, split into the rows that vLLM's kernel runs and the rows that ours run."""

from copy import copy
from dataclasses import dataclass

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from mikv_vllm.engine.step_plan import CompressStep, DecodeStep, ExtendStep, ScoreStep
from mikv_vllm.engine.worker_context import WorkerContext


@dataclass(frozen=True)
class ScoredRow:
    """A native row whose tokens are scored, and perhaps compressed, after attention."""

    request_id: str
    queries: slice
    """Tokens of the batch whose queries score the request."""
    native_pages: torch.Tensor
    """int32 ``[pages]``."""
    score: ScoreStep
    compress: CompressStep | None
    tiered_pages: torch.Tensor | None
    """int32 ``[pages]``, with ``compress``."""


@dataclass(frozen=True)
class TieredRow:
    """A compressed request's row: one token to append and attend with."""

    token: int
    table: list[int]
    step: DecodeStep


@dataclass(frozen=True)
class ExtendedRow:
    """A compressed request's row with the next chunk of its prompt."""

    row: int
    tokens: slice
    """Of the batch."""
    table: list[int]
    step: ExtendStep


@dataclass(frozen=True)
class BatchSplit:
    """The batch of one step, by who runs each row."""

    tiered: list[TieredRow]
    extended: list[ExtendedRow]
    scored: list[ScoredRow]
    native_rows: list[int]


def split_batch(
    context: WorkerContext, query_start_loc: list[int], block_table: torch.Tensor
) -> BatchSplit:
    """Look each row of the batch up in the plan.

    Args:
        query_start_loc: first token of each row, and the end of the last.
        block_table: vLLM's, int32 ``[rows, pages]``; right for native rows only.
    """
    plan = context.plan
    tiered, extended, scored, native_rows = [], [], [], []
    for row, request_id in enumerate(context.request_ids()[: len(query_start_loc) - 1]):
        if decode := plan.decode.get(request_id):
            token = query_start_loc[row]
            assert query_start_loc[row + 1] == token + 1, "a compressed request decodes by one"
            tiered.append(TieredRow(token, context.tables[request_id], decode))
            continue
        if extend := plan.extend.get(request_id):
            tokens = slice(query_start_loc[row], query_start_loc[row + 1])
            extended.append(ExtendedRow(row, tokens, context.tables[request_id], extend))
            continue
        native_rows.append(row)
        if score := plan.score.get(request_id):
            end = query_start_loc[row + 1]
            compress = plan.compress.get(request_id)
            scored.append(
                ScoredRow(
                    request_id,
                    slice(end - score.num_queries, end),
                    block_table[row],
                    score,
                    compress,
                    torch.tensor(compress.tiered_pages, dtype=torch.int32) if compress else None,
                )
            )
    return BatchSplit(tiered, extended, scored, native_rows)


def token_selection(rows: list[int], query_start_loc: list[int]) -> slice | torch.Tensor:
    """Tokens of ``rows``: a slice where they lie together, else an index, int64."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(query_start_loc[rows[0]], query_start_loc[rows[-1] + 1])
    spans = [torch.arange(query_start_loc[r], query_start_loc[r + 1]) for r in rows]
    return torch.cat(spans)


def native_part(
    batch: CommonAttentionMetadata, rows: list[int], query_start_loc: list[int]
) -> CommonAttentionMetadata:
    """vLLM's metadata of the step as if only ``rows`` were in it."""
    lengths = [query_start_loc[r + 1] - query_start_loc[r] for r in rows]
    starts = torch.zeros(len(rows) + 1, dtype=batch.query_start_loc.dtype)
    starts[1:] = torch.tensor(lengths).cumsum(0)
    index = torch.tensor(rows)
    part = copy(batch)
    part.num_reqs = len(rows)
    part.num_actual_tokens = sum(lengths)
    part.max_query_len = max(lengths)
    part.query_start_loc = part.query_start_loc_cpu = starts
    part.seq_lens = batch.seq_lens[index]
    part.max_seq_len = int(part.seq_lens.max())
    part.block_table_tensor = batch.block_table_tensor[index]
    return part


def restored_part(
    batch: CommonAttentionMetadata, row: ExtendedRow, query_start_loc: list[int], block_size: int
) -> CommonAttentionMetadata:
    """vLLM's metadata of one extended row, in native pages 0, 1, … that hold all its tokens."""
    part = native_part(batch, [row.row], query_start_loc)
    num_tokens = row.step.append.state.num_tokens
    pages = -(-num_tokens // block_size)
    part.block_table_tensor = torch.arange(pages, dtype=batch.block_table_tensor.dtype)[None]
    part.slot_mapping = torch.arange(
        row.step.before.num_tokens, num_tokens, dtype=batch.slot_mapping.dtype
    )
    return part
