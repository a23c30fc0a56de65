"""A model in plain torch. Its cache can be replaced between the prompt and the continuation."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mikv_vllm.evaluation.methods.base import CacheMethod, HeadCache
from mikv_vllm.tiers.calibrations import ModelShape

ATTENTION = "mikv_recording"
"""Name of :func:`_attention` in transformers."""
QUERIES_AT_ONCE = 256
"""Queries whose attention weights are in memory at the same time."""


@dataclass
class _Recording:
    """Queries and attention weights of one prompt, by layer, as in :class:`HeadCache`."""

    window: int
    every_query: bool
    queries: list[torch.Tensor] = field(default_factory=list)
    largest_query: list[torch.Tensor] = field(default_factory=list)
    window_attention: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)


_recording: _Recording | None = None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
) -> Any:
    """Compute attention with transformers' SDPA; record queries and weights of a prompt."""
    if _recording is not None:
        _record(_recording, query[0].float(), key[0].float(), kw.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, *args, **kw)


def _record(to: _Recording, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
    """Append the queries and the causal attention weights of one layer to a recording.

    Args:
        to: the recording.
        query: float32 ``[heads, tokens, head_dim]``.
        key: float32 ``[kv_heads, tokens, head_dim]``.
        scale: factor of the logits; None for ``head_dim**-0.5``.
    """
    heads, tokens, head_dim = query.shape
    kv_heads = len(key)
    grouped = query.unflatten(0, (kv_heads, heads // kv_heads))
    to.queries.append(grouped[:, :, -to.window :].flatten(1, 2).clone())
    to.largest_query.append(grouped.abs().amax((1, 2)))
    columns = torch.arange(tokens)
    total, last = torch.zeros(kv_heads, tokens), torch.zeros(kv_heads, tokens)
    first = 0 if to.every_query else max(tokens - to.window, 0)
    for start in range(first, tokens, QUERIES_AT_ONCE):
        part = grouped[:, :, start : start + QUERIES_AT_ONCE]
        rows = torch.arange(start, start + part.shape[2])
        logits = part @ key[:, None].mT * (scale or head_dim**-0.5)
        weights = logits.masked_fill(columns > rows[:, None], -torch.inf).softmax(-1)
        total += weights.sum((1, 2))
        last += weights[:, :, rows >= tokens - to.window].sum((1, 2))
    to.window_attention.append(last)
    if to.every_query:
        to.attention.append(total)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Prefill:
    """The cache of a prompt."""

    num_tokens: int
    layers: list[list[HeadCache]]
    """By layer and KV head."""


def divergence(reference: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Return the mean KL divergence from ``reference`` in nats.

    Args:
        reference: log-probabilities ``[tokens, vocabulary]``.
        log_probs: log-probabilities ``[tokens, vocabulary]``.
    """
    theirs = reference.double()
    return (theirs.exp() * (theirs - log_probs.double())).sum(-1).mean().item()


@dataclass(frozen=True)
class Continuation:
    """Predictions for a known continuation."""

    log_probs: torch.Tensor
    """float32 ``[tokens, vocabulary]``."""
    ratio: float
    """Bytes of the cache at 16 bits divided by stored bytes; 1.0 without a method."""


class ReferenceModel:
    """A decoder model on the CPU in float32, so that only the method changes the predictions.

    Args:
        path: folder or name of the model.
        window: number of the last queries of a prompt that methods may use.
        prompt_precision: precision of the products in :meth:`prefill`: ``highest``, float32, or
            ``medium``, bfloat16 where PyTorch has such products. The cache of a prompt is the same
            for all methods, and everything after the prompt is computed in float32.
    """

    def __init__(
        self, path: str | Path, window: int = 32, prompt_precision: str = "highest"
    ) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=ATTENTION
        ).eval()
        self._window = window
        self._prompt_precision = prompt_precision

    @property
    def shape(self) -> ModelShape | None:
        """The sizes of the model, by which its calibration is found."""
        return ModelShape.of_config(self._model.config)

    @contextmanager
    def _recorded(self, every_query: bool) -> Iterator[_Recording]:
        """Record the attention of all layers in the ``with`` block."""
        global _recording  # noqa: PLW0603
        _recording = _Recording(self._window, every_query)
        try:
            yield _recording
        finally:
            _recording = None

    @torch.inference_mode()
    def prefill(self, prompt: list[int], attention: bool = True) -> Prefill:
        """Compute the cache of a prompt without its last token, which starts the continuation.

        Args:
            prompt: tokens.
            attention: whether to compute :attr:`HeadCache.attention`. Its time grows with the
                square of the prompt.
        """
        cache = transformers.DynamicCache(config=self._model.config)
        torch.set_float32_matmul_precision(self._prompt_precision)
        try:
            with self._recorded(attention) as seen:
                self._model(torch.tensor([prompt[:-1]]), past_key_values=cache, logits_to_keep=1)
        finally:
            torch.set_float32_matmul_precision("highest")
        layers = []
        for layer, (keys, values) in enumerate(self._tensors(cache)):
            layers.append(
                [
                    HeadCache(
                        keys[head],
                        values[head],
                        seen.queries[layer][head],
                        seen.largest_query[layer][head],
                        seen.window_attention[layer][head],
                        seen.attention[layer][head] if attention else None,
                    )
                    for head in range(len(keys))
                ]
            )
        return Prefill(len(prompt) - 1, layers)

    def _tensors(self, cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return keys and values of each layer, float32 ``[kv_heads, tokens, head_dim]``."""
        return [(layer.keys[0].float(), layer.values[0].float()) for layer in cache.layers]

    @torch.inference_mode()
    def continue_with(
        self, prefill: Prefill, tokens: list[int], method: CacheMethod | None
    ) -> Continuation:
        """Predict the next token after each of ``tokens``, over the cache that ``method`` stores.

        Args:
            prefill: cache of the prompt. It is not modified.
            tokens: the last token of the prompt and the continuation without its last token.
            method: how the cache is stored; None for the untouched cache.
        """
        cache = transformers.DynamicCache(config=self._model.config)
        stored_bytes = native_bytes = 0.0
        for layer, heads in enumerate(prefill.layers):
            if method is None:
                keys = torch.stack([head.keys for head in heads])
                values = torch.stack([head.values for head in heads])
            else:
                stored = [method.store(head) for head in heads]
                keys = torch.stack([one.keys for one in stored])
                values = torch.stack([one.values for one in stored])
                stored_bytes += sum(one.num_bytes for one in stored)
                native_bytes += sum(head.native_bytes for head in heads)
            cache.update(keys[None], values[None], layer)
        positions = torch.arange(prefill.num_tokens, prefill.num_tokens + len(tokens))
        output = self._model(
            torch.tensor([tokens]), past_key_values=cache, position_ids=positions[None]
        )
        ratio = native_bytes / stored_bytes if stored_bytes else 1.0
        return Continuation(output.logits[0].float().log_softmax(-1), ratio)
