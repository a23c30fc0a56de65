"""Attention and importance scores in plain torch: the oracle for the kernels."""

import torch


def attention_weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute softmax weights ``[queries, keys]``, float32.

    Args:
        queries: ``[queries, head_dim]``.
        keys: ``[keys, head_dim]``.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; 0 is off.
        sinks: ``[queries]``, logits that only join the denominator of the softmax, or None.
        mask: bool ``[queries, keys]``; False excludes a key. None includes all keys.
    """
    logits = queries.float() @ keys.float().T * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None]], dim=1)
        return logits.softmax(-1)[:, :-1]
    return logits.softmax(-1)


def score_prompt(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score the tokens of a prompt by the attention weights that the last queries give them.

    Args:
        queries: ``[n, heads, head_dim]``, of the last ``n`` tokens; attention is causal.
        keys: ``[tokens, kv_heads, head_dim]``.
        sinks: ``[heads]`` or None.

    Returns:
        Scores ``[kv_heads, tokens]``, float32: sums of weights over the queries and over the query
        heads of a KV head.
    """
    num_queries, num_heads, _ = queries.shape
    tokens, kv_heads, _ = keys.shape
    queries_per_kv_head = num_heads // kv_heads
    positions = torch.arange(tokens - num_queries, tokens)
    mask = torch.arange(tokens)[None] <= positions[:, None]
    scores = torch.zeros(kv_heads, tokens)
    for head in range(num_heads):
        sink = None if sinks is None else sinks[head].expand(num_queries)
        kv_head = head // queries_per_kv_head
        weights = attention_weights(queries[:, head], keys[:, kv_head], scale, softcap, sink, mask)
        scores[kv_head] += weights.sum(0)
    return scores
