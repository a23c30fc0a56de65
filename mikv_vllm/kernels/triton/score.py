"""Kernels of score: the attention weights that the tokens of a prompt receive from its queries.

The softmax is computed in two passes: :func:`prompt_sums_kernel` computes maxima and sums,
:func:`prompt_scores_kernel` adds the weights to the scores.
"""

import triton
import triton.language as tl

from mikv_vllm.kernels.triton.dot import dot
from mikv_vllm.kernels.triton.jit import kernel
from mikv_vllm.kernels.triton.native import NATIVE_STRIDES, NativePages, load_native
from mikv_vllm.kernels.triton.softmax import LOG2E, NEVER, capped

KEYS = tl.constexpr(64)
"""Columns of a tile of logits: tokens."""
SCORE_ROWS = 64
"""Rows of a tile of logits. A row is a query of one query head."""


@triton.jit
def prompt_logits(
    keys,
    native,
    q,
    q_stride,
    first_row,
    num_rows,
    first_key,
    num_tokens,
    num_queries,
    scale,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Compute a tile of causal logits to base 2, ``[ROWS, KEYS]``.

    Row ``r`` is query ``r // queries_per_kv_head`` of query head ``r % queries_per_kv_head``.
    """
    row = first_row + tl.arange(0, ROWS)
    query, member = row // LAYER.queries_per_kv_head, row % LAYER.queries_per_kv_head
    channel = tl.arange(0, LAYER.padded)
    at = (
        query.to(tl.int64)[:, None] * q_stride + member[:, None] * LAYER.head_dim + channel[None, :]
    )
    inside = (row < num_rows)[:, None] & (channel < LAYER.head_dim)[None, :]
    queries = tl.load(q + at, mask=inside, other=0.0)
    token = first_key + tl.arange(0, KEYS)
    k = load_native(
        keys, native, tl.minimum(token, num_tokens - 1), channel, token < num_tokens, LAYER
    )
    logits = dot(queries, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32))
    logits = capped(logits * (scale * LOG2E), SOFTCAP)
    seen = token[None, :] <= (num_tokens - num_queries + query)[:, None]
    return tl.where(seen & (row < num_rows)[:, None], logits, NEVER)


@kernel(
    counts=("num_tokens", "num_queries"),
    tables=("native_table",),
    specialized=(*NATIVE_STRIDES, "q_stride"),
)
def prompt_sums_kernel(
    keys,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    native_table,
    num_tokens,
    q,
    q_stride,
    num_queries,
    sums,
    scale,
    SOFTCAP: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Write the softmax maximum and sum of ``ROWS`` rows over one part of the tokens.

    Grid ``(cdiv(rows, ROWS), PARTS, kv_heads)``.

    Args:
        keys: native keys; their strides are in elements.
        q: queries of the last tokens, ``[num_queries, heads, head_dim]``.
        sums: out, float32 ``[kv_heads, PARTS, 2, num_queries * queries_per_kv_head]``.
    """
    block, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    q += head * LAYER.queries_per_kv_head * LAYER.head_dim
    num_rows = num_queries * LAYER.queries_per_kv_head
    top = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    share = tl.cdiv(tl.cdiv(num_tokens, PARTS), KEYS) * KEYS
    for start in range(part * share, tl.minimum((part + 1) * share, num_tokens), KEYS):
        logits = prompt_logits(
            keys,
            native,
            q,
            q_stride,
            block * ROWS,
            num_rows,
            start,
            num_tokens,
            num_queries,
            scale,
            SOFTCAP,
            ROWS,
            LAYER,
        )
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.where(logits > NEVER, tl.exp2(logits - new_top[:, None]), 0.0)
        total = total * tl.exp2(top - new_top) + tl.sum(weights, 1)
        top = new_top
    row = block * ROWS + tl.arange(0, ROWS)
    at = sums + (head * PARTS + part) * 2 * num_rows + row
    tl.store(at, top, mask=row < num_rows)
    tl.store(at + num_rows, total, mask=row < num_rows)


@kernel(
    counts=("num_tokens", "num_queries", "score_stride"),
    tables=("native_table",),
    specialized=(*NATIVE_STRIDES, "q_stride"),
)
def prompt_scores_kernel(
    keys,
    native_page_stride,
    native_token_stride,
    native_head_stride,
    native_table,
    num_tokens,
    q,
    q_stride,
    num_queries,
    sums,
    scores,
    score_stride,
    sinks,
    scale,
    SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    LAYER: tl.constexpr,
):
    """Add the weights of all rows to the scores of ``KEYS`` tokens.

    Grid ``(cdiv(num_tokens, KEYS), kv_heads)``. Arguments are as in
    :func:`prompt_sums_kernel`, and:

    Args:
        scores: in and out, float32 ``[kv_heads, score_stride]``.
        sinks: float32 ``[heads]``, read if ``HAS_SINKS``.
    """
    block, head = tl.program_id(0), tl.program_id(1)
    native = NativePages(native_page_stride, native_token_stride, native_table)
    keys += head * native_head_stride
    q += head * LAYER.queries_per_kv_head * LAYER.head_dim
    num_rows = num_queries * LAYER.queries_per_kv_head
    part = tl.arange(0, PARTS)[:, None]
    added = tl.zeros([KEYS], tl.float32)
    for start in range(0, num_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < num_rows
        at = sums + (head * PARTS + part) * 2 * num_rows + row[None, :]
        tops = tl.load(at, mask=inside[None, :], other=NEVER)
        totals = tl.load(at + num_rows, mask=inside[None, :], other=0.0)
        top = tl.where(inside, tl.max(tops, 0), 0.0)
        total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)
        if HAS_SINKS:
            sink = (
                tl.load(sinks + head * LAYER.queries_per_kv_head + row % LAYER.queries_per_kv_head)
                * LOG2E
            )
            total += tl.exp2(sink - top)
        total = tl.where(inside, total, 1.0)
        logits = prompt_logits(
            keys,
            native,
            q,
            q_stride,
            start,
            num_rows,
            block * KEYS,
            num_tokens,
            num_queries,
            scale,
            SOFTCAP,
            ROWS,
            LAYER,
        )
        weights = tl.exp2(logits - top[:, None]) / total[:, None]
        added += tl.sum(tl.where(logits > NEVER, weights, 0.0), 0)
    token = block * KEYS + tl.arange(0, KEYS)
    at = scores + head * score_stride + token
    tl.store(at, tl.load(at, mask=token < num_tokens) + added, mask=token < num_tokens)
