"""The tier operations of one attention layer on a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl

from mikv_vllm.kernels.triton.attend import attend_kernel
from mikv_vllm.kernels.triton.batch import DecodeBatch
from mikv_vllm.kernels.triton.change import append_kernel, change_kernel
from mikv_vllm.kernels.triton.compress import (
    frame_kernel,
    measure_kernel,
    select_kernel,
    write_high_kernel,
    write_low_kernel,
)
from mikv_vllm.kernels.triton.extend import (
    choose_kernel,
    extend_high_kernel,
    extend_low_kernel,
    move_kernel,
)
from mikv_vllm.kernels.triton.layout import Layout, LowLines, next_power_of_two
from mikv_vllm.kernels.triton.merge import MOST_SPLITS, merge_kernel
from mikv_vllm.kernels.triton.restore import (
    RECORDS_AT_ONCE,
    restore_high_kernel,
    restore_low_kernel,
)
from mikv_vllm.kernels.triton.score import KEYS, prompt_scores_kernel, prompt_sums_kernel
from mikv_vllm.kernels.triton.scratch import Scratch
from mikv_vllm.tiers import codec
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, LINE_BYTES, LOW_RECORD_TOKENS, LowFormat
from mikv_vllm.tiers.plan import AppendStep, TierSizes

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPTIONS = {
    "attend": {"num_stages": 2, "maxnreg": 255},
    "append": {"num_warps": 1},
    "change": {"num_warps": 8},
    "select": {"num_warps": 8},
    "measure": {"num_warps": 8},
    "write_high": {"num_warps": 8},
    "write_low": {"num_warps": 4, "maxnreg": 168},
    "restore_high": {"num_warps": 8},
    "restore_low": {"num_warps": 8},
    "extend_high": {"num_warps": 8},
    "extend_low": {"num_warps": 8},
}
"""How kernels are launched, where it is not Triton's own way."""
HEAD_DIMS: tuple[int, ...] = (64, 80, 96, 112, 128, 256)
"""Head sizes whose groups of value channels are powers of two once they are padded."""
PROGRAMS = 16
"""Splits that a multiprocessor computes in two turns of 8."""
LEAST_SPLITS = 2
"""A split is for one tier."""
SCORE_ROWS = 64
"""Query rows of a tile of logits."""
PARTS = 32
"""Parts that a prompt is measured in, and a window's softmax summed in."""


def hadamard_signs(head_dim: int) -> torch.Tensor:
    """Signs of the block rotation, bf16, padded with zeros to a power of two."""
    size = codec.hadamard_size(head_dim)
    padded = next_power_of_two(head_dim)
    signs = torch.zeros(padded, padded, dtype=torch.bfloat16)
    block = codec.rotate(torch.eye(size)).sign()
    for start in range(0, head_dim, size):
        signs[start : start + size, start : start + size] = block
    return signs


