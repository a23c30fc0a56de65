"""The report of one request: what its cache takes."""

from typing import Any

from vllm.v1.request import Request

from mikv_vllm.engine.tier_store import TierStore


def request_report(request: Request, store: TierStore, heads: int) -> dict[str, Any]:
    """Return the report of a request, counted in whole pages.

    Args:
        store: the tiers of all requests.
        heads: KV heads of all layers.
    """
    geometry = store.geometry
    tiered = store.requests.get(request.request_id)
    sizes = tiered.sizes if tiered else None
    tokens = sizes.num_tokens if sizes else request.num_computed_tokens
    uncompressed = tokens * geometry.token_bytes * heads
    stored = sizes.pages * geometry.page_bytes * heads if sizes else uncompressed
    return {
        "requested_ratio": store.ratios.get(request.request_id, 1.0),
        "achieved_ratio": round(uncompressed / stored, 4) if stored else 1.0,
        "kv_tokens": tokens,
        "high_tokens": sizes.high_tokens if sizes else 0,
        "low_tokens": sizes.low_tokens if sizes else 0,
        "kv_bytes": stored,
        "uncompressed_kv_bytes": uncompressed,
        "low_format": tiered.planner.low_format.name if tiered else None,
    }
