"""The tier operations in plain torch, on the bytes of real pages: the oracle for the kernels.

All functions work on one request. Attention is in :mod:`mikv_vllm.tiers.attention`.
"""

from dataclasses import replace

import torch

from mikv_vllm.tiers import packing
from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS, LowFormat, TierGeometry
from mikv_vllm.tiers.key_codecs import key_codec
from mikv_vllm.tiers.plan import TierSizes
from mikv_vllm.tiers.records import (
    Stream,
    high_record_offset,
    low_record_offset,
    read_high,
    read_low_record,
    write_frame,
    write_high,
    write_low_record,
    write_scores,
)


def select_high(scores: torch.Tensor, num_high: int, recent: int) -> torch.Tensor:
    """Choose the high tokens: the ``recent`` newest, and the most important of the others.

    Of equal scores, the earlier token is chosen.

    Args:
        scores: ``[tokens]``.

    Returns:
        Positions ``[num_high]``, ascending.
    """
    older = len(scores) - recent
    best = torch.sort(scores[:older], descending=True, stable=True).indices[: num_high - recent]
    return torch.cat([best.sort().values, torch.arange(older, len(scores))])


def compress(
    pages: torch.Tensor,
    table: list[int],
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    queries: torch.Tensor,
    recent: int,
) -> None:
    """Write a request of native tokens into its tiers. Changes ``pages``.

    Args:
        pages: uint8 ``[num_pages, kv_heads, page_bytes]``, the cache of one layer.
        table: block table of the request, page ids in stream order.
        sizes: sizes to reach; ``sizes.num_tokens`` equals ``tokens``.
        keys, values: ``[tokens, kv_heads, head_dim]`` in the dtype of the cache.
        scores: ``[kv_heads, tokens]``, float32.
        queries: ``[n, heads, head_dim]``, the last queries of the prompt.
        recent: newest tokens, which are never low.
    """
    for head in range(pages.shape[1]):
        stream = Stream(pages, table, head)
        k, v = keys[:, head], values[:, head]
        high = select_high(scores[head], sizes.high_tokens, recent)
        write_high(stream, geometry, 0, k[high], v[high], scores[head][high])
        is_low = torch.ones(len(k), dtype=torch.bool)
        is_low[high] = False
        low = is_low.nonzero().flatten()
        shared = queries.unflatten(1, (pages.shape[1], -1))[:, head].flatten(0, 1)
        frame = key_codec(low_format).frame(k, k[low], shared, low_format)
        write_frame(stream, geometry, frame)
        for record in range(sizes.low_records):
            tokens = low[LOW_RECORD_TOKENS * record : LOW_RECORD_TOKENS * (record + 1)]
            offset = low_record_offset(geometry, low_format, sizes, record)
            write_low_record(stream, geometry, low_format, offset, k[tokens], v[tokens])


def demote(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    recent: int,
    dtype: torch.dtype,
) -> TierSizes:
    """Demote the 32 high tokens with the lowest scores into one low record.

    The ``recent`` newest tokens are not demoted. Of equal scores, the earlier token is demoted. The
    remaining high tokens keep their order. Returns the new sizes.
    """
    keys, values, scores = read_high(stream, geometry, sizes.high_tokens, dtype)
    order = torch.sort(scores[: sizes.high_tokens - recent], stable=True).indices
    victims = order[:LOW_RECORD_TOKENS].sort().values
    keep = torch.ones(sizes.high_tokens, dtype=torch.bool)
    keep[victims] = False
    _keep_high(stream, geometry, keep, scores, (keys, values), dtype)
    after = replace(
        sizes, high_tokens=sizes.high_tokens - LOW_RECORD_TOKENS, low_records=sizes.low_records + 1
    )
    offset = low_record_offset(geometry, low_format, after, 0)
    write_low_record(stream, geometry, low_format, offset, keys[victims], values[victims])
    return after


