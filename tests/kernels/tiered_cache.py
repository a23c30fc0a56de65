"""Caches that hold random requests, for tests that compare kernels with the torch oracle."""

from dataclasses import dataclass

import torch

from mikv_vllm.tiers import packing, records, reference
from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import (
    HIGH_RECORD_TOKENS,
    LINE_BYTES,
    LOW_RECORD_TOKENS,
    LowFormat,
    TierGeometry,
)
from mikv_vllm.tiers.plan import TierSizes


@dataclass(frozen=True)
class Shape:
    """Shape of one attention layer and of its cache."""

    head_dim: int = 64
    kv_heads: int = 2
    queries_per_kv_head: int = 3
    block_size: int = 64
    high_bits: int = 8
    dtype: torch.dtype = torch.bfloat16

    @property
    def geometry(self) -> TierGeometry:
        return TierGeometry(self.head_dim, self.block_size, self.high_bits)

    @property
    def heads(self) -> int:
        return self.kv_heads * self.queries_per_kv_head


def tokens(shape: Shape, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[count, kv_heads, head_dim]`` with outlier channels, as in models."""
    rng = torch.Generator().manual_seed(seed)
    channels = torch.exp(torch.randn(shape.kv_heads, shape.head_dim, generator=rng))
    offset = 2 * torch.randn(shape.kv_heads, shape.head_dim, generator=rng)
    size = (count, shape.kv_heads, shape.head_dim)
    keys = torch.randn(size, generator=rng) * channels + offset
    return keys.to(shape.dtype), torch.randn(size, generator=rng).to(shape.dtype)


def last_queries(shape: Shape, count: int = 8) -> torch.Tensor:
    """Queries ``[count, heads, head_dim]`` of similar direction, as in models."""
    common = 2 * torch.randn(shape.head_dim)
    q = torch.randn(count, shape.heads + 1, shape.head_dim) + common
    return q.to(shape.dtype)[:, : shape.heads]


def new_pages(shape: Shape, count: int, poison: int | None = 0xFF) -> torch.Tensor:
    """Pages of a cache, filled with ``poison`` bytes (0xFF: NaN in every float format) or noise."""
    size = (count, shape.kv_heads, shape.geometry.page_bytes)
    if poison is None:
        return torch.randint(0, 256, size, dtype=torch.uint8)
    return torch.full(size, poison, dtype=torch.uint8)


def sizes_of(
    shape: Shape, low_format: LowFormat, high_tokens: int, low_records: int, slack_lines: int = 0
) -> TierSizes:
    """Sizes with as few pages as possible; the low tier ends ``slack_lines`` before them."""
    geometry = shape.geometry
    needed = geometry.high_bytes(high_tokens) + slack_lines * LINE_BYTES
    needed += low_records * geometry.low(low_format).num_bytes
    pages = -(-needed // geometry.page_bytes)
    return TierSizes(
        pages, high_tokens, low_records, pages * geometry.page_bytes - slack_lines * LINE_BYTES
    )


@dataclass
class Tiers:
    """Both tiers of one head, dequantized, float64."""

    keys: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor


def read_tiers(
    pages: torch.Tensor,
    table: list[int],
    head: int,
    shape: Shape,
    low_format: LowFormat,
    sizes: TierSizes,
) -> Tiers:
    stream = records.Stream(pages, table, head)
    geometry = shape.geometry
    keys, values = reference.restore(stream, geometry, low_format, sizes, shape.dtype)
    scores = records.read_high(stream, geometry, sizes.high_tokens, shape.dtype)[2]
    return Tiers(keys.double(), values.double(), scores)


def live_bytes(
    pages: torch.Tensor,
    table: list[int],
    head: int,
    shape: Shape,
    low_format: LowFormat,
    sizes: TierSizes,
) -> torch.Tensor:
    """Return all bytes of one head's stream that are in use, except for importance scores."""
    stream, geometry = records.Stream(pages, table, head), shape.geometry
    layout, low = geometry.high, geometry.low(low_format)
    parts = [stream.read(0, 5 * shape.head_dim)]
    for i in range(-(-sizes.high_tokens // HIGH_RECORD_TOKENS)):
        count = min(HIGH_RECORD_TOKENS, sizes.high_tokens - i * HIGH_RECORD_TOKENS)
        record = stream.read(records.high_record_offset(geometry, i), layout.num_bytes)
        keys, values = record[: layout.values], record[layout.values : layout.key_scales]
        if layout.bits == 8:
            tiles = packing.key_tiles_inverse(keys.reshape(-1, 64), HIGH_RECORD_TOKENS)
            parts.append(tiles[:count].flatten())
            tiles = packing.value_tiles_inverse(values.reshape(-1, 64), HIGH_RECORD_TOKENS)
            parts.append(tiles[:count].flatten())
            for start in (layout.key_scales, layout.value_scales):
                parts.append(record[start : start + 2 * count])
        else:
            parts += [keys[: count * 2 * shape.head_dim], values[: count * 2 * shape.head_dim]]
    for i in range(sizes.low_records):
        offset = records.low_record_offset(geometry, low_format, sizes, i)
        record = stream.read(offset, low.num_bytes)
        parts.append(record[: 2 * low.key_zeros - low.key_scales])
        parts.append(
            record[low.value_scales : low.value_zeros + LOW_RECORD_TOKENS * low.value_groups]
        )
    return torch.cat(parts)


def assert_same_tiers(
    pages: torch.Tensor,
    expected: torch.Tensor,
    table: list[int],
    shape: Shape,
    low_format: LowFormat,
    sizes: TierSizes,
) -> None:
    """Check that the streams of two requests are equal, except for a few integers."""
    for head in range(shape.kv_heads):
        arguments = (table, head, shape, low_format, sizes)
        ours, theirs = live_bytes(pages, *arguments), live_bytes(expected, *arguments)
        # A mean or a rotation may differ in its last bit, which changes a few integers by one.
        assert (ours != theirs).float().mean() < 0.002
        ours, theirs = read_tiers(pages, *arguments), read_tiers(expected, *arguments)
        assert torch.equal(ours.scores, theirs.scores)
        for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            assert (mine - other).norm() <= 0.01 * other.norm()


def oracle_step(
    pages: torch.Tensor,
    table: list[int],
    shape: Shape,
    low_format: LowFormat,
    before: TierSizes,
    step: TailStep,
    key: torch.Tensor,
    value: torch.Tensor,
    recent: int,
) -> None:
    """Do what a decode step does before attention; key and value ``[kv_heads, head_dim]``."""
    geometry = shape.geometry
    for head in range(shape.kv_heads):
        stream, sizes = records.Stream(pages, table, head), before
        for _ in range(step.demoted_records):
            sizes = reference.demote(stream, geometry, low_format, sizes, recent, shape.dtype)
        records.write_high(
            stream,
            geometry,
            sizes.high_tokens,
            key[head : head + 1],
            value[head : head + 1],
            torch.zeros(1),
        )


def filled(
    shape: Shape,
    low_format: LowFormat,
    sizes: TierSizes,
    pages: torch.Tensor,
    table: list[int],
    seed: int,
    recent: int = 16,
) -> None:
    """Compress random tokens into the pages."""
    keys, values = tokens(shape, sizes.num_tokens, seed)
    scores = torch.rand(shape.kv_heads, sizes.num_tokens)
    reference.compress(
        pages,
        table,
        shape.geometry,
        low_format,
        sizes,
        keys,
        values,
        scores,
        last_queries(shape),
        recent,
    )


def expected_attention(
    q: torch.Tensor,
    tiers: Tiers,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs ``[query_heads, head_dim]`` and sums of weights ``[tokens]``, float64."""
    logits = q.double() @ tiers.keys.T * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
    weights = logits.softmax(-1)[:, : len(tiers.keys)]
    return weights @ tiers.values, weights.sum(0)


def permutation(shape: Shape, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Element indices of keys and values in a native page: random, or vLLM's ``vec`` layout."""
    size = shape.block_size * shape.head_dim
    if seed is None:
        keys = torch.arange(size).reshape(shape.head_dim, shape.block_size).T.flatten()
        values = size + torch.arange(size)
    else:
        order = torch.randperm(2 * size, generator=torch.Generator().manual_seed(seed))
        keys, values = order[:size], order[size:]
    return keys.to(torch.int32).contiguous(), values.to(torch.int32).contiguous()


def write_native(
    pages: torch.Tensor,
    table: list[int],
    shape: Shape,
    keys: torch.Tensor,
    values: torch.Tensor,
    index: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Write tokens ``[tokens, kv_heads, head_dim]`` to native pages."""
    elements = pages.view(torch.int16)
    for data, places in ((keys, index[0].long()), (values, index[1].long())):
        for page, start in zip(table, range(0, len(data), shape.block_size), strict=False):
            part = data[start : start + shape.block_size].contiguous().view(torch.int16)
            part = part.movedim(1, 0).flatten(1)
            elements[page][:, places[: part.shape[1]]] = part


def insert_pages(pages: torch.Tensor, table: list[int], free: list[int], step: TailStep) -> None:
    """Insert the new pages of a step into a block's table, as the engine does."""
    table[:] = step.insert(table, [free.pop() for _ in step.new_positions])
    if step.is_split:
        first, last = step.new_positions[0], step.new_positions[-1]
        pages[table[last]] = pages[table[first - 1]]
