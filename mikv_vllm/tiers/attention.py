"""Attention and the importance scores that it yields, in plain torch: the kernels' oracle."""

import torch


def attention_weights(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax weights ``[queries, keys]``, float32; sinks ``[queries]`` take their share."""
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
    """Importance of a prompt's tokens: attention that its last queries paid to each.

    Args:
        queries: ``[n, heads, head_dim]``, of the last ``n`` tokens, causal.
        keys: ``[tokens, kv_heads, head_dim]``.
        sinks: ``[heads]`` or None.

    Returns:
        ``[kv_heads, tokens]``: weights summed over queries and over the query heads of a KV head.
    """
    num_queries, num_heads, _ = queries.shape
    tokens, kv_heads, _ = keys.shape
    group = num_heads // kv_heads
    positions = torch.arange(tokens - num_queries, tokens)
    mask = torch.arange(tokens)[None] <= positions[:, None]
    scores = torch.zeros(kv_heads, tokens)
    for head in range(num_heads):
        sink = None if sinks is None else sinks[head].expand(num_queries)
        weights = attention_weights(
            queries[:, head], keys[:, head // group], scale, softcap, sink, mask
        )
        scores[head // group] += weights.sum(0)
    return scores
