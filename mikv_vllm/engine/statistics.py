"""Statistics of the pool: what the tiers hold and what was done so far."""

from collections.abc import Sequence

from vllm.v1.request import Request

from mikv_vllm.engine.step_plan import TierStats
from mikv_vllm.engine.tier_store import TierStore
from mikv_vllm.tiers.formats import LOW_RECORD_TOKENS


def tier_stats(store: TierStore, running: Sequence[Request], heads: int) -> TierStats:
    """Return the statistics after a step is scheduled.

    Args:
        store: the tiers of all requests.
        running: all running requests.
        heads: KV heads of all layers.
    """
    pool, geometry, held = store.pool, store.geometry, store.totals
    total, free = pool.num_gpu_blocks - 1, pool.get_num_free_blocks()
    native_tokens = sum(
        r.num_computed_tokens for r in running if r.request_id not in store.requests
    )
    num_tiered = len(store.requests)
    high_bytes = held.blocks * geometry.header_bytes + held.high_records * geometry.high.num_bytes
    unused = held.pages * geometry.page_bytes - high_bytes - held.low_bytes
    return TierStats(
        pages={
            "total": total,
            "free": free,
            "native": total - free - held.pages,
            "tiered": held.pages,
        },
        tokens={
            "native": native_tokens,
            "high": held.high_tokens,
            "low": LOW_RECORD_TOKENS * held.low_records,
        },
        bytes={
            "high": high_bytes * heads,
            "low": held.low_bytes * heads,
            "unused": unused * heads,
        },
        blocks={
            "sealed": held.sealed,
            "tail": held.blocks - held.sealed,
            "kept": store.cache.num_kept,
        },
        operations=dict(store.operations),
        reused_tokens=dict(store.reused_tokens),
        requests={"native": len(running) - num_tiered, "tiered": num_tiered},
    )
