"""What writes, changes and reads tiers, in plain torch on the bytes of real pages: the oracle.

Attention is in :mod:`mikv_vllm.tiers.attention`.

A layer's cache is ``pages``: uint8 ``[num_pages, kv_heads, page_bytes]``. All functions work on
one request; ``table`` is its block table, page ids in stream order.
"""

from dataclasses import replace

import torch

from mikv_vllm.tiers import codec, packing
from mikv_vllm.tiers.formats import (
    HIGH_RECORD_TOKENS,
    KEY_ZERO_STEPS,
    LOW_RECORD_TOKENS,
    LowFormat,
    TierGeometry,
)
from mikv_vllm.tiers.plan import AppendStep, TierSizes


class Stream:
    """The stream of one layer and KV head: its bytes in all pages of a request, joined."""

    def __init__(self, pages: torch.Tensor, table: list[int], head: int) -> None:
        self._pages = pages
        self._table = table
        self._head = head

    def read(self, offset: int, num_bytes: int) -> torch.Tensor:
        """A copy of ``num_bytes`` bytes from ``offset``, uint8."""
        size = self._pages.shape[-1]
        first, last = offset // size, (offset + num_bytes - 1) // size
        joined = torch.cat([self._pages[p, self._head] for p in self._table[first : last + 1]])
        return joined[offset - first * size :][:num_bytes].clone()

    def write(self, offset: int, data: torch.Tensor) -> None:
        """Store ``data``, of any dtype, at ``offset``."""
        size = self._pages.shape[-1]
        data = data.contiguous().view(torch.uint8).flatten()
        while len(data):
            page, start = divmod(offset, size)
            part = data[: size - start]
            self._pages[self._table[page], self._head, start : start + len(part)] = part
            data, offset = data[len(part) :], offset + len(part)


def read_frame(stream: Stream, geometry: TierGeometry) -> codec.KeyFrame:
    """The header: key centres, units and ranks."""
    head_dim = geometry.head_dim
    numbers = stream.read(0, 4 * head_dim).view(torch.float16)
    order = stream.read(4 * head_dim, head_dim).long()
    return codec.KeyFrame(order, numbers[:head_dim], numbers[head_dim:])


def write_frame(stream: Stream, frame: codec.KeyFrame) -> None:
    """Store the header."""
    numbers = torch.cat([frame.center, frame.unit]).view(torch.uint8)
    stream.write(0, torch.cat([numbers, frame.order.to(torch.uint8)]))


def high_record_offset(geometry: TierGeometry, group: int) -> int:
    """Stream offset of a high group."""
    return geometry.header_bytes + group * geometry.high.num_bytes


def low_record_offset(
    geometry: TierGeometry, low_format: LowFormat, sizes: TierSizes, chunk: int
) -> int:
    """Stream offset of a low chunk; chunk 0 lies lowest."""
    return sizes.low_end_bytes - (sizes.low_records - chunk) * geometry.low(low_format).num_bytes


