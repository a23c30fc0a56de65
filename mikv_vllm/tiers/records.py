"""Reading and writing the records of a stream in plain torch, on the bytes of real pages."""

from typing import TypeVar

import torch

from mikv_vllm.tiers import codec, packing
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LOW_RECORD_TOKENS, LowFormat, TierGeometry
from mikv_vllm.tiers.key_codecs import KeyFrame, key_codec
from mikv_vllm.tiers.plan import TierSizes


class Stream:
    """The stream of one request in one layer and KV head.

    Args:
        pages: uint8 ``[num_pages, kv_heads, page_bytes]``, the cache of the layer. :meth:`write`
            changes it.
        table: block table of the request, page ids in stream order.
        head: the KV head.
    """

    def __init__(self, pages: torch.Tensor, table: list[int], head: int) -> None:
        self._pages = pages
        self._table = table
        self._head = head

    def read(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Return a copy of ``num_bytes`` bytes from ``offset``, uint8."""
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


def read_frame(stream: Stream, geometry: TierGeometry) -> KeyFrame:
    """Read the header of a stream."""
    layout, head_dim = geometry.header, geometry.head_dim
    center = stream.read(layout.centers, 2 * head_dim).view(torch.float16)
    unit = stream.read(layout.units, 2 * head_dim).view(torch.float16)
    return KeyFrame(stream.read(layout.order, head_dim).long(), center, unit)


def write_frame(stream: Stream, geometry: TierGeometry, frame: KeyFrame) -> None:
    """Write the header of a stream."""
    layout = geometry.header
    stream.write(layout.centers, frame.center)
    stream.write(layout.units, frame.unit)
    stream.write(layout.order, frame.order.to(torch.uint8))


Index = TypeVar("Index", int, torch.Tensor)


def high_record_offset(geometry: TierGeometry, record: Index) -> Index:
    """Stream offset of a high record, or of several."""
    return geometry.header_bytes + record * geometry.high.num_bytes


def low_record_offset(
    geometry: TierGeometry, low_format: LowFormat, sizes: TierSizes, record: int
) -> int:
    """Stream offset of a low record; record 0 has the lowest offset."""
    return sizes.low_end_bytes - (sizes.low_records - record) * geometry.low(low_format).num_bytes


def write_low_record(
    stream: Stream,
    geometry: TierGeometry,
    low_format: LowFormat,
    offset: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Quantize 32 tokens, keys and values ``[32, head_dim]``, into the low record at ``offset``."""
    layout, frame = geometry.low(low_format), read_frame(stream, geometry)
    quantized = key_codec(low_format).quantize(keys, frame, low_format)
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
    """Read keys and values ``[32, head_dim]`` of the low record at ``offset``, float32.

    The values are rotated back.
    """
    layout = geometry.low(low_format)
    head_dim, value_groups = geometry.head_dim, layout.value_groups
    num_tiles = LOW_RECORD_TOKENS * head_dim // 64

    def part(start: int, num_bytes: int) -> torch.Tensor:
        return stream.read(offset + start, num_bytes)

    bands = low_format.band_bits(head_dim)
    tiles = packing.unpack_bands(part(layout.keys, layout.values), bands)
    frame = read_frame(stream, geometry)
    integers = packing.key_tiles_inverse(tiles, LOW_RECORD_TOKENS)
    scales = part(layout.key_scales, layout.key_zeros - layout.key_scales)
    zeros = part(layout.key_zeros, len(scales)).view(torch.int8)
    keys_of = key_codec(low_format)
    keys = keys_of.dequantize(keys_of.stored(integers, scales, zeros, frame), frame)
    tiles = packing.unpack(
        part(layout.values, layout.key_scales - layout.values), low_format.value_bits, num_tiles
    )
    integers = packing.value_tiles_inverse(tiles, LOW_RECORD_TOKENS)
    integers = integers.unflatten(1, (value_groups, -1)).movedim(0, 1)
    count, shape = value_groups * LOW_RECORD_TOKENS, (value_groups, LOW_RECORD_TOKENS, 1)
    scales = part(layout.value_scales, count).reshape(shape)
    zeros = part(layout.value_zeros, count).view(torch.int8).reshape(shape)
    values = codec.Quantized(integers, scales, codec.decode_scale(scales), zeros).dequantize()
    return keys, codec.rotate(codec.merge_value_groups(values))


def write_high(
    stream: Stream,
    geometry: TierGeometry,
    first: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """Write keys and values ``[n, head_dim]`` and scores ``[n]`` as high tokens ``first ..``."""
    layout = geometry.high
    write_scores(stream, geometry, first, scores)
    for i, (key, value) in enumerate(zip(keys, values, strict=True), first):
        record, slot = divmod(i, HIGH_RECORD_TOKENS)
        base = high_record_offset(geometry, record)
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
    """Write importance scores ``[n]`` of the high tokens ``first ..``."""
    for i, score in enumerate(scores.float(), first):
        record, slot = divmod(i, HIGH_RECORD_TOKENS)
        offset = high_record_offset(geometry, record) + geometry.high.scores + 4 * slot
        stream.write(offset, score.reshape(1))


def read_high(
    stream: Stream, geometry: TierGeometry, num_tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read keys and values ``[n, head_dim]`` and scores ``[n]`` of the high tier, float32.

    ``n`` is ``num_tokens``. ``dtype``: of the cache, in which a 16-bit high tier is stored.
    """
    layout, head_dim = geometry.high, geometry.head_dim
    keys, values, scores = [], [], []
    for record in range(-(-num_tokens // HIGH_RECORD_TOKENS)):
        data = stream.read(high_record_offset(geometry, record), layout.num_bytes)
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
