"""A model in plain torch whose cache can be replaced between prompt and continuation."""

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

ATTENTION = "mikv_recording"
QUERIES_AT_ONCE = 256


@dataclass
class _Recording:
    """What attention saw during one prompt, by layer."""

    window: int
    queries: list[torch.Tensor] = field(default_factory=list)
    largest_query: list[torch.Tensor] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)
    window_attention: list[torch.Tensor] = field(default_factory=list)


_recording: _Recording | None = None


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kw: Any
) -> Any:
    """transformers' own attention; notes down queries and weights while a prompt is recorded."""
    if _recording is not None:
        _record(_recording, query[0].float(), key[0].float(), kw.get("scaling"))
    return sdpa_attention_forward(module, query, key, value, *args, **kw)


def _record(to: _Recording, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> None:
    """Queries ``[heads, tokens, head_dim]`` over keys ``[kv_heads, tokens, head_dim]``, causal."""
    heads, tokens, head_dim = query.shape
    kv_heads = len(key)
    grouped = query.unflatten(0, (kv_heads, heads // kv_heads))
    to.queries.append(grouped[:, :, -to.window :].flatten(1, 2).clone())
    to.largest_query.append(grouped.abs().amax((1, 2)))
    columns = torch.arange(tokens)
    total, last = torch.zeros(kv_heads, tokens), torch.zeros(kv_heads, tokens)
    for start in range(0, tokens, QUERIES_AT_ONCE):
        part = grouped[:, :, start : start + QUERIES_AT_ONCE]
        rows = torch.arange(start, start + part.shape[2])
        logits = part @ key[:, None].mT * (scale or head_dim**-0.5)
        weights = logits.masked_fill(columns > rows[:, None], -torch.inf).softmax(-1)
        total += weights.sum((1, 2))
        last += weights[:, :, rows >= tokens - to.window].sum((1, 2))
    to.attention.append(total)
    to.window_attention.append(last)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@dataclass(frozen=True)
class Prefill:
    """A prompt's cache: ``layers[layer][kv_head]``."""

    num_tokens: int
    layers: list[list[HeadCache]]


def divergence(reference: torch.Tensor, log_probs: torch.Tensor) -> float:
    """Mean KL divergence to a reference, nats, of log-probabilities ``[tokens, vocabulary]``."""
    theirs = reference.double()
    return (theirs.exp() * (theirs - log_probs.double())).sum(-1).mean().item()


@dataclass(frozen=True)
class Continuation:
    """Predictions for a known continuation, float32 ``[tokens, vocabulary]``, and bytes stored."""

    log_probs: torch.Tensor
    ratio: float


class ReferenceModel:
    """A decoder model on the CPU in float32, where nothing but the method rounds.

    Args:
        path: folder or name of the model.
        window: queries at a prompt's end that methods may look at.
    """

    def __init__(self, path: str | Path, window: int = 32) -> None:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.path = path
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self._model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=ATTENTION
        ).eval()
        self._window = window

    @contextmanager
    def _recorded(self) -> Iterator[_Recording]:
        global _recording  # noqa: PLW0603
        _recording = _Recording(self._window)
        try:
            yield _recording
        finally:
            _recording = None

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> Prefill:
        """Run a prompt but for its last token, which the continuation begins with."""
        cache = transformers.DynamicCache(config=self._model.config)
        with self._recorded() as seen:
            self._model(torch.tensor([prompt[:-1]]), past_key_values=cache, logits_to_keep=1)
        layers = []
        for layer, keys, values in zip(range(10**9), *self._tensors(cache), strict=False):
            layers.append(
                [
                    HeadCache(
                        keys[head],
                        values[head],
                        seen.queries[layer][head],
                        seen.largest_query[layer][head],
                        seen.attention[layer][head],
                        seen.window_attention[layer][head],
                    )
                    for head in range(len(keys))
                ]
            )
        return Prefill(len(prompt) - 1, layers)

    def _tensors(self, cache: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        layers = cache.layers
        return [layer.keys[0].float() for layer in layers], [
            layer.values[0].float() for layer in layers
        ]

    @torch.inference_mode()
    def continue_with(
        self, prefill: Prefill, tokens: list[int], method: CacheMethod | None
    ) -> Continuation:
        """Predict what follows each of ``tokens``, over the prompt's cache as ``method`` stores it.

        Args:
            tokens: the prompt's last token, then the continuation but for its last one.
            method: None for the cache as it is.
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
