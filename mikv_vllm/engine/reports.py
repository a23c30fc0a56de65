"""The report of one request: what its cache takes."""

from typing import Any

from vllm.v1.request import Request

from mikv_vllm.engine.tier_store import TierStore
from mikv_vllm.engine.tiered_request import TierTotals
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS


def request_report(request: Request, store: TierStore, heads: int) -> dict[str, Any]:
    """Return the report of a request, counted in whole pages.

    Args:
        store: the tiers of all requests.
        heads: KV heads of all layers.
    """
    geometry = store.geometry
    tiered = store.requests.get(request.request_id)
    totals, shared = TierTotals(), TierTotals()
    for block in tiered.all_blocks() if tiered else ():
        totals.count(geometry, block)
        if block.users > 1:
            shared.count(geometry, block)
    computed = min(request.num_computed_tokens, request.num_tokens - 1)  # without unused drafts
    tokens = tiered.num_tokens if tiered else computed
    uncompressed = tokens * geometry.token_bytes * heads
    page_bytes = geometry.page_bytes * heads
    stored = totals.pages * page_bytes if tiered else uncompressed
    return {
        "requested_ratio": store.ratios.get(request.request_id, 1.0),
        "achieved_ratio": round(uncompressed / stored, 4) if stored else 1.0,
        "kv_tokens": tokens,
        "high_tokens": totals.high_tokens,
        "low_tokens": LOW_RECORD_TOKENS * totals.low_records,
        "reused_tokens": tiered.reused_tokens if tiered else 0,
        "kv_bytes": stored,
        "shared_kv_bytes": shared.pages * page_bytes,
        "uncompressed_kv_bytes": uncompressed,
        "low_format": tiered.blocks[0].low_format.name if tiered else None,
    }