def _keep_high(
    stream: Stream,
    geometry: TierGeometry,
    keep: torch.Tensor,
    scores: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """Remove high tokens from the stream; the remaining ones keep their order.

    Args:
        keep: bool ``[high_tokens]``, the tokens that remain.
        scores: ``[high_tokens]``, the new scores.
        tokens: keys and values ``[high_tokens, head_dim]``, dequantized.
    """
    if not len(keep):
        return
    if geometry.high_bits == 16:
        keys, values = (part[keep].to(dtype) for part in tokens)
        write_high(stream, geometry, 0, keys, values, scores[keep])
        return
    _compact(stream, geometry, keep)
    write_scores(stream, geometry, 0, scores[keep])


def _compact(stream: Stream, geometry: TierGeometry, keep: torch.Tensor) -> None:
    """Move the kept tokens of an 8-bit high tier together, without quantizing them again.

    Does not move the scores.
    """
    layout, head_dim = geometry.high, geometry.head_dim
    num_tokens = len(keep)
    num_records = -(-num_tokens // HIGH_RECORD_TOKENS)
    offsets = [high_record_offset(geometry, record) for record in range(num_records)]
    records = [stream.read(offset, layout.num_bytes) for offset in offsets]
    size = HIGH_RECORD_TOKENS * head_dim
    for inverse, tiles_of, start in (
        (packing.key_tiles_inverse, packing.key_tiles, 0),
        (packing.value_tiles_inverse, packing.value_tiles, size),
    ):
        rows = [
            inverse(r[start : start + size].reshape(-1, 64), HIGH_RECORD_TOKENS) for r in records
        ]
        joined = torch.cat(rows)
        kept = joined[:num_tokens][keep]
        joined[: len(kept)] = kept
        for offset, part in zip(offsets, joined.split(HIGH_RECORD_TOKENS), strict=True):
            stream.write(offset + start, tiles_of(part))
    for start in (layout.key_scales, layout.value_scales):
        scales = [r[start : start + 2 * HIGH_RECORD_TOKENS].view(torch.float16) for r in records]
        joined = torch.cat(scales)
        kept = joined[:num_tokens][keep]
        joined[: len(kept)] = kept
        for offset, part in zip(offsets, joined.split(HIGH_RECORD_TOKENS), strict=True):
            stream.write(offset + start, part)


def restore(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values ``[tokens, head_dim]`` of both tiers, high tokens first, float32."""
    keys, values, _ = read_high(stream, geometry, sizes.high_tokens, dtype)
    parts = [(keys, values)]
    for record in range(sizes.low_records):
        offset = low_record_offset(geometry, low_format, sizes, record)
        parts.append(read_low_record(stream, geometry, low_format, offset))
    all_keys, all_values = zip(*parts, strict=True)
    return torch.cat(all_keys), torch.cat(all_values)


def seal(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Write a sealed block from its tokens. Its header is in the stream already.

    Args:
        keys, values: ``[tokens, head_dim]`` in the dtype of the cache.
        scores: ``[tokens]``; the tokens with the highest ones become high tokens.
    """
    empty = replace(sizes, high_tokens=0, low_records=0)
    step = TailStep(len(keys), (), False, sizes.low_records, sizes)
    extend(stream, geometry, low_format, empty, step, keys, values, scores, keep=0.0, recent=0)


def extend(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    step: TailStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    keep: float,
    recent: int,
) -> TierSizes:
    """Add the tokens of a prompt chunk to the tiers; returns the new sizes.

    Args:
        keys, values: ``[n, head_dim]`` in the dtype of the cache.
        scores: ``[sizes.num_tokens + n]``, in the order of :func:`restore`, new tokens last.
        keep: factor on the stored scores of the high tokens, before ``scores`` is added.
        recent: newest tokens, which are never demoted.
    """
    before, dtype = sizes.high_tokens, keys.dtype
    own_keys, own_values, own = read_high(stream, geometry, before, dtype)
    scores = torch.cat([keep * own + scores[:before], scores[sizes.num_tokens :]])
    leaving = torch.zeros(len(scores), dtype=torch.bool)
    order = torch.sort(scores[: len(scores) - recent], stable=True).indices
    leaving[order[: LOW_RECORD_TOKENS * step.demoted_records]] = True
    stay, new_stay = ~leaving[:before], ~leaving[before:]
    _keep_high(stream, geometry, stay, scores[:before], (own_keys, own_values), dtype)
    low_keys = torch.cat([own_keys, keys.float()])[leaving]
    low_values = torch.cat([own_values, values.float()])[leaving]
    for first in range(0, len(low_keys), LOW_RECORD_TOKENS):
        tokens = slice(first, first + LOW_RECORD_TOKENS)
        sizes = replace(sizes, low_records=sizes.low_records + 1)
        offset = low_record_offset(geometry, low_format, sizes, 0)
        write_low_record(stream, geometry, low_format, offset, low_keys[tokens], low_values[tokens])
    first, new_scores = int(stay.sum()), scores[before:]
    write_high(stream, geometry, first, keys[new_stay], values[new_stay], new_scores[new_stay])
    return replace(sizes, high_tokens=first + int(new_stay.sum()))