def write_low_record(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    offset: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Quantize 32 tokens, keys and values ``[32, head_dim]``, into the chunk at ``offset``."""
    layout, frame = geometry.low(low_format), read_frame(stream, geometry)
    quantized = codec.quantize_keys(keys, frame, low_format)
    tiles = packing.key_tiles(quantized.integers)
    bands = low_format.band_bits(geometry.head_dim)
    stream.write(offset + layout.keys, packing.pack_bands(tiles, bands))
    stream.write(offset + layout.key_scales, quantized.scales)
    stream.write(offset + layout.key_zeros, quantized.zeros)
    quantized = codec.quantize_values(values, low_format.value_bits)
    tiles = packing.value_tiles(codec.merge_value_groups(quantized.integers))
    stream.write(offset + layout.values, packing.pack(tiles, low_format.value_bits))
    stream.write(offset + layout.value_scales, quantized.scales)
    stream.write(offset + layout.value_zeros, quantized.zeros)


def read_low_record(
    stream: Stream, geometry: TierGeometry, low_format: LowFormat, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[32, head_dim]`` of a chunk, dequantized and rotated back, float32."""
    layout = geometry.low(low_format)
    head_dim, groups = geometry.head_dim, layout.value_groups
    num_tiles = LOW_RECORD_TOKENS * head_dim // 64

    def part(start: int, num_bytes: int) -> torch.Tensor:
        return stream.read(offset + start, num_bytes)

    bands = low_format.band_bits(head_dim)
    tiles = packing.unpack_bands(part(layout.keys, layout.values), bands)
    frame = read_frame(stream, geometry)
    integers = packing.key_tiles_inverse(tiles, LOW_RECORD_TOKENS)
    scales = part(layout.key_scales, layout.key_zeros - layout.key_scales)
    zeros = part(layout.key_zeros, len(scales)).view(torch.int8)
    if low_format.keys_per_token:
        steps = codec.decode_scale(scales)[:, None]
        quantized = codec.Quantized(integers, scales, steps, zeros[:, None])
    else:
        steps = scales.float() * frame.unit.float()
        quantized = codec.Quantized(integers, scales, steps, zeros, KEY_ZERO_STEPS)
    keys = codec.dequantize_keys(quantized, frame, low_format)
    tiles = packing.unpack(
        part(layout.values, layout.key_scales - layout.values), low_format.value_bits, num_tiles
    )
    integers = packing.value_tiles_inverse(tiles, LOW_RECORD_TOKENS)
    integers = integers.reshape(LOW_RECORD_TOKENS, groups, head_dim // groups).movedim(0, 1)
    scales = part(layout.value_scales, groups * LOW_RECORD_TOKENS).reshape(
        groups, LOW_RECORD_TOKENS, 1
    )
    values = codec.Quantized(
        integers,
        scales,
        codec.decode_scale(scales),
        part(layout.value_zeros, groups * LOW_RECORD_TOKENS)
        .view(torch.int8)
        .reshape(groups, LOW_RECORD_TOKENS, 1),
    ).dequantize()
    return keys, codec.rotate(codec.merge_value_groups(values))


def write_high(
    stream: Stream,
    geometry: TierGeometry,
    first: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Store tokens ``[n, head_dim]`` with scores ``[n]`` as high tokens ``first ..``."""
    layout = geometry.high
    write_scores(stream, geometry, first, scores)
    for i, (key, value) in enumerate(zip(keys, values, strict=True), first):
        group, slot = divmod(i, HIGH_RECORD_TOKENS)
        base = high_record_offset(geometry, group)
        if layout.bits == 16:
            stream.write(base + layout.keys + slot * 2 * len(key), key)
            stream.write(base + layout.values + slot * 2 * len(value), value)
            continue
        for tensor, tiles_of, inverse, start, scale_start in (
            (key, packing.key_tiles, packing.key_tiles_inverse, layout.keys, layout.key_scales),
            (
                value,
                packing.value_tiles,
                packing.value_tiles_inverse,
                layout.values,
                layout.value_scales,
            ),
        ):
            integers, scale = codec.quantize_high(tensor[None])
            size = HIGH_RECORD_TOKENS * len(tensor)
            tiles = stream.read(base + start, size).reshape(-1, 64)
            rows = inverse(tiles, HIGH_RECORD_TOKENS)
            rows[slot] = integers[0]
            stream.write(base + start, tiles_of(rows))
            stream.write(base + scale_start + 2 * slot, scale)


def write_scores(stream: Stream, geometry: TierGeometry, first: int, scores: torch.Tensor) -> None:
    """Store importance scores ``[n]`` of the high tokens ``first ..``."""
    for i, score in enumerate(scores.float(), first):
        group, slot = divmod(i, HIGH_RECORD_TOKENS)
        offset = high_record_offset(geometry, group) + geometry.high.scores + 4 * slot
        stream.write(offset, score.reshape(1))


def read_high(
    stream: Stream, geometry: TierGeometry, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values ``[n, head_dim]`` and scores ``[n]`` of the high tier, float32."""
    layout, head_dim = geometry.high, geometry.head_dim
    keys, values, scores = [], [], []
    for group in range(-(-num_tokens // HIGH_RECORD_TOKENS)):
        data = stream.read(high_record_offset(geometry, group), layout.num_bytes)
        scores.append(data[layout.scores :].view(torch.float32))
        size = HIGH_RECORD_TOKENS * head_dim * layout.bits // 8
        raw_keys, raw_values = data[:size], data[size : 2 * size]
        if layout.bits == 16:
            keys.append(raw_keys.view(dtype).reshape(-1, head_dim).float())
            values.append(raw_values.view(dtype).reshape(-1, head_dim).float())
            continue
        key_scales = data[layout.key_scales : layout.value_scales].view(torch.float16)
        value_scales = data[layout.value_scales : layout.scores].view(torch.float16)
        key_rows = packing.key_tiles_inverse(raw_keys.reshape(-1, 64), HIGH_RECORD_TOKENS)
        value_rows = packing.value_tiles_inverse(raw_values.reshape(-1, 64), HIGH_RECORD_TOKENS)
        keys.append(codec.dequantize_high(key_rows, key_scales))
        values.append(codec.dequantize_high(value_rows, value_scales))
    if not keys:
        empty = torch.zeros(0, head_dim)
        return empty, empty, torch.zeros(0)
    return (
        torch.cat(keys)[:num_tokens],
        torch.cat(values)[:num_tokens],
        torch.cat(scores)[:num_tokens],
    )


def select_high(scores: torch.Tensor, num_high: int, recent: int) -> torch.Tensor:
    """Positions of the high tokens, ascending: the ``recent`` newest and the best of the others.

    Of equal scores the earlier token wins.
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
    """Write a whole request into its tiers.

    Args:
        keys, values: ``[tokens, kv_heads, head_dim]`` in the cache's dtype.
        scores: ``[kv_heads, tokens]``, float32.
        queries: ``[n, heads, head_dim]``, the last ones of the prompt.
        sizes: sizes to reach; ``sizes.num_tokens`` equals ``tokens``.
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
        write_frame(stream, codec.key_frame(k, k[low], shared, low_format))
        for chunk in range(sizes.low_records):
            tokens = low[LOW_RECORD_TOKENS * chunk : LOW_RECORD_TOKENS * (chunk + 1)]
            offset = low_record_offset(geometry, low_format, sizes, chunk)
            write_low_record(stream, geometry, low_format, offset, k[tokens], v[tokens])


def move_low_records(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    count: int,
    low_end_bytes: int,
) -> TierSizes:
    """Move the ``count`` lowest-lying chunks to below ``low_end_bytes``; returns the new sizes."""
    size = geometry.low(low_format).num_bytes
    for i in range(count):
        start = low_record_offset(geometry, low_format, sizes, i)
        stream.write(low_end_bytes - (count - i) * size, stream.read(start, size))
    return replace(sizes, low_end_bytes=low_end_bytes)


def demote(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    recent: int,
    dtype: torch.dtype,
) -> TierSizes:
    """Turn the 32 least important high tokens into a low chunk; returns the new sizes.

    The ``recent`` newest stay; of equal scores the earlier token goes first; the rest keep
    their order.
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
    """Drop the high tokens that ``keep`` does not mark; the rest get their ``scores``."""
    if geometry.high_bits == 16:
        keys, values = (part[keep].to(dtype) for part in tokens)
        write_high(stream, geometry, 0, keys, values, scores[keep])
        return
    _compact(stream, geometry, keep)
    write_scores(stream, geometry, 0, scores[keep])


def _compact(stream: Stream, geometry: TierGeometry, keep: torch.Tensor) -> None:
    """Close the holes of an 8-bit high tier, scores excepted: nothing is quantized again."""
    layout, head_dim = geometry.high, geometry.head_dim
    num_tokens = len(keep)
    groups = -(-num_tokens // HIGH_RECORD_TOKENS)
    offsets = [high_record_offset(geometry, group) for group in range(groups)]
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
    """Keys and values ``[tokens, head_dim]`` of both tiers, the high one first, float32."""
    keys, values, _ = read_high(stream, geometry, sizes.high_tokens, dtype)
    parts = [(keys, values)]
    for chunk in range(sizes.low_records):
        offset = low_record_offset(geometry, low_format, sizes, chunk)
        parts.append(read_low_record(stream, geometry, low_format, offset))
    all_keys, all_values = zip(*parts, strict=True)
    return torch.cat(all_keys), torch.cat(all_values)


def extend(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    sizes: TierSizes,
    step: AppendStep,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
    keep: float,
    recent: int,
) -> TierSizes:
    """Take the next tokens of a prompt into the tiers; returns the new sizes.

    Args:
        keys, values: ``[n, head_dim]`` in the cache's dtype.
        scores: ``[sizes.num_tokens + n]``, in the order of :func:`restore`, the new ones last.
        keep: factor on the high tokens' own scores, to which theirs are added.
    """
    before, dtype = sizes.high_tokens, keys.dtype
    own_keys, own_values, own = read_high(stream, geometry, before, dtype)
    scores = torch.cat([keep * own + scores[:before], scores[sizes.num_tokens :]])
    leaving = torch.zeros(len(scores), dtype=torch.bool)
    order = torch.sort(scores[: len(scores) - recent], stable=True).indices
    leaving[order[: LOW_RECORD_TOKENS * step.demoted_records]] = True
    moved, low_end_bytes = step.moved_records, step.after.low_end_bytes
    sizes = move_low_records(stream, geometry, low_format, sizes, moved, low_end_bytes)
    sizes = replace(sizes, pages=step.after.pages)
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