def programs_on(device: torch.device) -> int:
    """Splits of a decode step that a device computes in two turns."""
    if device.type != "cuda":
        return 4  # the interpreter runs them one by one
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _words(cache: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A cache, and its page and head strides in words."""
    scale = 4 // cache.element_size() if cache.element_size() < 4 else 1
    assert not cache.stride(0) % scale, "pages split words"
    assert not cache.stride(1) % scale, "heads split words"
    return cache.view(torch.int32), cache.stride(0) // scale, cache.stride(1) // scale


class LayerOps:
    """Score, compress and decode on one layer's cache.

    Args:
        head_dim: channels of a head, one of :data:`HEAD_DIMS`.
        num_heads, num_kv_heads: query heads, and the KV heads that they share evenly.
        block_size: tokens of a native page, a multiple of 16.
        high_bits: 8 or 16.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off.
        sinks: ``[num_heads]`` logits that only join the softmax's denominator, or None.
        decay: factor on every importance score at each decode step.
        recent: newest tokens that are never demoted.
        scratch: memory shared with the other layers.
        programs: splits of a decode step that the device computes in two turns.

    Tiers lie in a cache whose first axes are ``[pages, kv_heads]`` and whose rest is contiguous;
    native tokens in ``[pages, block_size, kv_heads, head_dim]``, keys and values each with the same
    strides and contiguous channels.

    Raises:
        ValueError: a parameter that the kernels are not made for.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        block_size: int,
        high_bits: int,
        scale: float,
        softcap: float,
        sinks: torch.Tensor | None,
        decay: float,
        recent: int,
        scratch: Scratch,
        programs: int | None = None,
    ) -> None:
        if head_dim not in HEAD_DIMS:
            raise ValueError(f"head_dim is {head_dim}, but must be one of {HEAD_DIMS}")
        if block_size % 16:
            raise ValueError(f"block_size is {block_size}, but must be a multiple of 16")
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} query heads do not share {num_kv_heads} KV heads evenly")
        self._layout = Layout(head_dim, num_heads // num_kv_heads, block_size, high_bits)
        self._kv_heads = num_kv_heads
        self._scale = scale
        self._softcap = float(softcap or 0.0)
        self._sinks = None if sinks is None else sinks.float().contiguous()
        self._decay = decay
        self._recent = recent
        self._scratch = scratch
        self._programs = programs or programs_on(scratch.device)
        self._hadamard = hadamard_signs(head_dim).to(scratch.device)
        self._hadamard_scale = codec.hadamard_size(head_dim) ** -0.5

    def decode(
        self,
        cache: torch.Tensor,
        batch: DecodeBatch,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """One decode step of every row of ``batch``: move, demote, append, attend, score.

        Args:
            q: ``[tokens, heads, head_dim]``; heads and channels contiguous, as in the others.
            k, v: ``[tokens, kv_heads, head_dim]``, the new tokens.
            out: like ``q``, in any float dtype; only the batch's rows are written.
        """
        if batch.changes:
            self.change(cache, batch, k.dtype)
        append_kernel[(self._kv_heads, len(batch.rows))](
            *self._pages(cache, batch),
            k,
            k.stride(0),
            v,
            v.stride(0),
            LAYER=self._layout,
            **OPTIONS["append"],
        )
        self.attend(cache, batch, q, out)

    def _pages(self, cache: torch.Tensor, batch: DecodeBatch) -> tuple[Any, ...]:
        return (*_words(cache), batch.rows, batch.tables, batch.tables.stride(0))

    def change(self, cache: torch.Tensor, batch: DecodeBatch, dtype: torch.dtype) -> None:
        """Move chunks and demote, in rows whose step says so; ``dtype`` of 16-bit high tokens."""
        heads, rows = self._kv_heads, len(batch.rows)
        take, room = self._scratch.take, batch.num_high + rows * LOW_RECORD_TOKENS
        scores = take("scores", (heads, room), torch.float32)
        order = take("order", (heads, room), torch.int32)
        shape = (rows, heads, 2, LOW_RECORD_TOKENS, self._layout.head_dim)
        integers = take("integers", shape, torch.uint8)
        for low_format in batch.low_formats:
            change_kernel[(heads, rows)](
                *self._pages(cache, batch),
                self._hadamard,
                self._hadamard_scale,
                self._recent,
                scores,
                order,
                batch.starts,
                room,
                integers,
                DTYPE=DTYPES[dtype],
                LAYER=self._layout,
                FORMAT=LowLines(self._layout.head_dim, low_format),
                **OPTIONS["change"],
            )

    def attend(
        self, cache: torch.Tensor, batch: DecodeBatch, q: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Attend over both tiers and add to the scores; arguments as in :meth:`decode`."""
        layout, heads, rows = self._layout, self._kv_heads, len(batch.rows)
        splits = self._programs // (rows * heads)
        splits = min(max(splits, LEAST_SPLITS), MOST_SPLITS.value)
        take = self._scratch.take
        shape = (rows, heads, splits, layout.heads, layout.padded)
        partial_out = take("partial_out", shape, torch.float32)
        shape = (rows, heads, splits, 2, layout.heads)
        partial_sums = take("partial_sums", shape, torch.float32)
        logits = take("logits", (heads, layout.queries_per_kv_head, batch.num_high), torch.float32)
        partials = (partial_out, partial_sums, logits, batch.starts, batch.num_high)
        for low_format in batch.low_formats:
            attend_kernel[(splits, heads, rows)](
                *self._pages(cache, batch),
                q,
                q.stride(0),
                *partials,
                self._scale,
                SOFTCAP=self._softcap,
                LAYER=layout,
                FORMAT=LowLines(layout.head_dim, low_format),
                num_warps=layout.warps,
                **OPTIONS["attend"],
            )
        merge_kernel[(splits, heads, rows)](
            *self._pages(cache, batch),
            *partials,
            out,
            out.stride(0),
            self._hadamard,
            self._hadamard_scale,
            self._sinks,
            self._decay,
            HAS_SINKS=self._sinks is not None,
            LAYER=layout,
        )

    def score(
        self,
        key_cache: torch.Tensor,
        native_table: torch.Tensor,
        num_tokens: int,
        q: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """Add the attention that queries pay to each token of a native request to its scores.

        Args:
            native_table: page ids, int32.
            q: ``[n, heads, head_dim]``, of the last ``n`` of ``num_tokens`` tokens, causal.
            scores: ``[kv_heads, >= num_tokens]``, float32.
        """
        layout, heads = self._layout, self._kv_heads
        rows = len(q) * layout.queries_per_kv_head
        sums = self._scratch.take("sums", (heads, PARTS, 2, rows), torch.float32)
        prompt_sums_kernel[(triton.cdiv(rows, SCORE_ROWS), PARTS, heads)](
            key_cache,
            *key_cache.stride()[:3],
            native_table,
            num_tokens,
            q,
            q.stride(0),
            len(q),
            sums,
            self._scale,
            SOFTCAP=self._softcap,
            PARTS=PARTS,
            ROWS=SCORE_ROWS,
            LAYER=layout,
        )
        prompt_scores_kernel[(triton.cdiv(num_tokens, KEYS.value), heads)](
            key_cache,
            *key_cache.stride()[:3],
            native_table,
            num_tokens,
            q,
            q.stride(0),
            len(q),
            sums,
            scores,
            scores.stride(0),
            self._sinks,
            self._scale,
            SOFTCAP=self._softcap,
            HAS_SINKS=self._sinks is not None,
            PARTS=PARTS,
            ROWS=SCORE_ROWS,
            LAYER=layout,
        )

    def compress(
        self,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        native_table: torch.Tensor,
        cache: torch.Tensor,
        tiered_table: torch.Tensor,
        sizes: TierSizes,
        low_format: LowFormat,
        scores: torch.Tensor,
        q: torch.Tensor,
    ) -> None:
        """Write a native request into its tiers.

        Args:
            native_table, tiered_table: page ids, int32; they share no page, unless
                ``key_cache`` and ``value_cache`` are copies.
            sizes: sizes to reach.
            scores: ``[kv_heads, >= sizes.num_tokens]``, float32.
            q: ``[n, heads, head_dim]``, the prompt's last queries, at least one: key channels
                that they weigh most get more bits.
        """
        assert key_cache.stride() == value_cache.stride(), "keys and values need equal strides"
        layout, heads, tokens = self._layout, self._kv_heads, sizes.num_tokens
        native = (key_cache, value_cache, *key_cache.stride()[:3], native_table)
        tiered = (*_words(cache), tiered_table)
        take = self._scratch.take
        order = take("order", (heads, tokens), torch.int32)
        high = sizes.high_tokens
        select_kernel[(heads,)](
            scores,
            scores.stride(0),
            tokens,
            high,
            self._recent,
            order,
            tokens,
            **OPTIONS["select"],
        )
        low = LowLines(layout.head_dim, low_format)
        self._write_frame((key_cache, *native[2:]), tiered, order, sizes, low, q)
        write_high_kernel[(triton.cdiv(high, HIGH_RECORD_TOKENS), heads)](
            *native,
            *tiered,
            scores,
            scores.stride(0),
            order,
            tokens,
            high,
            LAYER=layout,
            **OPTIONS["write_high"],
        )
        if not sizes.low_records:
            return
        shape = (heads, sizes.low_records, 2, LOW_RECORD_TOKENS, layout.head_dim)
        integers = take("tokens", shape, torch.uint8)
        write_low_kernel[(sizes.low_records, heads)](
            *native,
            *tiered,
            order,
            tokens,
            high,
            sizes.low_records,
            sizes.low_end_bytes // LINE_BYTES,
            integers,
            self._hadamard,
            self._hadamard_scale,
            LAYER=layout,
            FORMAT=low,
            **OPTIONS["write_low"],
        )

    def _write_frame(
        self,
        keys: tuple[Any, ...],
        tiered: tuple[Any, ...],
        order: torch.Tensor,
        sizes: TierSizes,
        low: LowLines,
        q: torch.Tensor,
    ) -> None:
        """Write the header of each head: :meth:`~mikv_vllm.tiers.key_codecs.KeyCodec.frame`.

        Args:
            keys: key cache, its strides and its block table; tiered: the same of the tiers.
            order: of ``select_kernel``.
        """
        layout, heads, tokens = self._layout, self._kv_heads, sizes.num_tokens
        take = self._scratch.take
        partial = take("keys", (heads, PARTS, 3, layout.padded), torch.float32)
        ranges = take("ranges", (heads, PARTS, layout.padded), torch.float64)
        ranked = sizes.low_records > 0 and not low.keys_per_token
        first_low = sizes.high_tokens if ranked else 0
        measure_kernel[(PARTS, heads)](
            *keys,
            order,
            tokens,
            tokens,
            first_low,
            partial,
            ranges,
            PARTS=PARTS,
            LAYER=layout,
            **OPTIONS["measure"],
        )
        shared = q.unflatten(1, (heads, -1))
        if ranked:
            squares = shared.double().square().sum((0, 2))
            cost = (squares * ranges.sum(1)[:, : layout.head_dim]).float()
            channels = cost.argsort(dim=-1, descending=True, stable=True)
        else:
            channels = torch.arange(layout.head_dim, device=q.device).repeat(heads, 1)
        largest = shared.abs().amax((0, 2)).float() if low.keys_per_token else None
        frame_kernel[(heads,)](
            *tiered, partial, channels, largest, tokens, PARTS=PARTS, LAYER=layout, FORMAT=low
        )

    def restore(
        self,
        cache: torch.Tensor,
        tiered_table: torch.Tensor,
        sizes: TierSizes,
        low_format: LowFormat,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> None:
        """Lay a compressed request out as native pages: its high tokens, then its low ones.

        Args:
            tiered_table: page ids, int32.
            sizes: its sizes.
            key_cache, value_cache: the pages to write, from the first on.
        """
        assert key_cache.stride() == value_cache.stride(), "keys and values need equal strides"
        layout, heads = self._layout, self._kv_heads
        places = (key_cache, value_cache, *key_cache.stride()[:3], *_words(cache), tiered_table)
        high, chunks = sizes.high_tokens, sizes.low_records
        restore_high_kernel[(triton.cdiv(high, 32), heads)](
            *places, high, LAYER=layout, **OPTIONS["restore_high"]
        )
        if not chunks:
            return
        restore_low_kernel[(triton.cdiv(chunks, RECORDS_AT_ONCE.value), heads)](
            *places,
            high,
            chunks,
            sizes.low_end_bytes // LINE_BYTES,
            self._hadamard,
            self._hadamard_scale,
            LAYER=layout,
            FORMAT=LowLines(layout.head_dim, low_format),
            **OPTIONS["restore_low"],
        )

    def extend(
        self,
        cache: torch.Tensor,
        tiered_table: torch.Tensor,
        sizes: TierSizes,
        step: AppendStep,
        low_format: LowFormat,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: torch.Tensor,
        keep: float,
    ) -> None:
        """Take the next tokens of a prompt into a compressed request's tiers.

        Args:
            tiered_table: page ids, int32; the step's new ones included.
            sizes: sizes before; at least one token is high.
            step: what :meth:`~mikv_vllm.tiers.plan.TierPlanner.extend` planned.
            k, v: ``[tokens, kv_heads, head_dim]``; heads and channels contiguous.
            scores: ``[kv_heads, >= sizes.num_tokens + tokens]``, float32, in the order of
                :meth:`restore`, the new tokens last.
            keep: factor on the high tokens' own scores, to which theirs are added.
        """
        layout, heads, take = self._layout, self._kv_heads, self._scratch.take
        low = LowLines(layout.head_dim, low_format)
        tiered = (*_words(cache), tiered_table)
        high = sizes.high_tokens
        count, leaving = high + len(k), LOW_RECORD_TOKENS * step.demoted_records
        copied = self._copy_high(tiered[0], tiered_table, high)
        merged = take("scores", (heads, count), torch.float32)
        order = take("order", (heads, count), torch.int32)
        choose_kernel[(heads,)](
            *copied,
            scores,
            scores.stride(0),
            keep,
            high,
            sizes.num_tokens,
            count,
            self._recent,
            leaving,
            merged,
            order,
            LAYER=layout,
        )
        first = sizes.low_end_bytes // LINE_BYTES - sizes.low_records * low.count
        low_end_line, moved = step.after.low_end_bytes // LINE_BYTES, step.moved_records
        if moved:
            to = low_end_line - moved * low.count
            move_kernel[(moved, heads)](*tiered, first, to, low.count, LAYER=layout)
        tokens = (*copied, *tiered, k, k.stride(0), v, v.stride(0))
        extend_high_kernel[(triton.cdiv(step.after.high_tokens, HIGH_RECORD_TOKENS), heads)](
            *tokens, merged, order, high, count, leaving, LAYER=layout, **OPTIONS["extend_high"]
        )
        if not leaving:
            return
        shape = (heads, step.demoted_records, 2, LOW_RECORD_TOKENS, layout.head_dim)
        integers = take("integers", shape, torch.uint8)
        extend_low_kernel[(step.demoted_records, heads)](
            *tokens,
            order,
            high,
            count,
            low_end_line - sizes.low_records * low.count,
            integers,
            self._hadamard,
            self._hadamard_scale,
            LAYER=layout,
            FORMAT=low,
            **OPTIONS["extend_low"],
        )

    def _copy_high(
        self, words: torch.Tensor, tiered_table: torch.Tensor, high_tokens: int
    ) -> tuple[Any, ...]:
        """A copy of a request's first pages, those of the high tier, and a table of them."""
        geometry = self._layout.geometry
        count = -(-geometry.high_bytes(high_tokens) // geometry.page_bytes)
        shape = (count, *words.shape[1:])
        copied = self._scratch.take("tokens", shape, torch.int32)
        torch.index_select(words, 0, tiered_table[:count], out=copied)
        table = torch.arange(count, dtype=torch.int32, device=words.device)
        return copied, copied.stride(0), copied.stride(1), table
