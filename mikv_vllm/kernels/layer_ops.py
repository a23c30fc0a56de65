"""The operations of one attention layer on its cache, which each device implements."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch

from mikv_vllm.tiers.blocks import TailStep
from mikv_vllm.tiers.formats import HIGH_RECORD_TOKENS, HeaderLayout, LowFormat, TierGeometry
from mikv_vllm.tiers.plan import TierSizes
from mikv_vllm.tiers.records import high_record_offset

Batch_contra = TypeVar("Batch_contra", contravariant=True)
"""The compressed rows of a decode step, as the kernels of a device read them."""

MOST_IMPORTANT = 1e30
"""Score of tokens that stay high in any case."""


class LayerOps(Protocol[Batch_contra]):
    """Score, compress, decode, restore and extend.

    Implementations are set up with these parameters of a layer:

    Args:
        head_dim: channels of a head.
        num_heads, num_kv_heads: query heads, and the KV heads that they share equally.
        block_size: tokens of a native page, a multiple of 16.
        high_bits: bits per number of the high tier, 8 or 16.
        scale: factor of the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 disables this.
        sinks: ``[num_heads]`` logits that are added to the denominator of the softmax only, or
            None.
        decay: factor of every importance score at each decode step.
        recent: number of the newest tokens, which are never demoted.

    A cache has axes ``[pages, kv_heads, ...]`` and any dtype. The part of a page that belongs to a
    KV head is contiguous if the page is tiered. Queries, keys and values have 16-bit floating-point
    dtypes, contiguous heads and channels, and any stride per token. Page ids are integers, in the
    container that the device reads: an array for a CPU, an int32 tensor for a GPU.

    All operations write into their arguments and return nothing. On a GPU they are launched on the
    current stream: results are valid for later work on this stream.
    """

    head_dim: int
    num_kv_heads: int
    geometry: TierGeometry

    @abstractmethod
    def score(
        self,
        cache: torch.Tensor,
        native_table: Any,
        num_tokens: int,
        q: torch.Tensor,
        scores: torch.Tensor,
    ) -> None:
        """Add the attention weights of queries to the scores of the tokens of a native request.

        Attention is causal. The weights of the query heads of a KV head are summed.

        Args:
            cache: native pages.
            native_table: page ids of the request.
            num_tokens: tokens of the request.
            q: ``[n, heads, head_dim]``, queries of its last ``n`` tokens.
            scores: in and out, float32 ``[kv_heads, >= num_tokens]``, contiguous.
        """

    @abstractmethod
    def compress(
        self,
        cache: torch.Tensor,
        native_table: Any,
        tiered_table: Any,
        sizes: TierSizes,
        low_format: LowFormat,
        scores: torch.Tensor,
        q: torch.Tensor,
        recent: int,
    ) -> None:
        """Write native tokens into a block.

        Args:
            cache: in and out, native and tiered pages.
            native_table: page ids of the tokens, from the first one on.
            tiered_table: page ids of the block. They may be among those of ``native_table``.
            sizes: sizes of the block.
            low_format: format of the low tier.
            scores: float32 ``[kv_heads, >= sizes.num_tokens]``, contiguous. The tokens with the
                highest scores become high tokens.
            q: ``[n, heads, head_dim]``, the last queries of the prompt, at least one. They decide
                which key channels get more bits.
            recent: number of the newest tokens, which become high tokens.
        """

    @abstractmethod
    def decode(
        self,
        cache: torch.Tensor,
        batch: Batch_contra,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Run one decode step of every row of a batch.

        In each request: demote and append the new token in its tail, compute attention over all its
        blocks, and update the scores of the high tokens of the tail.

        A request may have drafts, further new tokens whose acceptance is not known yet. They are
        appended after the new token, and each attends to the tokens up to itself. Their attention
        weights join the scores in the next step of the request, if it says that they were accepted.

        Args:
            cache: in and out, tiered pages.
            batch: the rows.
            q: ``[tokens, heads, head_dim]``.
            k, v: ``[tokens, kv_heads, head_dim]``, of the new tokens and drafts.
            out: out, shaped like ``q``. Only the rows of the batch are written.
        """

    def begin(self, cache: torch.Tensor, source: Any, target: Any) -> None:
        """Give new blocks the headers of the blocks before them.

        Args:
            cache: in and out, tiered pages.
            source, target: first pages of the blocks before and of the new blocks, integers
                ``[blocks]``.
        """
        parts = cache.flatten(2)
        size = HeaderLayout(self.head_dim).num_bytes // cache.element_size()
        parts[target, :, :size] = parts[source, :, :size]

    @abstractmethod
    def restore(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        low_format: LowFormat,
        native: torch.Tensor,
    ) -> None:
        """Dequantize a compressed request into native pages: its high tokens, then its low ones.

        Args:
            cache: tiered pages.
            tiered_table: page ids of the request.
            sizes: sizes of the request.
            low_format: format of its low tier.
            native: out, native pages, shaped like ``cache`` but for the number of pages. Pages are
                written from page 0 on.
        """

    @abstractmethod
    def extend(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        step: TailStep,
        low_format: LowFormat,
        k: torch.Tensor,
        v: torch.Tensor,
        scores: torch.Tensor,
        recent: int,
        keep: float,
    ) -> None:
        """Add tokens of a prompt chunk to a block.

        Args:
            cache: in and out, tiered pages.
            tiered_table: page ids of the block, including the new pages of the step.
            sizes: sizes before the step.
            step: result of :meth:`~mikv_vllm.tiers.blocks.BlockPlanner.extend`.
            low_format: format of the low tier.
            k, v: ``[tokens, kv_heads, head_dim]``, of the new tokens.
            scores: float32 ``[kv_heads, >= sizes.num_tokens + tokens]``, contiguous, in the order
                of :meth:`restore`, then the new tokens.
            recent: number of the newest tokens, which stay high.
            keep: factor of the stored scores of high tokens, before ``scores`` are added to them.
        """

    @abstractmethod
    def read_native(
        self, native: torch.Tensor, num_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy keys and values ``[num_tokens, kv_heads, head_dim]`` out of native pages.

        Args:
            native: native pages, from that of the first token on.
        """

    def high_scores(self, cache: torch.Tensor, tiered_table: Any, sizes: TierSizes) -> torch.Tensor:
        """The stored importance scores of a block's high tokens, float32 ``[kv_heads, high]``.

        Args:
            cache: tiered pages.
            tiered_table: page ids of the block.
            sizes: sizes of the block.
        """
        geometry = self.geometry
        table = torch.as_tensor(tiered_table, device=cache.device).long()
        records = torch.arange(-(-sizes.high_tokens // HIGH_RECORD_TOKENS), device=cache.device)
        offsets = high_record_offset(geometry, records) + geometry.high.scores
        # The scores of a record are one line, which is in one page.
        numbers = offsets % geometry.page_bytes // 4
        numbers = numbers[:, None] + torch.arange(HIGH_RECORD_TOKENS, device=cache.device)
        words = cache.flatten(2).view(torch.float32)
        pages = words[table[offsets // geometry.page_bytes]]
        index = numbers[:, None].expand(-1, self.num_kv_heads, -1)
        return pages.gather(2, index).movedim(1, 0).flatten(1)[:, : sizes.high_tokens]

    def seal(
        self,
        cache: torch.Tensor,
        tiered_table: Any,
        sizes: TierSizes,
        low_format: LowFormat,
        native: torch.Tensor,
        scores: torch.Tensor,
        recent: int,
    ) -> None:
        """Write a sealed block from native tokens. Its first page has its header already.

        Args:
            cache: in and out, tiered pages.
            tiered_table: page ids of the block.
            sizes: sizes of the block.
            low_format: format of the low tier.
            native: native pages outside of ``cache``, from that of the first token on.
            scores: float32 ``[kv_heads, >= sizes.num_tokens]``, in the order of the native tokens.
                The tokens with the highest scores become high tokens.
            recent: number of the last tokens, which become high tokens.
        """
        keys, values = self.read_native(native, sizes.num_tokens)
        empty = replace(sizes, high_tokens=0, low_records=0)
        step = TailStep(len(keys), (), False, sizes.low_records, sizes)
        table = (cache, tiered_table, empty, step, low_format)
        self.extend(*table, keys, values, scores, recent, keep=0.0)

    def seal_tail(
        self,
        cache: torch.Tensor,
        tail: tuple[Any, TierSizes, LowFormat],
        block: tuple[Any, TierSizes, LowFormat],
        native: torch.Tensor,
        recent: int,
    ) -> None:
        """Write a full tail anew as a sealed block.

        Low tokens of the tail become high tokens only if the block has more of them.

        Args:
            cache: in and out, tiered pages.
            tail, block: page ids, sizes, and format of the low tier. They can have pages in common,
                and they have the first page in common, which contains the header.
            native: native pages outside of ``cache``, with room for the tokens. They are
                overwritten.
            recent: number of the newest tokens, which stay high.
        """
        table, sizes, low_format = tail
        self.restore(cache, table, sizes, low_format, native)
        shape = self.num_kv_heads, sizes.num_tokens
        scores = torch.full(shape, -1.0, device=cache.device)
        scores[:, : sizes.high_tokens] = self.high_scores(cache, table, sizes)
        scores[:, sizes.high_tokens - recent : sizes.high_tokens] = MOST_IMPORTANT
        self.seal(cache, *block, native, scores, recent=0)


def check_shape(
    head_dim: int,
    head_dims: tuple[int, ...],
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
) -> None:
    """Check the parameters of a layer.

    Args:
        head_dims: the head sizes that the kernels support.

    Raises:
        ValueError: a parameter is not supported.
    """
    if head_dim not in head_dims:
        raise ValueError(f"head_dim is {head_dim}, but must be one of {head_dims}")
    if block_size % 16:
        raise ValueError(f"block_size is {block_size}, but must be a multiple of 16")
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads}, but must be a multiple of num_kv_heads, {num_kv_heads}"
        )
